"""Decides on credentials: local cache, then Redis, then the store, then the hash; one rule for all.

    check_cached(values, requirement) -> Allow | Deny | CacheMiss     never waits, any thread
    check(miss, requirement)          -> Allow | Deny                 goes on from the miss

The law of this file: an authenticator owns no connection and starts nothing. An error on the way is
`Reason.UNAVAILABLE` and writes nothing to any cache: an outage never looks like an invalid key.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from keylatch.caches.local_cache import Entry, LocalCache, NegativeEntry
from keylatch.caches.single_flight import SingleFlight
from keylatch.core import credentials
from keylatch.core.decisions import (
    ANY_KEY,
    Allow,
    Decision,
    DeferredDeny,
    Deny,
    Reason,
    Requirement,
    evaluate,
)
from keylatch.core.tokens import Token, fingerprint, is_native
from keylatch.errors import HashingBusy, KeylatchError, StoreUnavailable
from keylatch.telemetry.counters import (
    HEADER,
    L1,
    MAC,
    NEGATIVE_CACHE,
    NONE,
    PARSE,
    TIMED_HITS,
    Counters,
)
from keylatch.telemetry.events import Decided, Events
from keylatch.telemetry.request_trace import time_awaited_check, time_check

if TYPE_CHECKING:
    from keylatch.authentication.keyset import Keyset, ReadAt
    from keylatch.authentication.lookup import Lookup, Owner
    from keylatch.revocation.freshness import Freshness
    from keylatch.revocation.invalidations import Invalidations
    from keylatch.telemetry.health import Health
    from keylatch.telemetry.tracing import Tracing
    from keylatch.usage.recorder import UsageRecorder

_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class CacheMiss:
    """This process cannot decide without Redis or the store; what it has found out so far.

    Args:
        token: the credential.
        mac_verified_as_of: `as_of` of the secrets that verified its MAC; None: none of them did, or
            the MAC was not checked because of `cached`.
        cached: the cache entry of the token, which was stale or could not be validated.
    """

    token: Token = field(repr=False)
    mac_verified_as_of: ReadAt | None = None
    cached: Entry | NegativeEntry | None = field(default=None, repr=False)


class CheckCached(Protocol):
    """The signature of `Authenticator.check_cached`."""

    def __call__(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY, /
    ) -> Decision | CacheMiss: ...


class Authenticator:
    """Decides on the credentials of requests for one engine.

    It has few attributes: CPython reads an object with 30 attributes or more slower, and a hit
    reads many.

    Args:
        l1: the local cache.
        invalidations: say which of its entries are valid.
        freshness: says whether its entries may be used, and what time it is.
        keyset: the store's secrets.
        usage: records the uses.
        counters: count the hits.
        events: observe every other decision.
        health: whether checks are answered.
        tracing: makes a span of every check that does not hit; None: no spans.
        started: the look-up of the started engine; starts the engine where it is not started.
        timer: measures the timed hits.

    Attributes:
        check_cached: decides by the values of a request's `Authorization` fields without waiting;
            from any thread.
    """

    check_cached: CheckCached

    def __init__(
        self,
        l1: LocalCache,
        invalidations: Invalidations,
        freshness: Freshness,
        keyset: Keyset,
        usage: UsageRecorder,
        counters: Counters,
        events: Events,
        health: Health,
        tracing: Tracing | None,
        started: Callable[[], Awaitable[Lookup]],
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._l1 = l1
        self._invalidations = invalidations
        self._freshness = freshness
        self._keyset = keyset
        self._usage = usage
        self._counters = counters
        self._events = events
        self._health = health
        self._tracing = tracing
        self._started = started
        self._timer = timer
        self._single_flight: SingleFlight[tuple[Entry | NegativeEntry, str]] = SingleFlight()
        self.sample_timings()

    def after_fork_in_child(self) -> None:
        """After a fork: the parent's look-ups are not in progress here."""
        self._single_flight.after_fork_in_child()
        self.sample_timings()

    async def authenticate(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY
    ) -> Decision:
        """Decide by the values of a request's `Authorization` fields. A hit does not suspend."""
        outcome = self.check_cached(values, requirement)
        return await self.check(outcome, requirement) if isinstance(outcome, CacheMiss) else outcome

    async def check_token(self, token: Token, requirement: Requirement = ANY_KEY) -> Decision:
        """`authenticate` for a token that was read already."""
        outcome = self.check_token_cached(token, requirement)
        return await self.check(outcome, requirement) if isinstance(outcome, CacheMiss) else outcome

    # Without waiting

    def _check_cached(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY, /
    ) -> Decision | CacheMiss:
        if len(values) == 1:
            allow = self._cached_allow(values[0], requirement)
            if allow is not None:
                return allow
        token = self.read_credential(values)
        if isinstance(token, Reason):
            return self._count_decision(Deny(token), HEADER)
        return self.check_token_cached(token, requirement)

    def sample_timings(self) -> None:
        """Time the next hits: the clock costs a tenth of a hit, so the others are not timed."""
        self._hits_to_time = TIMED_HITS
        self.check_cached = self._check_cached_timed

    def _check_cached_timed(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY, /
    ) -> Decision | CacheMiss:
        self._hits_to_time -= 1
        if self._hits_to_time <= 0:
            self.check_cached = self._check_cached
        began = self._timer()
        outcome = self._check_cached(values, requirement)
        if isinstance(outcome, Allow):
            self._counters.stages[L1].observe(self._timer() - began)
        return outcome

    def _cached_allow(self, value: bytes, requirement: Requirement) -> Allow | None:
        """The hit: a value that was allowed before, while no change concerns its key. None in every
        other case, for which `evaluate` finds the reason: its conditions are repeated here
        without function calls."""
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
        next(self._counters.hit_steps)
        return allow

    def read_credential(self, values: Sequence[bytes]) -> Token | Reason:
        """The token in the values of a request's `Authorization` fields, or why there is none."""
        if self._counters.is_parse_sampled():
            with self._events.stage(PARSE, has_span=False):
                credential = credentials.read(values)
        else:
            credential = credentials.read(values)
        if credential is Reason.MALFORMED:
            with_pipe = credentials.read(values, allow_pipe=True)
            if isinstance(with_pipe, Token) and self._keyset.may_accept_pipe():
                return with_pipe
        return credential

    def check_token_cached(
        self, token: Token, requirement: Requirement = ANY_KEY
    ) -> Decision | CacheMiss:
        """Decide on a token without waiting.

        A token that the store did not mint is denied here, without Redis, the store or a hash;
        unless it may belong to an imported key, and the store has such keys.
        """
        cached = self._cached(token)
        if cached is None:
            as_of = self._keyset.as_of  # before the keys are used: they may be replaced meanwhile
            if self._keyset.verify_mac(token):
                return CacheMiss(token, mac_verified_as_of=as_of)
            if self._keyset.proves_forged(token, as_of):
                return self._count_decision(Deny(Reason.FORGED), MAC)
            return CacheMiss(token)
        decision = None
        if self._freshness.is_fresh():
            decision = self._evaluate(cached, token, requirement, _source_of(cached))
        return decision or CacheMiss(token, cached=cached)

    def _cached(self, token: Token) -> Entry | NegativeEntry | None:
        """What the local cache says of a token: a key, a negative entry, or a key with this id and
        another secret. During the grace after a rotation, the latter proves nothing."""
        fingerprint = token.fingerprint
        entry = self._l1.by_fingerprint(fingerprint)
        if entry is None and is_native(token):  # other tokens name no key
            entry = self._l1.by_secret_id(token.key_id)
        if entry is None or (
            entry.fingerprint != fingerprint and entry.grace_ends_at > self._freshness.now_ms()
        ):
            return self._l1.negative_entry(fingerprint)
        return entry

    # With Redis, the store and hashes

    async def check(self, miss: CacheMiss, requirement: Requirement = ANY_KEY) -> Decision:
        """Decide on a cache miss."""
        if self._tracing is None:
            return await self._check_or_deny(miss, requirement)
        with self._tracing.check() as record_decision:
            decision = await self._check_or_deny(miss, requirement)
            record_decision(decision)
            return decision

    async def _check_or_deny(self, miss: CacheMiss, requirement: Requirement) -> Decision:
        try:
            decision = await self._check_miss(miss, requirement)
        except HashingBusy:  # counted and logged by the health of the hasher
            return self._count_decision(Deny(Reason.BUSY), NONE)
        except KeylatchError as error:
            return self.deny_unavailable(error.message)
        self._health.record_success()
        return decision

    def deny_unavailable(self, message: str) -> Deny:
        """Deny a request that could not be decided, for a reason that is not in its key."""
        self._health.record_failure(message)
        deny = Deny(Reason.UNAVAILABLE)
        self._events.observe(Decided(deny, NONE))
        return deny

    async def _check_miss(self, miss: CacheMiss, requirement: Requirement) -> Decision:
        lookup, token = await self._started(), miss.token
        cached, source = miss.cached, _source_of(miss.cached)
        for _ in range(_ATTEMPTS):
            if cached is None:
                if not await self._keyset.may_be_valid(token, miss.mac_verified_as_of):
                    return self._count_decision(Deny(Reason.FORGED), MAC)
                cached, source = await self._single_flight.do(
                    token.fingerprint, lambda: self._look_up(lookup, miss)
                )
            # A result of the single flight is validated like a cached one: the look-up may have
            # begun before this request came.
            await self._freshness.revalidate()
            decision = self._evaluate(cached, token, requirement, source)
            if decision is not None:
                return decision
            cached = None
        raise StoreUnavailable("the key changed during every attempt to look it up")

    async def _look_up(self, lookup: Lookup, miss: CacheMiss) -> tuple[Entry | NegativeEntry, str]:
        # Another single flight may have ended since a thread found the miss.
        entry = self._l1.by_fingerprint(miss.token.fingerprint)
        if entry is not None and entry is not miss.cached and self._still_valid(entry):
            return entry, L1
        history = self._invalidations.history  # first: a restore may be noticed meanwhile
        found, source = await lookup.fetch(miss.token)
        found.history = history
        if isinstance(found, Entry):
            self._l1.add(found)
        else:
            self._l1.add_negative(miss.token.fingerprint, found)
        return found, source

    # Decisions by an entry

    def _still_valid(self, entry: Entry) -> bool:
        """Whether no change since the entry was last validated concerns it."""
        version = self._invalidations.version  # first: more changes may be applied meanwhile
        accepted = self._accepts(entry)
        if accepted:
            entry.version = version
        return accepted

    def _accepts(self, cached: Entry | NegativeEntry) -> bool:
        """Whether the entry was read in the present history of the store, and no known change
        invalidates it. A check that waits may hold an entry from before a restore."""
        return cached.history is self._invalidations.history and self._invalidations.accepts(
            cached.key_id, cached.organization_id, cached.as_of
        )

    def _evaluate(
        self, cached: Entry | NegativeEntry, token: Token, requirement: Requirement, source: str
    ) -> Decision | None:
        """The decision by an entry; None: the entry is stale. The process must be fresh."""
        if isinstance(cached, NegativeEntry):
            return self._evaluate_negative(cached, requirement, source)
        if not self._still_valid(cached):
            return None
        if cached.fingerprint != token.fingerprint:
            # Forged tokens are not counted: a client that knows an id could fill the usage of a
            # key that is not its own.
            if self._keyset.verify_mac(token):
                self._record_refusal(cached.key_id, Reason.WRONG_SECRET, requirement)
            return self._count_decision(Deny(Reason.WRONG_SECRET), source)
        return self._decide(cached, self._freshness.now_ms(), source, requirement)

    def _decide(
        self, entry: Entry, now_ms: float, source: str, requirement: Requirement
    ) -> Decision:
        """Decide by the time at which the entry was validated, also for a `DeferredDeny`."""
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
        if self._accepts(negative):
            self._record_refusal(negative.key_id, negative.reason, requirement)
            return self._count_decision(Deny(negative.reason), source)
        return None

    def _record_refusal(self, key_id: str, reason: Reason, requirement: Requirement) -> None:
        if requirement.is_use and reason is not Reason.UNKNOWN:  # no key has that token
            self._usage.record_refusal(key_id, reason)

    def _count_decision(self, decision: Decision, source: str) -> Decision:
        self._events.observe(Decided(decision, source))
        return decision

    async def is_still_allowed(self, token: Token, requirement: Requirement) -> bool:
        """Whether a token that was allowed before is allowed now, or cannot be decided on. This is
        no use of the key."""
        requirement = replace(requirement, is_use=False)
        entry = self._l1.by_fingerprint(token.fingerprint)
        if entry is not None and self._still_valid(entry):
            decision = evaluate(entry.allow, self._freshness.now_ms(), requirement)
        else:
            decision = await self.check_token(token, requirement)
        is_undecided = (Reason.UNAVAILABLE, Reason.BUSY)
        return isinstance(decision, Allow) or decision.reason in is_undecided

    # Tokens that were found somewhere

    async def ensure_available(self) -> None:
        """Return if the store answers; without a query while the process is fresh, because anyone
        may call this.

        Raises:
            StoreUnavailable: it does not.
        """
        await self._started()
        await self._freshness.revalidate()
        await self._keyset.refresh()  # `may_exist` does not wait

    def may_exist(self, token: Token) -> bool:
        """Whether the store could have a token's key, by its MAC, or because the store has imported
        keys. That does not prove that a key exists."""
        as_of = self._keyset.as_of
        return self._keyset.mac_keys is not None and (
            self._keyset.verify_mac(token) or not self._keyset.proves_forged(token, as_of)
        )

    async def identify(self, token: Token) -> Owner | None:
        """The key whose secret this token is, whatever its state; None: there is none. It asks the
        store and the hash, no cache, and records no use.

        Raises:
            StoreUnavailable, HashingBusy, HashingFailed: it cannot be found out now.
        """
        lookup = await self._started()
        if not await self._keyset.may_be_valid(token, None):
            return None
        return await lookup.identify(token)


class TracedAuthenticator:
    """The checks of an authenticator, timed for the request trace."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    def check_cached(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY, /
    ) -> Decision | CacheMiss:
        return time_check(lambda: self._authenticator.check_cached(values, requirement))

    async def check(self, miss: CacheMiss, requirement: Requirement = ANY_KEY) -> Decision:
        return await time_awaited_check(self._authenticator.check(miss, requirement))


def _source_of(cached: Entry | NegativeEntry | None) -> str:
    return L1 if isinstance(cached, Entry) else NEGATIVE_CACHE
