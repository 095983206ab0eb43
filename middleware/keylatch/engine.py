"""The story of a credential: L1, then Redis, then the store, then argon2; judged by one rule.

`peek` answers from this process alone, in one synchronous step, or says that it cannot (None).
`resolve` asks whoever has to be asked. An error anywhere on the way is `Reason.UNAVAILABLE` and
writes nothing to any cache: a database outage never shows as an invalid key.

An engine belongs to one event loop and, after a fork, starts over as if it were new. Nothing is
opened before `start` or the first `resolve`.
"""

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from keylatch import credentials
from keylatch.bell import Bell, RedisBell, StoreBell
from keylatch.breaker import Breaker, connect
from keylatch.cache import Absence, Cache, Entry
from keylatch.counter import Counter
from keylatch.errors import HashingBusy, KeylatchError, StoreUnavailable
from keylatch.feed import Feed, Receipt, Witness
from keylatch.flights import Flights
from keylatch.hashing import Hasher
from keylatch.jobs import Jobs
from keylatch.keyring import Keyring
from keylatch.lease import Lease, boottime
from keylatch.lookup import Lookup
from keylatch.model import ANY_KEY, Allow, Deny, KeyRecord, Reason, Verdict, Wanted, judge
from keylatch.news import News, Seal
from keylatch.settings import Settings
from keylatch.shared_cache import SharedCache
from keylatch.store import Found, Secrets, Store
from keylatch.tokens import CheckKeys, Token, fingerprint
from keylatch.usage import Usage
from keylatch.watch import Watch

_ATTEMPTS: Final = 3
_RETRY_START_SECONDS: Final = 0.1
_TIDY_SECONDS: Final = 30.0

log = logging.getLogger("keylatch")


def _its_waiters_have_it(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # nobody may be left to wait


class Engine:
    """Resolves tokens for one process.

    Args:
        settings: see `Settings.load`.
        clock: seconds since the Unix epoch.
        timer: seconds that never go back.
        store: one to use instead of opening `settings.store`.
        hasher: one to use instead of what the settings name.
        redis: a client to use instead of connecting to `settings.redis`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = boottime,
        store: Store | None = None,
        hasher: Hasher | None = None,
        redis: Any = None,
    ) -> None:
        self.settings = settings
        self.store = store or Store(settings.store)
        self.hasher = hasher or Hasher(settings.hasher)
        self._clock = clock
        self._timer = timer
        self._redis = redis
        self._environment = settings.environment or None
        self._l1 = Cache(timer=timer)
        self._watch = Watch(lambda: self._witness.is_current(), self._is_good, settings.lease / 4)
        self._feed = Feed(self._restored, self._watch.hear)
        self._witness: Witness = Counter(self.store, self._feed, clock)
        if self.store.is_shared:
            self._witness = Lease(self.store, self._feed, settings.lease, self._ring, clock, timer)
        self._flights: Flights[Entry | Absence] = Flights()
        self._usage = Usage(self.store.touch)
        self._inherited: list[object] = []
        self._begin_anew()
        _survive_forks(self)

    def _begin_anew(self) -> None:
        self._check_keys: CheckKeys | None = None
        self._keyring: Keyring | None = None
        self._lookup: Lookup | None = None
        self._l2: SharedCache | None = None
        self._bell: Bell | None = None
        self._starting: asyncio.Task[None] | None = None
        self._start_again_at = 0.0
        self._told_why = False
        self._jobs = Jobs()

    # Lifecycle

    async def start(self) -> None:
        """Open the store (setting up an empty one) and start the background tasks.

        Whoever calls while a start is under way waits for it. A store that cannot be reached is
        logged once and tried again by later requests, every tenth of a second at most: an app
        whose database is late still starts, and answers 503 until then.

        Raises:
            StoreIncompatible: the store was made by a newer keylatch.
        """
        if self._check_keys is not None:
            return
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(), name="keylatch-start")
            self._starting.add_done_callback(_its_waiters_have_it)
        try:
            await asyncio.shield(self._starting)
        except StoreUnavailable as error:
            if not self._told_why:
                log.error("error: %s", error.message)
                log.error("hint: %s", error.hint)
            self._told_why = True

    async def _start(self) -> None:
        try:
            secrets = await self.store.open(self._now_ms())
            await self._witness.begin()
        except KeylatchError:
            self._start_again_at = self._timer() + _RETRY_START_SECONDS
            raise
        finally:
            self._starting = None
        for warning in self.store.warnings:
            log.warning(warning)
        self._open_redis(secrets)
        self._lookup = Lookup(
            self.store,
            self._l2,
            self.hasher,
            self._feed,
            self._witness,
            self._environment,
            self._jobs.later,
        )
        check_keys = CheckKeys(secrets.check_keys)
        self._keyring = Keyring(
            self.store, self.hasher, check_keys, self.settings, self._clock, self._announce
        )
        self._check_keys = check_keys  # last: from here on the engine counts as started
        for work in (self._usage.run(), self._tidy(), self._witness.run(), self._watch.run()):
            self._jobs.loop(work)
        if isinstance(self._witness, Lease):
            self._bell = self._bell or StoreBell(self.store, Seal(secrets.peppers))
            self._jobs.loop(self._bell.listen(self._witness.hear))

    def _open_redis(self, secrets: Secrets) -> None:
        if self._redis is None and not self.settings.redis:
            return
        breaker = Breaker(self._timer)
        client = self._redis or connect(self.settings.redis)
        self._l2 = SharedCache(client, secrets.peppers, breaker)
        if self.store.is_shared:
            listener = self._redis or connect(self.settings.redis, socket_timeout=None)
            channel = f"keylatch:{self._feed.epoch}:bell"
            self._bell = RedisBell(client, listener, breaker, channel, Seal(secrets.peppers))

    async def stop(self) -> None:
        """Flush what was used, stop the background tasks, close what was opened."""
        await self._jobs.end()
        if self._check_keys is not None:
            await self._usage.flush()
            await self._witness.end()
        if self._bell is not None:
            await self._bell.close()
        if self._l2 is not None:
            await self._l2.close()
        self.hasher.close()
        await self.store.close()
        self._l1.clear()
        self._feed.forget()
        self._witness.forget()
        self._begin_anew()

    def forget(self) -> None:
        """After a fork: nothing of the parent's is used, and nothing of it is closed."""
        self._inherited += [self._l2, self._bell, self._jobs]
        self.store.forget()
        self.hasher.forget()
        self._l1.forget()
        self._feed.forget()
        self._witness.forget()
        self._flights.forget()
        self._usage.forget()
        self._watch.forget()
        self._begin_anew()

    async def ready(self) -> None:
        """Return if a key could be checked now.

        Raises:
            KeylatchError: why not.
        """
        await self.keyring()
        await self.store.ping()

    async def keyring(self) -> Keyring:
        """What management calls.

        Raises:
            StoreUnavailable: the store could not be opened yet.
        """
        await self.start()
        if self._keyring is None:
            raise StoreUnavailable("the store could not be opened yet", "see the log")
        return self._keyring

    # Checks

    async def check(self, values: Sequence[bytes], wanted: Wanted = ANY_KEY) -> Verdict:
        """Judge a request by the values of its `Authorization` fields.

        A hit in this process is answered without suspending: no hop, no waiting.
        """
        known = self.glance(values, wanted)
        return await self.resolve(known, wanted) if isinstance(known, Token) else known

    def glance(self, values: Sequence[bytes], wanted: Wanted = ANY_KEY) -> Verdict | Token:
        """`check` without waiting, from any thread; the token where that does not suffice."""
        if len(values) == 1:
            allow = self._recognised(values[0], wanted)
            if allow is not None:
                return allow
        token = credentials.read(values)
        if isinstance(token, Reason):
            return Deny(token)
        return self.peek(token, wanted) or token

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
        self._usage.note(entry, now_ms)
        return allow

    def _renewed(self, entry: Entry) -> bool:
        """Whether an entry says the truth by what the feed has learned since it was last asked."""
        state = self._feed.state  # before it is asked: it may learn more meanwhile
        accepted = self._feed.accepts(entry.key_id, entry.organization_id, entry.as_of)
        if accepted:
            entry.state = state
        return accepted

    def peek(self, token: Token, wanted: Wanted = ANY_KEY) -> Verdict | None:
        """Judge a token by what this process knows; None where that does not suffice.

        A stranger's token is refused here, with no call to Redis, the store or argon2.
        """
        if self._check_keys is None:
            return None
        entry = self._l1.entry(token.key_id)
        if entry is None:
            absence = self._l1.absence(token.fingerprint)
            if absence is None:
                return None if self._check_keys.vouch(token) else Deny(Reason.FORGED)
            return self._judge_absence(absence) if self._witness.is_current() else None
        if not self._witness.is_current():
            return None
        return self._judge(entry, token, wanted)

    async def resolve(self, token: Token, wanted: Wanted = ANY_KEY) -> Verdict:
        """Judge a token, asking Redis, the store and argon2 as far as that is needed."""
        try:
            return await self._resolve(token, wanted)
        except HashingBusy as error:
            log.warning("refused with 503: %s", error.message)
            return Deny(Reason.BUSY)
        except KeylatchError as error:
            log.warning("refused with 503: %s", error.message)
            return Deny(Reason.UNAVAILABLE)

    async def _resolve(self, token: Token, wanted: Wanted) -> Verdict:
        if self._lookup is None:
            if self._timer() < self._start_again_at:
                return Deny(Reason.UNAVAILABLE)
            await self.start()
        lookup = self._lookup
        if lookup is None:
            return Deny(Reason.UNAVAILABLE)
        verdict = self.peek(token, wanted)
        if verdict is not None:
            return verdict
        known = self._l1.entry(token.key_id) or self._l1.absence(token.fingerprint)
        for _ in range(_ATTEMPTS):
            if known is None:
                known = await self._flights.join(
                    token.fingerprint, lambda: self._fetch(lookup, token)
                )
            # What was fetched is judged like what was cached: the flight may have left before
            # this request came.
            await self._witness.catch_up()
            if isinstance(known, Entry):
                verdict = self._judge(known, token, wanted)
            else:
                verdict = self._judge_absence(known)
            if verdict is not None:
                return verdict
            known = None
        log.warning("a key changed again and again while it was looked up")
        return Deny(Reason.UNAVAILABLE)

    def _judge(self, entry: Entry, token: Token, wanted: Wanted) -> Verdict | None:
        """The verdict by an entry, or None if it is stale. The feed must be current."""
        if not self._renewed(entry):
            return None
        if entry.fingerprint != token.fingerprint:
            return Deny(Reason.WRONG_SECRET)
        now_ms = self._witness.now_ms()
        verdict = judge(entry.allow, now_ms, wanted)
        if isinstance(verdict, Allow) or verdict.reason is Reason.INSUFFICIENT_SCOPE:
            self._usage.note(entry, now_ms)
        return verdict

    def _judge_absence(self, absence: Absence) -> Verdict | None:
        if self._feed.accepts(absence.key_id, absence.organization_id, absence.as_of):
            return Deny(absence.reason)
        return None

    async def _fetch(self, lookup: Lookup, token: Token) -> Entry | Absence:
        known = await lookup.fetch(token)
        if isinstance(known, Entry):
            self._l1.remember(known)
        else:
            self._l1.remember_absence(token.fingerprint, known)
        return known

    def now_ms(self) -> int:
        """The time that expiry is judged at: the store's, in milliseconds since the epoch."""
        return self._witness.now_ms()

    # Open connections

    def watching(
        self, values: Sequence[bytes], wanted: Wanted = ANY_KEY
    ) -> AbstractContextManager[asyncio.Event]:
        """After an allow: an event that is set once the same check would refuse, because the key
        was revoked, changed, or has expired. An outage ends nothing.
        """
        token = credentials.read(values)
        if isinstance(token, Reason):  # let in by something else than a key
            return nullcontext(asyncio.Event())
        return self._watch.over(token, wanted)

    async def _is_good(self, token: Token, wanted: Wanted) -> bool:
        entry = self._l1.entry(token.key_id)
        if entry is not None and self._renewed(entry):
            verdict = judge(entry.allow, self._witness.now_ms(), wanted)  # nobody called: no use
        else:
            verdict = await self.resolve(token, wanted)
        undecided = (Reason.UNAVAILABLE, Reason.BUSY)
        return isinstance(verdict, Allow) or verdict.reason in undecided

    # Changes, and the background

    async def _announce(self, record: KeyRecord | None, seq: int, wait: bool) -> Receipt:
        """A change is committed: tell whom it concerns, and wait until all decide by it."""
        if self._l2 is not None and record is not None:
            await self._l2.bury(record, seq, self._feed.epoch)
        return await self._witness.settle(seq, wait=wait)

    async def _ring(self, news: News | None) -> None:
        if self._bell is not None:
            await self._bell.ring(news)

    def _restored(self, touched: list[str]) -> None:
        self._l1.clear()
        self._jobs.later(self._after_restore(touched, self._feed.epoch, self._feed.seq))

    async def _after_restore(self, touched: list[str], epoch: str, seq: int) -> None:
        await self.store.renew(epoch, seq)
        for key_id in touched:
            found = await self.store.find(key_id)
            if isinstance(found, Found) and found.record.deleted_at is None:
                log.critical("%s had been changed since and is as it was before", key_id)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(_TIDY_SECONDS)
            try:
                await self.store.tidy(self._now_ms())
            except KeylatchError as error:
                log.warning("housekeeping failed: %s", error.message)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _survive_forks(engine: Engine) -> None:
    """Servers fork workers from a process that may have opened a store already."""
    reference = weakref.ref(engine)

    def tell(what: Callable[[Engine], None]) -> None:
        alive = reference()
        if alive is not None:
            what(alive)

    os.register_at_fork(
        before=lambda: tell(lambda alive: alive.store.before_fork()),
        after_in_parent=lambda: tell(lambda alive: alive.store.after_fork()),
        after_in_child=lambda: tell(Engine.forget),
    )
