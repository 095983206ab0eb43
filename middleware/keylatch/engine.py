"""An engine: what `Authenticator` uses, opened and closed, and what goes on beside them.

An engine belongs to one event loop and, after a fork, starts over as if it were new. Nothing is
opened before `start` or the first `check`.
"""

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from keylatch._background import EngineTasks
from keylatch.authentication.authenticator import Authenticator, Diagnostics
from keylatch.authentication.hashing import Hasher
from keylatch.authentication.lookup import Lookup
from keylatch.caches.local_cache import Entry, LocalCache, NegativeEntry
from keylatch.caches.redis_client import CircuitBreaker, connect
from keylatch.caches.shared_cache import SharedCache
from keylatch.caches.single_flight import SingleFlight
from keylatch.core.decisions import KeyRecord
from keylatch.core.tokens import MacKeys
from keylatch.errors import KeylatchError, StoreUnavailable
from keylatch.management.keyring import Keyring
from keylatch.management.store_secrets import StoreSecrets
from keylatch.revocation.invalidations import Freshness, Invalidations, Receipt
from keylatch.revocation.lease import Lease, boottime
from keylatch.revocation.monitor import RevocationMonitor
from keylatch.revocation.notices import Notice, Signer
from keylatch.revocation.notifier import Notifier, RedisNotifier, StoreNotifier
from keylatch.revocation.open_connections import OpenConnections
from keylatch.revocation.sequence import SequenceFreshness
from keylatch.settings import Settings
from keylatch.storage.store import Found, Secrets, Store
from keylatch.storage.usage import UsageBatch
from keylatch.telemetry.counters import TIMED_HITS, Counters
from keylatch.telemetry.failure_log import FailureLog
from keylatch.telemetry.health import ComponentHealth, Health
from keylatch.usage.recorder import UsageRecorder

if TYPE_CHECKING:
    from keylatch.telemetry.tracing import Tracing

_RETRY_START_SECONDS: Final = 0.1
_MAINTENANCE_SECONDS: Final = 30.0
_RECOVERY_SECONDS: Final = 5.0

log = logging.getLogger("keylatch")


def _retrieve_exception(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # nobody may be left to wait


class Engine(Authenticator):
    """Resolves tokens for one process: opens and closes what `Authenticator` uses, and runs
    the background tasks.

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
        self.store = store or Store(settings.store, external_peppers=settings.file_peppers)
        self.hasher = hasher or Hasher(settings.hasher)
        self._clock = clock
        self._timer = timer
        self._redis = redis
        self._environment = settings.environment or None
        self._l1 = LocalCache(timer=timer)
        self._open_connections = OpenConnections(
            lambda: self._freshness.is_fresh(), self._is_still_allowed, settings.lease / 4
        )
        self._invalidations = Invalidations(self._on_restore, self._open_connections.on_change)
        self._freshness: Freshness = SequenceFreshness(self.store, self._invalidations, clock)
        if self.store.is_shared:
            self._freshness = Lease(
                self.store, self._invalidations, settings.lease, self._publish, clock, timer
            )
        self._single_flight: SingleFlight[tuple[Entry | NegativeEntry, str]] = SingleFlight()
        self._usage = UsageRecorder(self._store_usage, now_ms=self.now_ms)
        self.records_clients = settings.clients == "on"
        """Whether adapters say whence a key that was let in was used: see `see`."""
        self._diagnostics = Diagnostics(
            RevocationMonitor(
                self.store,
                lambda secret: self._l1.by_secret_id(secret),
                self.now_ms,
                settings.lease * 1000 if self.store.is_shared else 0.0,
                lambda: self.counters.accepted_after_revocation.add(),
            ),
            Health(
                "checks are refused with 503",
                "checks are answered again",
                recovery_seconds=_RECOVERY_SECONDS,
                clock=clock,
            ),
            _tracing() if settings.tracing == "on" else None,
            FailureLog(timer) if settings.log_failures == "on" else None,
        )
        self._inherited: list[object] = []
        self._reset_counters()
        self._reset_state()
        _register_fork_hooks(self)

    def _reset_counters(self) -> None:
        self.counters = Counters()
        if self._diagnostics.tracing is not None:
            self.counters.span = self._diagnostics.tracing.stage
        self._sample_timings()

    def _sample_timings(self) -> None:
        """Time the hits that come next. Until then no request has that many values, so none can
        pass without a clock: so that the others pay for one comparison that they make anyway."""
        self.counters.hits_to_time, self._fast_field_count = TIMED_HITS, -1

    def _reset_state(self) -> None:
        self._mac_keys: MacKeys | None = None
        self._secrets_as_of = 0
        self._secrets_single_flight: SingleFlight[None] = SingleFlight()
        self._keyring: Keyring | None = None
        self._lookup: Lookup | None = None
        self._l2: SharedCache | None = None
        self._notifier: Notifier | None = None
        self._start_task: asyncio.Task[None] | None = None
        self._retry_start_at = 0.0
        self._has_logged_failure = False
        self._tasks = EngineTasks()

    # Lifecycle

    async def start(self) -> None:
        """Open the store (setting up an empty one) and start the background tasks.

        Whoever calls while a start is under way waits for it. A store that cannot be reached is
        logged once and tried again by later requests, every tenth of a second at most: an app
        whose database is late still starts, and answers 503 until then.

        Raises:
            StoreIncompatible: the store was made by a newer keylatch.
        """
        if self._mac_keys is not None:
            return
        if self._start_task is None:
            self._start_task = asyncio.create_task(self._start(), name="keylatch-start")
            self._start_task.add_done_callback(_retrieve_exception)
        try:
            await asyncio.shield(self._start_task)
        except StoreUnavailable as error:
            if not self._has_logged_failure:
                log.error("error: %s", error.message)
                log.error("hint: %s", error.hint)
            self._has_logged_failure = True

    async def _start(self) -> None:
        try:
            secrets = await self.store.open(self._now_ms())
            await self._freshness.begin()
        except KeylatchError:
            self._retry_start_at = self._timer() + _RETRY_START_SECONDS
            raise
        finally:
            self._start_task = None
        for warning in (*self.store.warnings, *self.settings.warnings):
            log.warning(warning)
        self._open_redis(secrets)
        self._diagnostics.revocation_monitor.begin(
            self._invalidations.seq, self._invalidations.epoch
        )
        self._lookup = Lookup(
            self.store,
            self._l2,
            self.hasher,
            self._invalidations,
            self._freshness,
            self._environment,
            self._tasks.start_soon,
            self.counters,
        )
        mac_keys = MacKeys(secrets.mac_keys)
        self._keyring = Keyring(
            self.store, self.hasher, mac_keys, self.settings, self.now_ms, self._propagate
        )
        self._secrets_as_of = secrets.as_of
        self._mac_keys = mac_keys  # last: from here on the engine counts as started
        for coroutine in (
            self._usage.run(),
            self._run_maintenance(),
            self._freshness.run(),
            self._open_connections.run(),
        ):
            self._tasks.start_loop(coroutine)
        if isinstance(self._freshness, Lease):
            self._notifier = self._notifier or StoreNotifier(self.store, Signer(secrets.peppers))
            self._tasks.start_loop(self._notifier.subscribe(self._freshness.on_notice))

    def _open_redis(self, secrets: Secrets) -> None:
        if self._redis is None and not self.settings.redis:
            return
        breaker = CircuitBreaker(self._timer, self._clock)
        client = self._redis or connect(self.settings.redis)
        self._l2 = SharedCache(client, secrets.peppers, breaker)
        if self.store.is_shared:
            listener = self._redis or connect(self.settings.redis, socket_timeout=None)
            channel = f"keylatch:{self._invalidations.epoch}:invalidations"
            self._notifier = RedisNotifier(
                client, listener, breaker, channel, Signer(secrets.peppers)
            )

    async def stop(self) -> None:
        """Flush what was used, stop the background tasks, close what was opened."""
        await self._tasks.stop()
        self._flush_failures()
        if self._mac_keys is not None:
            await self._usage.flush()
            await self._freshness.end()
        if self._notifier is not None:
            await self._notifier.close()
        if self._l2 is not None:
            await self._l2.close()
        self.hasher.close()
        await self.store.close()
        self._l1.clear()
        self._invalidations.clear()
        self._freshness.clear()
        self._reset_state()

    def after_fork_in_child(self) -> None:
        """After a fork: nothing of the parent's is used, and nothing of it is closed."""
        self._inherited += [self._l2, self._notifier, self._tasks]
        self.store.after_fork_in_child()
        self.hasher.after_fork_in_child()
        self._l1.after_fork_in_child()
        self._invalidations.clear()
        self._freshness.clear()
        self._single_flight.after_fork_in_child()
        self._usage.after_fork_in_child()
        self._open_connections.after_fork_in_child()
        if self._diagnostics.failures is not None:
            self._diagnostics.failures.after_fork_in_child()
        self._reset_counters()
        self._reset_state()

    async def ready(self) -> None:
        """Return if a key could be checked now.

        Raises:
            KeylatchError: why not.
        """
        await self.keyring()
        await self.store.ping()

    def components(self) -> list[ComponentHealth]:
        """How the parts are, as far as is known without asking any of them. Of these, only `store`
        and `lease` are needed to decide on keys."""
        shared_cache, lease = self._l2, self._freshness.component_health()
        if self._mac_keys is None and self.store.health.is_healthy:
            lease = ComponentHealth("lease", "off")  # not started, and nobody has asked for that
        redis = ComponentHealth("redis", "off")
        if shared_cache is not None:
            redis = shared_cache.breaker.health.component_health(
                "redis", "degraded", "Redis does not answer"
            )
        return [
            self.store.health.component_health("store", "unavailable", "the store does not answer"),
            lease,
            redis,
            self.hasher.health.component_health(
                "hashing", "degraded", "too many hashes are waiting"
            ),
            self._usage.health.component_health(
                "usage", "degraded", "usage counts wait for the store"
            ),
        ]

    async def ensure_started(self) -> Lookup:
        if self._lookup is None and self._timer() >= self._retry_start_at:
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
        await self._refresh_secrets()  # what is made now is made with the newest
        return self._keyring

    async def store_secrets(self) -> StoreSecrets:
        """What rotates the store's own secrets.

        Raises:
            StoreUnavailable: the store could not be opened yet.
        """
        await self.keyring()
        return StoreSecrets(self.store, self._freshness.wait_until_acknowledged, self._clock)

    # Changes, and the background

    async def _propagate(self, record: KeyRecord | None, seq: int, wait: bool) -> Receipt:
        """A change is committed: tell whom it concerns, and wait until all decide by it."""
        began = time.perf_counter()
        if self._l2 is not None and record is not None:
            await self._l2.invalidate(record.id, self._invalidations.epoch)
        receipt = await self._freshness.wait_until_acknowledged(seq, wait=wait)
        if wait:
            self.counters.propagation.observe(time.perf_counter() - began)
        return receipt

    async def _store_usage(self, last_used: Mapping[str, int], batch: UsageBatch) -> None:
        await self.store.usage.record(last_used, batch)
        await self._diagnostics.revocation_monitor.check(last_used)
        self._sample_timings()

    async def _publish(self, notice: Notice | None) -> None:
        if self._notifier is not None:
            await self._notifier.publish(notice)

    def _on_restore(self, key_ids: list[str]) -> None:
        self.counters.restores.add()
        self._l1.clear()
        self._tasks.start_soon(
            self._handle_restore(key_ids, self._invalidations.epoch, self._invalidations.seq)
        )

    async def _handle_restore(self, key_ids: list[str], epoch: str, seq: int) -> None:
        await self.store.invalidations.start_new_epoch(epoch, seq, self._now_ms())
        for key_id in key_ids:
            found = await self.store.keys.find(key_id)
            if isinstance(found, Found) and found.record.deleted_at is None:
                log.critical(
                    "%s has the state of the restored backup: a later change to it was lost", key_id
                )

    async def _run_maintenance(self) -> None:
        while True:
            await asyncio.sleep(_MAINTENANCE_SECONDS)
            self._flush_failures()
            try:
                await self._freshness.revalidate()
                await self._refresh_secrets()
                await self.store.run_maintenance(self._now_ms())
            except KeylatchError as error:
                log.warning("maintenance failed: %s", error.message)

    def _flush_failures(self) -> None:
        if self._diagnostics.failures is not None:
            self._diagnostics.failures.flush()

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _tracing() -> "Tracing":
    from keylatch.telemetry.tracing import Tracing  # an extra

    return Tracing()


def _not_opened() -> StoreUnavailable:
    return StoreUnavailable("the store could not be opened yet", "see the log")


def _register_fork_hooks(engine: Engine) -> None:
    """Servers fork workers from a process that may have opened a store already."""
    reference = weakref.ref(engine)

    def call(hook: Callable[[Engine], None]) -> None:
        alive = reference()
        if alive is not None:
            hook(alive)

    os.register_at_fork(
        before=lambda: call(lambda alive: alive.store.before_fork()),
        after_in_parent=lambda: call(lambda alive: alive.store.after_fork_in_parent()),
        after_in_child=lambda: call(Engine.after_fork_in_child),
    )
