"""The story of a credential: L1, then Redis, then the store, then argon2; judged by one rule.

`check_token_cached` answers from this process alone, without waiting, or returns None.
`check` asks whoever has to be asked. An error anywhere on the way is `Reason.UNAVAILABLE` and
writes nothing to any cache: a database outage never shows as an invalid key.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from keylatch.authentication.lookup import Lookup, Owner
from keylatch.caches.local_cache import Entry, LocalCache, NegativeEntry
from keylatch.caches.shared_cache import SharedCache
from keylatch.caches.single_flight import SingleFlight
from keylatch.core import credentials
from keylatch.core.decisions import (
    ANY_KEY,
    Allow,
    ClientGetter,
    Decision,
    DeferredDeny,
    Deny,
    Reason,
    Requirement,
    evaluate,
)
from keylatch.core.refusals import LogFailure
from keylatch.core.tokens import MacKeys, Token, fingerprint, is_native, is_well_formed
from keylatch.errors import HashingBusy, KeylatchError, StoreUnavailable
from keylatch.revocation.invalidations import Freshness, Invalidations
from keylatch.revocation.monitor import RevocationMonitor
from keylatch.revocation.notifier import Notifier
from keylatch.revocation.open_connections import OpenConnections
from keylatch.storage.schema import STORE_SECRETS_ID
from keylatch.storage.store import Store
from keylatch.telemetry.counters import HEADER, L1, MAC, NEGATIVE_CACHE, NONE, Counters
from keylatch.telemetry.failure_log import FailureLog
from keylatch.telemetry.health import Health
from keylatch.usage.recorder import UsageRecorder

if TYPE_CHECKING:
    from keylatch.telemetry.tracing import Tracing

_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What looks on beside the path of checks. It is one attribute of the engine, because CPython
    reads an object of 30 attributes or more slower, and a hit reads many."""

    revocation_monitor: RevocationMonitor
    health: Health
    tracing: "Tracing | None"
    failures: FailureLog | None


class Authenticator(ABC):
    """What an `Engine` does for requests; all that is used here, the engine opens and closes."""

    store: Store
    counters: Counters
    _diagnostics: Diagnostics
    _notifier: Notifier | None
    _mac_keys: MacKeys | None
    _invalidations: Invalidations
    _fast_field_count: int
    _single_flight: SingleFlight[tuple[Entry | NegativeEntry, str]]
    _l1: LocalCache
    _l2: SharedCache | None
    _lookup: Lookup | None
    _secrets_single_flight: SingleFlight[None]
    _secrets_as_of: int
    _usage: UsageRecorder
    _open_connections: OpenConnections
    _freshness: Freshness

    @abstractmethod
    async def ensure_started(self) -> Lookup:
        """What asks others; opens the store if it is not open yet.

        Raises:
            StoreUnavailable: it could not be opened.
        """

    async def authenticate(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY
    ) -> Decision:
        """Judge a request by the values of its `Authorization` fields.

        A hit in this process is answered without suspending: no hop, no waiting.
        """
        cached = self.check_cached(values, requirement)
        return await self.check(cached, requirement) if isinstance(cached, Token) else cached

    def check_cached(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY
    ) -> Decision | Token:
        """`authenticate` without waiting, any thread; the token where that does not suffice."""
        if len(values) == self._fast_field_count:
            allow = self._cached_allow(values[0], requirement)
            if allow is not None:
                return allow
        elif self.counters.hits_to_time and len(values) == 1:
            allow = self._cached_allow_timed(values[0], requirement)
            if allow is not None:
                return allow
        token = self._read_credential(values)
        if isinstance(token, Reason):
            return self._count_decision(Deny(token), HEADER)
        return self.check_token_cached(token, requirement) or token

    def _read_credential(self, values: Sequence[bytes]) -> Token | Reason:
        if self.counters.is_parse_sampled():
            with self.counters.parse_stage():
                credential = credentials.read(values)
        else:
            credential = credentials.read(values)
        if credential is Reason.MALFORMED:
            with_pipe = credentials.read(values, allow_pipe=True)
            is_accepted = isinstance(with_pipe, Token) and (
                self._mac_keys is None or self._has_imported()
            )
            return with_pipe if is_accepted else credential
        return credential

    def _has_imported(self) -> bool:
        """Whether the store has keys that were made elsewhere, as the witness last heard."""
        self._freshness.is_fresh()  # so that it hears what it can without waiting
        return self._invalidations.has_imported

    def _cached_allow(self, value: bytes, requirement: Requirement) -> Allow | None:
        """The hit: a value that was let in before, while nothing has changed since that would
        matter. Whatever is not as usual is None, and goes the long way round, where `evaluate` says
        what is the matter: here its two questions are asked without calls."""
        entry = self._l1.by_fingerprint(fingerprint(value))
        if entry is None:
            return None
        now_ms = self._freshness.now_if_fresh()
        if now_ms is None or (
            entry.version is not self._invalidations.version and not self._still_valid(entry)
        ):
            return None
        allow = entry.allow
        if allow.expires_at is not None and allow.expires_at <= now_ms:
            return None
        if (
            requirement.permissions is not None
            and allow.principal.permission not in requirement.permissions
        ):
            return None
        if (
            requirement.environment is not None
            and allow.principal.environment != requirement.environment
        ):
            return None
        self._usage.record(entry, now_ms)
        next(self.counters.steps)
        return allow

    def _cached_allow_timed(self, value: bytes, requirement: Requirement) -> Allow | None:
        """The same for a few: the clock costs as much as a tenth of the hit."""
        self.counters.hits_to_time -= 1
        if self.counters.hits_to_time <= 0:
            self.counters.hits_to_time, self._fast_field_count = 0, 1
        began = time.perf_counter()
        allow = self._cached_allow(value, requirement)
        if allow is not None:
            self.counters.stages[L1].observe(time.perf_counter() - began)
        return allow

    def _count_decision(self, decision: Decision, source: str) -> Decision:
        self.counters.count_decision(decision, source)
        return decision

    def _still_valid(self, entry: Entry) -> bool:
        """Whether an entry says the truth by what the feed has learned since it was last asked."""
        state = self._invalidations.version  # before it is asked: it may learn more meanwhile
        accepted = self._invalidations.accepts(entry.key_id, entry.organization_id, entry.as_of)
        if accepted:
            entry.version = state
        return accepted

    def check_token_cached(
        self, token: Token, requirement: Requirement = ANY_KEY
    ) -> Decision | None:
        """Judge a token by what this process knows; None where that does not suffice.

        A stranger's token is refused here, with no call to Redis, the store or argon2; unless it
        could be one that was made elsewhere, and the store has keys that were.
        """
        if self._mac_keys is None:
            return None
        cached = self._cached(token)
        if cached is None:
            if not self._is_forged(self._mac_keys, token):
                return None
            return self._count_decision(Deny(Reason.FORGED), MAC)
        if not self._freshness.is_fresh():
            return None
        return self._evaluate(cached, token, requirement, _source_of(cached))

    async def check(self, token: Token, requirement: Requirement = ANY_KEY) -> Decision:
        """Judge a token, asking Redis, the store and argon2 as far as that is needed."""
        if self._diagnostics.tracing is None:
            return await self._check_or_deny(token, requirement)
        with self._diagnostics.tracing.check() as record_decision:
            decision = await self._check_or_deny(token, requirement)
            record_decision(decision)
            return decision

    async def _check_or_deny(self, token: Token, requirement: Requirement) -> Decision:
        try:
            decision = await self._check_store(token, requirement)
        except HashingBusy:  # the hasher's condition has it
            return self._count_decision(Deny(Reason.BUSY), NONE)
        except KeylatchError as error:
            return self.deny_unavailable(error.message)
        self._diagnostics.health.record_success()
        return decision

    def deny_unavailable(self, message: str) -> Deny:
        """A request could not be judged, for a reason that has nothing to do with its key."""
        self._diagnostics.health.record_failure(message)
        deny = Deny(Reason.UNAVAILABLE)
        self.counters.count_decision(deny, NONE)
        return deny

    async def _check_store(self, token: Token, requirement: Requirement) -> Decision:
        lookup = self._lookup or await self.ensure_started()
        decision = self.check_token_cached(token, requirement)
        if decision is not None:
            return decision
        cached = self._cached(token)
        source = _source_of(cached)
        for _ in range(_ATTEMPTS):
            if cached is None:
                if not await self._may_exist_by_current_secrets(token):
                    return self._count_decision(Deny(Reason.FORGED), MAC)
                cached, source = await self._single_flight.do(
                    token.fingerprint, lambda: self._look_up(lookup, token)
                )
            # What was fetched is judged like what was cached: the flight may have left before
            # this request came.
            await self._freshness.revalidate()
            decision = self._evaluate(cached, token, requirement, source)
            if decision is not None:
                return decision
            cached = None
        raise StoreUnavailable("the key changed during every attempt to look it up")

    def _cached(self, token: Token) -> Entry | NegativeEntry | None:
        """What this process knows of a token: that it is a key, or none, or that the key which it
        claims to be has another secret. While a rotation's grace runs, that says nothing."""
        fingerprint = token.fingerprint
        entry = self._l1.by_fingerprint(fingerprint)
        if entry is None and is_native(token):  # others name no key
            entry = self._l1.by_secret_id(token.key_id)
        if entry is None or (
            entry.fingerprint != fingerprint and entry.grace_ends_at > self._freshness.now_ms()
        ):
            return self._l1.negative_entry(fingerprint)
        return entry

    def _is_forged(self, mac_keys: MacKeys, token: Token) -> bool:
        """Whether a token is no key of this store's, for certain and without asking: while this
        process hears nothing, there may be a secret or an import that it has not heard of."""
        as_of = self._secrets_as_of  # before the keys are used: they may be renewed meanwhile
        if mac_keys.verify_mac(token):
            return False
        is_up_to_date = self._freshness.is_fresh() and self._invalidations.accepts(
            STORE_SECRETS_ID, STORE_SECRETS_ID, as_of
        )
        if not is_native(token):
            return is_up_to_date and not self._invalidations.has_imported
        return is_up_to_date or not is_well_formed(token)

    async def _may_exist_by_current_secrets(self, token: Token) -> bool:
        """Whether a secret of this store's made a token, by all that there are now; or it may have
        been made elsewhere."""
        await self._refresh_secrets()
        if self._mac_keys is None or self._mac_keys.verify_mac(token):
            return True
        await self._freshness.revalidate()
        if not is_native(token):
            return self._invalidations.has_imported
        await self._refresh_secrets()
        return self._mac_keys.verify_mac(token)

    async def _refresh_secrets(self) -> None:
        """Read the store's secrets again if they have changed, as far as this process knows."""
        self._freshness.is_fresh()  # brings the feed up to date where that takes no waiting
        for _ in range(_ATTEMPTS):
            if self._invalidations.accepts(STORE_SECRETS_ID, STORE_SECRETS_ID, self._secrets_as_of):
                return
            await self._secrets_single_flight.do("secrets", self._load_secrets)
        raise StoreUnavailable(
            "the store's secrets changed during every attempt to read them",
            "look for repeated `keylatch secrets rotate`",
        )

    async def _load_secrets(self) -> None:
        secrets = await self.store.secrets.load()
        if self._mac_keys is not None:
            self._mac_keys.set_keys(secrets.mac_keys)
        if self._l2 is not None:
            self._l2.set_peppers(secrets.peppers)
        if self._notifier is not None:
            self._notifier.signer.set_peppers(secrets.peppers)
        self._secrets_as_of = secrets.as_of  # last: whoever finds it finds them as well

    def _evaluate(
        self, cached: Entry | NegativeEntry, token: Token, requirement: Requirement, source: str
    ) -> Decision | None:
        """The decision by what is cached, or None if that is stale. The feed must be current."""
        if isinstance(cached, NegativeEntry):
            return self._evaluate_negative(cached, requirement, source)
        entry = cached
        if not self._still_valid(entry):
            return None
        if entry.fingerprint != token.fingerprint:
            # Of made-up tokens nothing is counted: else whoever knows an id could write there.
            if self._mac_keys is not None and self._mac_keys.verify_mac(token):
                self._record_refusal(entry.key_id, Reason.WRONG_SECRET, requirement)
            return self._count_decision(Deny(Reason.WRONG_SECRET), source)
        return self._decide(entry, self._freshness.now_ms(), source, requirement)

    def _decide(
        self, entry: Entry, now_ms: float, source: str, requirement: Requirement
    ) -> Decision:
        """By the moment at which the entry was known to be true, also where that is later."""
        decision = evaluate(entry.allow, now_ms, requirement)
        if isinstance(decision, Deny):
            is_valid_key = decision.reason is Reason.INSUFFICIENT_SCOPE
            if is_valid_key and not requirement.is_final:
                decide = partial(self._decide, entry, now_ms, source)
                return DeferredDeny(decision.reason, decision.scope, decide=decide)
            self._record_refusal(entry.key_id, decision.reason, requirement)
            if is_valid_key and requirement.is_use:
                self._usage.record_last_used(entry, now_ms)
        elif requirement.is_use:
            self._usage.record(entry, now_ms)
        return self._count_decision(decision, source)

    def _evaluate_negative(
        self, negative: NegativeEntry, requirement: Requirement, source: str
    ) -> Decision | None:
        if self._invalidations.accepts(negative.key_id, negative.organization_id, negative.as_of):
            self._record_refusal(negative.key_id, negative.reason, requirement)
            return self._count_decision(Deny(negative.reason), source)
        return None

    def _record_refusal(self, key_id: str, reason: Reason, requirement: Requirement) -> None:
        if requirement.is_use and reason is not Reason.UNKNOWN:  # that is nobody's
            self._usage.record_refusal(key_id, reason)

    async def _look_up(self, lookup: Lookup, token: Token) -> tuple[Entry | NegativeEntry, str]:
        found, source = await lookup.fetch(token)
        if isinstance(found, Entry):
            self._l1.add(found)
        else:
            self._l1.add_negative(token.fingerprint, found)
        return found, source

    def record_client(self, key_id: str, caller: ClientGetter) -> None:
        """After an allow, where `records_clients`: whence it came, for the key's usage."""
        self._usage.record_client(key_id, caller)

    @property
    def log_failure(self) -> LogFailure | None:
        """Logs a refused request; None: they are not logged."""
        failures = self._diagnostics.failures
        return None if failures is None else failures.add

    def now_ms(self) -> int:
        """The time that expiry is judged at: the store's, in milliseconds since the epoch."""
        return self._freshness.now_ms()

    # Tokens that turned up somewhere

    async def ensure_available(self) -> None:
        """Return if the store is there. Costs nothing while it was heard of lately: for whoever may
        be asked by strangers.

        Raises:
            StoreUnavailable: it is not.
        """
        await self.ensure_started()
        await self._freshness.revalidate()
        await self._refresh_secrets()  # `may_exist` asks nobody

    def may_exist(self, token: Token) -> bool:
        """Whether the store could have a token's key, as far as that can be told without asking it:
        by the keyed check, or because it has keys that were made elsewhere. That proves no key."""
        return self._mac_keys is not None and not self._is_forged(self._mac_keys, token)

    async def identify(self, token: Token) -> Owner | None:
        """The key whose secret this token is, whatever has become of it since; None: there is none.

        It asks the store and its hashes, no cache, and nobody has called: no use is noted.

        Raises:
            StoreUnavailable, HashingBusy, HashingFailed: it cannot be found out now.
        """
        lookup = await self.ensure_started()
        return (
            await lookup.identify(token)
            if await self._may_exist_by_current_secrets(token)
            else None
        )

    # Open connections

    def revocation_event(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY
    ) -> AbstractContextManager[asyncio.Event]:
        """After an allow: an event that is set once the same check would refuse, because the key
        was revoked, changed, or has expired. An outage ends nothing.
        """
        token = self._read_credential(values)
        if isinstance(token, Reason):  # let in by something else than a key
            return nullcontext(asyncio.Event())
        return self._open_connections.track(token, requirement)

    async def _is_still_allowed(self, token: Token, requirement: Requirement) -> bool:
        requirement = replace(requirement, is_use=False)  # nobody called
        entry = self._l1.by_fingerprint(token.fingerprint)
        if entry is not None and self._still_valid(entry):
            decision = evaluate(entry.allow, self._freshness.now_ms(), requirement)
        else:
            decision = await self.check(token, requirement)
        is_undecided = (Reason.UNAVAILABLE, Reason.BUSY)
        return isinstance(decision, Allow) or decision.reason in is_undecided


def _source_of(cached: Entry | NegativeEntry | None) -> str:
    return L1 if isinstance(cached, Entry) else NEGATIVE_CACHE
