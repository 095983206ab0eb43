"""The story of a credential: L1, then Redis, then the store, then argon2; judged by one rule.

`peek` answers from this process alone, in one synchronous step, or says that it cannot (None).
`resolve` asks whoever has to be asked. An error anywhere on the way is `Reason.UNAVAILABLE` and
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

from keylatch import credentials
from keylatch.caches.cache import Absence, Cache, Entry
from keylatch.caches.flights import Flights
from keylatch.caches.shared_cache import SharedCache
from keylatch.errors import HashingBusy, KeylatchError, StoreUnavailable
from keylatch.lookup import Lookup, Owner
from keylatch.model import ANY_KEY, Allow, Caller, Deny, Reason, Unsettled, Verdict, Wanted, judge
from keylatch.revocation.bell import Bell
from keylatch.revocation.feed import Feed, Witness
from keylatch.revocation.second_look import SecondLook
from keylatch.revocation.watch import Watch
from keylatch.sql.schema import VAULT
from keylatch.store import Store
from keylatch.telemetry.condition import Condition
from keylatch.telemetry.failures import FailureLog
from keylatch.telemetry.meter import ABSENCE, HEADER, L1, NOWHERE, STRANGER, Meter
from keylatch.tokens import CheckKeys, Token, fingerprint, is_native, is_well_formed
from keylatch.usage.uses import Usage

if TYPE_CHECKING:
    from keylatch.telemetry.tracing import Tracing

_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class Aside:
    """What looks on beside the path of checks. It is one attribute of the engine, because CPython
    reads an object of 30 attributes or more slower, and a hit reads many."""

    second_look: SecondLook
    checks: Condition
    tracing: "Tracing | None"
    failures: FailureLog | None


class Checks(ABC):
    """What an `Engine` does for requests; all that is used here, the engine opens and closes."""

    store: Store
    meter: Meter
    _aside: Aside
    _bell: Bell | None
    _check_keys: CheckKeys | None
    _feed: Feed
    _fields: int
    _flights: Flights[tuple[Entry | Absence, str]]
    _l1: Cache
    _l2: SharedCache | None
    _lookup: Lookup | None
    _reading: Flights[None]
    _secrets_as_of: int
    _usage: Usage
    _watch: Watch
    _witness: Witness

    @abstractmethod
    async def started(self) -> Lookup:
        """What asks others; opens the store if it is not open yet.

        Raises:
            StoreUnavailable: it could not be opened.
        """

    async def check(self, values: Sequence[bytes], wanted: Wanted = ANY_KEY) -> Verdict:
        """Judge a request by the values of its `Authorization` fields.

        A hit in this process is answered without suspending: no hop, no waiting.
        """
        known = self.glance(values, wanted)
        return await self.resolve(known, wanted) if isinstance(known, Token) else known

    def glance(self, values: Sequence[bytes], wanted: Wanted = ANY_KEY) -> Verdict | Token:
        """`check` without waiting, from any thread; the token where that does not suffice."""
        if len(values) == self._fields:
            allow = self._recognised(values[0], wanted)
            if allow is not None:
                return allow
        elif self.meter.to_time and len(values) == 1:
            allow = self._recognised_timed(values[0], wanted)
            if allow is not None:
                return allow
        token = self._read(values)
        if isinstance(token, Reason):
            return self._decided(Deny(token), HEADER)
        return self.peek(token, wanted) or token

    def _read(self, values: Sequence[bytes]) -> Token | Reason:
        if self.meter.is_turn_to_time_reading():
            with self.meter.reading():
                said = credentials.read(values)
        else:
            said = credentials.read(values)
        if said is Reason.MALFORMED:
            barred = credentials.read(values, barred=True)
            is_welcome = isinstance(barred, Token) and (
                self._check_keys is None or self._has_foreign()
            )
            return barred if is_welcome else said
        return said

    def _has_foreign(self) -> bool:
        """Whether the store has keys that were made elsewhere, as the witness last heard."""
        self._witness.is_current()  # so that it hears what it can without waiting
        return self._feed.has_foreign

    def _recognised(self, value: bytes, wanted: Wanted) -> Allow | None:
        """The hit: a value that was let in before, while nothing has changed since that would
        matter. Whatever is not as usual is None, and goes the long way round, where `judge` says
        what is the matter: here its two questions are asked without calls."""
        entry = self._l1.proven(fingerprint(value))
        if entry is None:
            return None
        now_ms = self._witness.moment()
        if now_ms is None or (entry.state is not self._feed.state and not self._renewed(entry)):
            return None
        allow = entry.allow
        if allow.expires_at is not None and allow.expires_at <= now_ms:
            return None
        if wanted.permissions is not None and allow.principal.permission not in wanted.permissions:
            return None
        if wanted.environment is not None and allow.principal.environment != wanted.environment:
            return None
        self._usage.note(entry, now_ms)
        next(self.meter.steps)
        return allow

    def _recognised_timed(self, value: bytes, wanted: Wanted) -> Allow | None:
        """The same for a few: the clock costs as much as a tenth of the hit."""
        self.meter.to_time -= 1
        if self.meter.to_time <= 0:
            self.meter.to_time, self._fields = 0, 1
        began = time.perf_counter()
        allow = self._recognised(value, wanted)
        if allow is not None:
            self.meter.stages[L1].observe(time.perf_counter() - began)
        return allow

    def _decided(self, verdict: Verdict, tier: str) -> Verdict:
        self.meter.decided(verdict, tier)
        return verdict

    def _renewed(self, entry: Entry) -> bool:
        """Whether an entry says the truth by what the feed has learned since it was last asked."""
        state = self._feed.state  # before it is asked: it may learn more meanwhile
        accepted = self._feed.accepts(entry.key_id, entry.organization_id, entry.as_of)
        if accepted:
            entry.state = state
        return accepted

    def peek(self, token: Token, wanted: Wanted = ANY_KEY) -> Verdict | None:
        """Judge a token by what this process knows; None where that does not suffice.

        A stranger's token is refused here, with no call to Redis, the store or argon2; unless it
        could be one that was made elsewhere, and the store has keys that were.
        """
        if self._check_keys is None:
            return None
        known = self._remembered(token)
        if known is None:
            if not self._is_forged(self._check_keys, token):
                return None
            return self._decided(Deny(Reason.FORGED), STRANGER)
        if not self._witness.is_current():
            return None
        return self._judge(known, token, wanted, _tier_of(known))

    async def resolve(self, token: Token, wanted: Wanted = ANY_KEY) -> Verdict:
        """Judge a token, asking Redis, the store and argon2 as far as that is needed."""
        if self._aside.tracing is None:
            return await self._resolved(token, wanted)
        with self._aside.tracing.check() as tell:
            verdict = await self._resolved(token, wanted)
            tell(verdict)
            return verdict

    async def _resolved(self, token: Token, wanted: Wanted) -> Verdict:
        try:
            verdict = await self._resolve(token, wanted)
        except HashingBusy:  # the hasher's condition has it
            return self._decided(Deny(Reason.BUSY), NOWHERE)
        except KeylatchError as error:
            return self.gave_up(error.message)
        self._aside.checks.succeeded()
        return verdict

    def gave_up(self, why: str) -> Deny:
        """A request could not be judged, for a reason that has nothing to do with its key."""
        self._aside.checks.failed(why)
        deny = Deny(Reason.UNAVAILABLE)
        self.meter.decided(deny, NOWHERE)
        return deny

    async def _resolve(self, token: Token, wanted: Wanted) -> Verdict:
        lookup = self._lookup or await self.started()
        verdict = self.peek(token, wanted)
        if verdict is not None:
            return verdict
        known = self._remembered(token)
        tier = _tier_of(known)
        for _ in range(_ATTEMPTS):
            if known is None:
                if not await self._may_be_ours(token):
                    return self._decided(Deny(Reason.FORGED), STRANGER)
                known, tier = await self._flights.join(
                    token.fingerprint, lambda: self._fetch(lookup, token)
                )
            # What was fetched is judged like what was cached: the flight may have left before
            # this request came.
            await self._witness.catch_up()
            verdict = self._judge(known, token, wanted, tier)
            if verdict is not None:
                return verdict
            known = None
        raise StoreUnavailable("a key changed again and again while it was looked up")

    def _remembered(self, token: Token) -> Entry | Absence | None:
        """What this process knows of a token: that it is a key, or none, or that the key which it
        claims to be has another secret. While a rotation's grace runs, that says nothing."""
        fingerprint = token.fingerprint
        entry = self._l1.proven(fingerprint)
        if entry is None and is_native(token):  # others name no key
            entry = self._l1.entry(token.key_id)
        if entry is None or (
            entry.fingerprint != fingerprint and entry.grace_ends_at > self._witness.now_ms()
        ):
            return self._l1.absence(fingerprint)
        return entry

    def _is_forged(self, check_keys: CheckKeys, token: Token) -> bool:
        """Whether a token is no key of this store's, for certain and without asking: while this
        process hears nothing, there may be a secret or an import that it has not heard of."""
        as_of = self._secrets_as_of  # before the keys are used: they may be renewed meanwhile
        if check_keys.vouch(token):
            return False
        knows_all = self._witness.is_current() and self._feed.accepts(VAULT, VAULT, as_of)
        if not is_native(token):
            return knows_all and not self._feed.has_foreign
        return knows_all or not is_well_formed(token)

    async def _may_be_ours(self, token: Token) -> bool:
        """Whether a secret of this store's made a token, by all that there are now; or it may have
        been made elsewhere."""
        await self._know_secrets()
        if self._check_keys is None or self._check_keys.vouch(token):
            return True
        await self._witness.catch_up()
        if not is_native(token):
            return self._feed.has_foreign
        await self._know_secrets()
        return self._check_keys.vouch(token)

    async def _know_secrets(self) -> None:
        """Read the store's secrets again if they have changed, as far as this process knows."""
        self._witness.is_current()  # brings the feed up to date where that takes no waiting
        for _ in range(_ATTEMPTS):
            if self._feed.accepts(VAULT, VAULT, self._secrets_as_of):
                return
            await self._reading.join("secrets", self._read_secrets)
        raise StoreUnavailable("the store's secrets changed again and again", "who rotates them?")

    async def _read_secrets(self) -> None:
        secrets = await self.store.secrets()
        if self._check_keys is not None:
            self._check_keys.learn(secrets.check_keys)
        if self._l2 is not None:
            self._l2.learn(secrets.peppers)
        if self._bell is not None:
            self._bell.seal.learn(secrets.peppers)
        self._secrets_as_of = secrets.as_of  # last: whoever finds it finds them as well

    def _judge(
        self, known: Entry | Absence, token: Token, wanted: Wanted, tier: str
    ) -> Verdict | None:
        """The verdict by what is known, or None if that is stale. The feed must be current."""
        if isinstance(known, Absence):
            return self._judge_absence(known, wanted, tier)
        entry = known
        if not self._renewed(entry):
            return None
        if entry.fingerprint != token.fingerprint:
            # Of made-up tokens nothing is counted: else whoever knows an id could write there.
            if self._check_keys is not None and self._check_keys.vouch(token):
                self._count_refusal(entry.key_id, Reason.WRONG_SECRET, wanted)
            return self._decided(Deny(Reason.WRONG_SECRET), tier)
        return self._settle(entry, self._witness.now_ms(), tier, wanted)

    def _settle(self, entry: Entry, now_ms: float, tier: str, wanted: Wanted) -> Verdict:
        """By the moment at which the entry was known to be true, also where that is later."""
        verdict = judge(entry.allow, now_ms, wanted)
        if isinstance(verdict, Deny):
            is_good = verdict.reason is Reason.INSUFFICIENT_SCOPE
            if is_good and not wanted.is_final:
                settle = partial(self._settle, entry, now_ms, tier)
                return Unsettled(verdict.reason, verdict.scope, settle=settle)
            self._count_refusal(entry.key_id, verdict.reason, wanted)
            if is_good and wanted.is_use:
                self._usage.touch(entry, now_ms)
        elif wanted.is_use:
            self._usage.note(entry, now_ms)
        return self._decided(verdict, tier)

    def _judge_absence(self, absence: Absence, wanted: Wanted, tier: str) -> Verdict | None:
        if self._feed.accepts(absence.key_id, absence.organization_id, absence.as_of):
            self._count_refusal(absence.key_id, absence.reason, wanted)
            return self._decided(Deny(absence.reason), tier)
        return None

    def _count_refusal(self, key_id: str, reason: Reason, wanted: Wanted) -> None:
        if wanted.is_use and reason is not Reason.UNKNOWN:  # that is nobody's
            self._usage.refuse(key_id, reason)

    async def _fetch(self, lookup: Lookup, token: Token) -> tuple[Entry | Absence, str]:
        known, tier = await lookup.fetch(token)
        if isinstance(known, Entry):
            self._l1.remember(known)
        else:
            self._l1.remember_absence(token.fingerprint, known)
        return known, tier

    def see(self, key_id: str, caller: Caller) -> None:
        """After an allow, where `sees_clients`: whence it came, for the key's usage."""
        self._usage.see(key_id, caller)

    @property
    def failures(self) -> FailureLog | None:
        """Where refused requests are logged; None: nowhere."""
        return self._aside.failures

    def now_ms(self) -> int:
        """The time that expiry is judged at: the store's, in milliseconds since the epoch."""
        return self._witness.now_ms()

    # Tokens that turned up somewhere

    async def reach(self) -> None:
        """Return if the store is there. Costs nothing while it was heard of lately: for whoever may
        be asked by strangers.

        Raises:
            StoreUnavailable: it is not.
        """
        await self.started()
        await self._witness.catch_up()
        await self._know_secrets()  # `may_know` asks nobody

    def may_know(self, token: Token) -> bool:
        """Whether the store could have a token's key, as far as that can be told without asking it:
        by the keyed check, or because it has keys that were made elsewhere. That proves no key."""
        return self._check_keys is not None and not self._is_forged(self._check_keys, token)

    async def identify(self, token: Token) -> Owner | None:
        """The key whose secret this token is, whatever has become of it since; None: there is none.

        It asks the store and its hashes, no cache, and nobody has called: no use is noted.

        Raises:
            StoreUnavailable, HashingBusy, HashingFailed: it cannot be found out now.
        """
        lookup = await self.started()
        return await lookup.identify(token) if await self._may_be_ours(token) else None

    # Open connections

    def watching(
        self, values: Sequence[bytes], wanted: Wanted = ANY_KEY
    ) -> AbstractContextManager[asyncio.Event]:
        """After an allow: an event that is set once the same check would refuse, because the key
        was revoked, changed, or has expired. An outage ends nothing.
        """
        token = self._read(values)
        if isinstance(token, Reason):  # let in by something else than a key
            return nullcontext(asyncio.Event())
        return self._watch.over(token, wanted)

    async def _is_good(self, token: Token, wanted: Wanted) -> bool:
        wanted = replace(wanted, is_use=False)  # nobody called
        entry = self._l1.proven(token.fingerprint)
        if entry is not None and self._renewed(entry):
            verdict = judge(entry.allow, self._witness.now_ms(), wanted)
        else:
            verdict = await self.resolve(token, wanted)
        undecided = (Reason.UNAVAILABLE, Reason.BUSY)
        return isinstance(verdict, Allow) or verdict.reason in undecided


def _tier_of(known: Entry | Absence | None) -> str:
    return L1 if isinstance(known, Entry) else ABSENCE
