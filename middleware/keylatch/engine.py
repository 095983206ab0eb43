"""An engine: what `Checks` use, opened and closed, and what goes on beside them.

An engine belongs to one event loop and, after a fork, starts over as if it were new. Nothing is
opened before `start` or the first `resolve`.
"""

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from keylatch.caches.breaker import Breaker, connect
from keylatch.caches.cache import Absence, Cache, Entry
from keylatch.caches.flights import Flights
from keylatch.caches.shared_cache import SharedCache
from keylatch.checks import Aside, Checks
from keylatch.errors import KeylatchError, StoreUnavailable
from keylatch.hashing import Hasher
from keylatch.jobs import Jobs
from keylatch.keyring import Keyring
from keylatch.lookup import Lookup
from keylatch.model import KeyRecord
from keylatch.revocation.bell import Bell, RedisBell, StoreBell
from keylatch.revocation.counter import Counter
from keylatch.revocation.feed import Feed, Receipt, Witness
from keylatch.revocation.lease import Lease, boottime
from keylatch.revocation.news import News, Seal
from keylatch.revocation.second_look import SecondLook
from keylatch.revocation.watch import Watch
from keylatch.settings import Settings
from keylatch.store import Found, Secrets, Store
from keylatch.telemetry.condition import Condition, Part
from keylatch.telemetry.failures import FailureLog
from keylatch.telemetry.meter import TIMED, Meter
from keylatch.tokens import CheckKeys
from keylatch.usage.tally import Tally
from keylatch.usage.uses import Usage
from keylatch.vault import Vault

if TYPE_CHECKING:
    from keylatch.telemetry.tracing import Tracing

_RETRY_START_SECONDS: Final = 0.1
_TIDY_SECONDS: Final = 30.0
_CALM_SECONDS: Final = 5.0

log = logging.getLogger("keylatch")


def _its_waiters_have_it(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # nobody may be left to wait


class Engine(Checks):
    """Resolves tokens for one process: opens and closes what `Checks` use, and runs what goes on
    beside them.

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
        self.store = store or Store(settings.store, outside=settings.outside_peppers)
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
        self._flights: Flights[tuple[Entry | Absence, str]] = Flights()
        self._usage = Usage(self._store_uses, now_ms=self.now_ms)
        self.sees_clients = settings.clients == "on"
        """Whether adapters say whence a key that was let in was used: see `see`."""
        self._aside = Aside(
            SecondLook(
                self.store,
                lambda secret: self._l1.entry(secret),
                self.now_ms,
                settings.lease * 1000 if self.store.is_shared else 0.0,
                lambda: self.meter.late.add(),
            ),
            Condition(
                "checks are refused with 503",
                "checks are decided again",
                calm_seconds=_CALM_SECONDS,
                clock=clock,
            ),
            _tracing() if settings.tracing == "on" else None,
            FailureLog(timer) if settings.log_failures == "on" else None,
        )
        self._inherited: list[object] = []
        self._count_anew()
        self._begin_anew()
        _survive_forks(self)

    def _count_anew(self) -> None:
        self.meter = Meter()
        if self._aside.tracing is not None:
            self.meter.span = self._aside.tracing.stage
        self._time_some()

    def _time_some(self) -> None:
        """Time the hits that come next. Until they have been, nothing has as many `_fields` as
        pass without a clock: so that the others pay for one comparison that they make anyway."""
        self.meter.to_time, self._fields = TIMED, -1

    def _begin_anew(self) -> None:
        self._check_keys: CheckKeys | None = None
        self._secrets_as_of = 0
        self._reading: Flights[None] = Flights()
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
        for warning in (*self.store.warnings, *self.settings.warnings):
            log.warning(warning)
        self._open_redis(secrets)
        self._aside.second_look.begin(self._feed.seq, self._feed.epoch)
        self._lookup = Lookup(
            self.store,
            self._l2,
            self.hasher,
            self._feed,
            self._witness,
            self._environment,
            self._jobs.later,
            self.meter,
        )
        check_keys = CheckKeys(secrets.check_keys)
        self._keyring = Keyring(
            self.store, self.hasher, check_keys, self.settings, self.now_ms, self._announce
        )
        self._secrets_as_of = secrets.as_of
        self._check_keys = check_keys  # last: from here on the engine counts as started
        for work in (self._usage.run(), self._tidy(), self._witness.run(), self._watch.run()):
            self._jobs.loop(work)
        if isinstance(self._witness, Lease):
            self._bell = self._bell or StoreBell(self.store, Seal(secrets.peppers))
            self._jobs.loop(self._bell.listen(self._witness.hear))

    def _open_redis(self, secrets: Secrets) -> None:
        if self._redis is None and not self.settings.redis:
            return
        breaker = Breaker(self._timer, self._clock)
        client = self._redis or connect(self.settings.redis)
        self._l2 = SharedCache(client, secrets.peppers, breaker)
        if self.store.is_shared:
            listener = self._redis or connect(self.settings.redis, socket_timeout=None)
            channel = f"keylatch:{self._feed.epoch}:bell"
            self._bell = RedisBell(client, listener, breaker, channel, Seal(secrets.peppers))

    async def stop(self) -> None:
        """Flush what was used, stop the background tasks, close what was opened."""
        await self._jobs.end()
        self._flush_failures()
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
        if self._aside.failures is not None:
            self._aside.failures.forget()
        self._count_anew()
        self._begin_anew()

    async def ready(self) -> None:
        """Return if a key could be checked now.

        Raises:
            KeylatchError: why not.
        """
        await self.keyring()
        await self.store.ping()

    def parts(self) -> list[Part]:
        """How the parts are, as far as is known without asking any of them. Of these, only `store`
        and `lease` are needed to decide on keys."""
        shared, lease = self._l2, self._witness.part()
        if self._check_keys is None and self.store.condition.is_well:
            lease = Part("lease", "off")  # not started, and nobody has asked for that
        redis = Part("redis", "off")
        if shared is not None:
            redis = shared.breaker.condition.part("redis", "degraded", "Redis does not answer")
        return [
            self.store.condition.part("store", "unavailable", "the store does not answer"),
            lease,
            redis,
            self.hasher.condition.part("hashing", "degraded", "too many hashes are waiting"),
            self._usage.condition.part("usage", "degraded", "uses wait for the store"),
        ]

    async def started(self) -> Lookup:
        if self._lookup is None and self._timer() >= self._start_again_at:
            await self.start()
        if self._lookup is None:
            raise _not_opened()
        return self._lookup

    async def keyring(self) -> Keyring:
        """What management calls.

        Raises:
            StoreUnavailable: the store could not be opened yet.
        """
        await self.start()
        if self._keyring is None:
            raise _not_opened()
        await self._know_secrets()  # what is made now is made with the newest
        return self._keyring

    async def vault(self) -> Vault:
        """What rotates the store's own secrets.

        Raises:
            StoreUnavailable: the store could not be opened yet.
        """
        await self.keyring()
        return Vault(self.store, self._witness.settle, self._clock)

    # Changes, and the background

    async def _announce(self, record: KeyRecord | None, seq: int, wait: bool) -> Receipt:
        """A change is committed: tell whom it concerns, and wait until all decide by it."""
        began = time.perf_counter()
        if self._l2 is not None and record is not None:
            await self._l2.bury(record.id, self._feed.epoch)
        receipt = await self._witness.settle(seq, wait=wait)
        if wait:
            self.meter.settled.observe(time.perf_counter() - began)
        return receipt

    async def _store_uses(self, uses: Mapping[str, int], tally: Tally) -> None:
        await self.store.touch(uses, tally)
        await self._aside.second_look.look(uses)
        self._time_some()

    async def _ring(self, news: News | None) -> None:
        if self._bell is not None:
            await self._bell.ring(news)

    def _restored(self, touched: list[str]) -> None:
        self.meter.restores.add()
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
            self._flush_failures()
            try:
                await self._witness.catch_up()
                await self._know_secrets()
                await self.store.tidy(self._now_ms())
            except KeylatchError as error:
                log.warning("housekeeping failed: %s", error.message)

    def _flush_failures(self) -> None:
        if self._aside.failures is not None:
            self._aside.failures.flush()

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _tracing() -> "Tracing":
    from keylatch.telemetry.tracing import Tracing  # an extra

    return Tracing()


def _not_opened() -> StoreUnavailable:
    return StoreUnavailable("the store could not be opened yet", "see the log")


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
