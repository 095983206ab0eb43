"""An engine: owns, opens and closes everything that one process needs to decide on keys.

    async with Engine(Settings.load()) as engine:
        decision = await engine.authenticate([b"Bearer " + token])

An engine belongs to one event loop at a time, and starts over after a fork. Nothing is opened
before `start` or the first cache miss. `engine.authenticator` decides.
"""

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final

from keylatch._background import EngineTasks
from keylatch._stats import EngineStats, Stats
from keylatch.authentication.authenticator import Authenticator
from keylatch.authentication.hashing import Hasher
from keylatch.authentication.keyset import Keyset
from keylatch.authentication.lookup import Lookup
from keylatch.caches.local_cache import LocalCache
from keylatch.caches.redis_client import (
    CircuitBreaker,
    connect,
    connect_subscriber,
    name_in_redis,
)
from keylatch.caches.shared_cache import SharedCache
from keylatch.core.decisions import ANY_KEY, ClientGetter, Decision, Reason, Requirement
from keylatch.core.refusals import LogFailure
from keylatch.core.tokens import MacKeys
from keylatch.errors import KeylatchError, StoreUnavailable, WrongEventLoop
from keylatch.management.keyring import Keyring
from keylatch.management.store_secrets import StoreSecrets
from keylatch.revocation.freshness import Freshness
from keylatch.revocation.invalidations import Break, Invalidations
from keylatch.revocation.lease import Lease, boottime
from keylatch.revocation.lost_revocations import LostRevocations
from keylatch.revocation.monitor import RevocationMonitor
from keylatch.revocation.notices import Signer
from keylatch.revocation.notifier import Notifier, RedisNotifier, StoreNotifier
from keylatch.revocation.open_connections import OpenConnections
from keylatch.revocation.propagation import Propagation
from keylatch.revocation.sequence import SequenceFreshness
from keylatch.settings import Settings
from keylatch.storage.store import Secrets, Store
from keylatch.storage.usage import UsageBatch
from keylatch.telemetry import request_trace
from keylatch.telemetry.counters import Counters
from keylatch.telemetry.events import Events
from keylatch.telemetry.failure_log import FailureLog
from keylatch.telemetry.health import ComponentHealth, Health
from keylatch.usage.recorder import UsageRecorder

if TYPE_CHECKING:
    from keylatch.telemetry.tracing import Tracing

_RETRY_START_SECONDS: Final = 0.1
_MAINTENANCE_SECONDS: Final = 30.0
_RECOVERY_SECONDS: Final = 5.0
_READY_SECONDS: Final = 3.0

# What a start needs, as readiness shows it while that is missing.
_UNOPENED_STORE: Final = ComponentHealth(
    "store", "unavailable", reason="the store cannot be opened: the log has the reason"
)
_NO_LEASE: Final = ComponentHealth(
    "lease", "unavailable", reason="the store grants no lease: the log has the reason"
)

log = logging.getLogger("keylatch")


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a start opens and a stop closes."""

    lookup: Lookup
    keyring: Keyring
    propagation: Propagation
    lost_revocations: LostRevocations
    shared_cache: SharedCache | None
    notifier: Notifier | None


class Engine:
    """Everything that one process needs to decide on keys.

    Args:
        settings: see `Settings.load`.
        clock: seconds since the Unix epoch.
        timer: seconds that never go back and never stand still.
        store: used instead of `settings.store`.
        hasher: used instead of the one that the settings name.
        redis: a client that is used instead of connecting to `settings.redis`.

    Attributes:
        authenticator: decides on credentials.
        records_clients: whether adapters call `record_client`.
    """

    authenticator_class: ClassVar[type[Authenticator]] = Authenticator

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
        self.store = store or Store(
            settings.store,
            external_peppers=settings.file_peppers,
            direct_url=settings.store_direct,
            read_url=settings.store_read,
            durable=settings.durable,
        )
        self.hasher = hasher or Hasher(settings.hasher)
        self.counters = Counters()
        self.records_clients = settings.clients
        self._clock = clock
        self._timer = timer
        self._redis = redis
        self._l1 = LocalCache(timer=timer)
        self._open_connections = OpenConnections(settings.lease / 4)
        self._invalidations = Invalidations(self._on_break, self._open_connections)
        self._freshness: Freshness = SequenceFreshness(self.store, self._invalidations, clock)
        if self.store.is_shared:
            self._freshness = Lease(self.store, self._invalidations, settings.lease, clock, timer)
        self._keyset = Keyset(self.store, self._invalidations, self._freshness)
        self._usage = UsageRecorder(self._store_usage, now_ms=self._freshness.now_ms)
        self._revocation_monitor = RevocationMonitor(
            self.store,
            self._l1,
            self._freshness.now_ms,
            settings.lease * 1000 if self.store.is_shared else 0.0,
            self.counters,
        )
        self._stats = EngineStats(
            self.store,
            self.hasher,
            self._l1,
            self._invalidations,
            self._freshness,
            self._usage,
            self._open_connections,
            self.counters,
        )
        self._failures = FailureLog(timer) if settings.log_failures else None
        tracing = _tracing() if settings.tracing else None
        self._events = Events(
            self.counters.on_event,
            *([request_trace.on_event] if settings.traces_requests else []),
            span=nullcontext if tracing is None else tracing.stage,
        )
        self.authenticator = self.authenticator_class(
            self._l1,
            self._invalidations,
            self._freshness,
            self._keyset,
            self._usage,
            self.counters,
            self._events,
            _check_health(clock),
            tracing,
            self._started,
        )
        self._inherited: list[object] = []
        self._reset_state()
        _register_fork_hooks(self)

    def _reset_state(self) -> None:
        self._opened: _Opened | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._start_task: asyncio.Task[None] | None = None
        self._retry_start_at = 0.0
        self._failed_start: ComponentHealth | None = None
        self._tasks = EngineTasks()

    # Lifecycle

    async def __aenter__(self) -> "Engine":
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Open the store (setting up an empty one) and start the background tasks.

        A call during a start waits for that start. A store that cannot be reached is logged once,
        and later requests try again, at most every tenth of a second: an app whose database is late
        starts, and answers 503 until then. It is logged again when another component fails.

        Raises:
            StoreIncompatible: the store was made by a newer keylatch.
            WrongEventLoop: the engine is started on another event loop.
        """
        self._enter_event_loop()
        if self._opened is not None:
            return
        if self._start_task is None:
            self._start_task = asyncio.create_task(self._start(), name="keylatch-start")
            self._start_task.add_done_callback(_retrieve_exception)
        with suppress(StoreUnavailable):
            await asyncio.shield(self._start_task)

    async def _start(self) -> None:
        failed = _UNOPENED_STORE
        try:
            secrets = await self.store.open(self._now_ms())
            if self.store.is_shared:
                failed = _NO_LEASE
            await self._freshness.begin()
        except KeylatchError as error:
            self._retry_start_at = self._timer() + _RETRY_START_SECONDS
            if isinstance(error, StoreUnavailable):
                self._record_failed_start(failed, error)
            raise
        finally:
            self._start_task = None
        if self._failed_start is not None:
            log.warning("keylatch has started")
            self._failed_start = None
        for warning in (*self.store.warnings, *self.settings.warnings):
            log.warning(warning)
        self._revocation_monitor.begin(self._invalidations.position)
        self._opened = opened = self._open(secrets)
        for coroutine in (
            self._usage.run(),
            self._run_maintenance(),
            self._freshness.run(),
            opened.lost_revocations.run(),
            self._open_connections.run(self._freshness, self.authenticator),
        ):
            self._tasks.start_loop(coroutine)
        if isinstance(self._freshness, Lease) and opened.notifier is not None:
            self._tasks.start_loop(opened.notifier.subscribe(self._freshness.on_notice))
        self._tasks.stop_with_loop(self.stop)

    def _record_failed_start(self, failed: ComponentHealth, error: StoreUnavailable) -> None:
        if self._failed_start is None or self._failed_start.name != failed.name:
            log.error("error: %s", error.message)
            log.error("hint: %s", error.hint)
            self._failed_start = replace(failed, since=self._clock())

    def _open(self, secrets: Secrets) -> _Opened:
        mac_keys = MacKeys(secrets.mac_keys)
        lease = self._freshness if isinstance(self._freshness, Lease) else None
        signer = None if lease is None else Signer(secrets.peppers)
        shared_cache, notifier = self._open_redis(secrets, signer)
        if signer is not None and notifier is None:
            notifier = StoreNotifier(self.store, signer, self._clock)
        lookup = Lookup(
            self.store,
            shared_cache,
            self.hasher,
            self._invalidations,
            self._freshness,
            self.settings.environment or None,
            self._tasks,
            self._events,
        )
        propagation = Propagation(
            self.store,
            self._invalidations,
            self.counters.propagation,
            shared_cache=shared_cache,
            lease=lease,
            notifier=notifier,
            timer=self._timer,
        )
        now_ms = self._freshness.now_ms
        keyring = Keyring(self.store, self.hasher, mac_keys, self.settings, now_ms, propagation)
        pepper_users = [user for user in (shared_cache, signer) if user is not None]
        self._keyset.begin(secrets, mac_keys, pepper_users)
        lost_revocations = LostRevocations(
            self.store,
            self._invalidations,
            self._freshness,
            now_ms,
            partial(propagation.publish, wait=False),
        )
        return _Opened(lookup, keyring, propagation, lost_revocations, shared_cache, notifier)

    def _open_redis(
        self, secrets: Secrets, signer: Signer | None
    ) -> tuple[SharedCache | None, Notifier | None]:
        if self._redis is None and not self.settings.redis:
            return None, None
        breaker = CircuitBreaker(self._timer, self._clock)
        client = self._redis or connect(self.settings.redis, breaker)
        shared_cache = SharedCache(client, secrets.peppers, breaker)
        if signer is None:
            return shared_cache, None
        subscriber = self._redis or connect_subscriber(self.settings.redis, client)
        # Not the epoch: processes that start after a new one reach those from before it.
        channel = name_in_redis(self.store.invalidations.database_hash, "invalidations")
        notifier = RedisNotifier(client, subscriber, breaker, channel, signer, self._clock)
        return shared_cache, notifier

    async def stop(self) -> None:
        """Store the recorded uses, stop the background tasks, close what was opened. The engine can
        be started again, on any event loop."""
        if self._enter_event_loop():
            await self._store_abandoned_usage()
        await self._tasks.stop()
        self._flush_failures()
        opened = self._opened
        if opened is not None:
            await self._usage.flush()
            await self._freshness.end()
            if opened.notifier is not None:
                await opened.notifier.close()
            if opened.shared_cache is not None:
                await opened.shared_cache.close()
        self.hasher.close()
        await self.store.close()
        self._clear_caches()

    def _clear_caches(self) -> None:
        self._l1.clear()
        self._invalidations.clear()
        self._freshness.clear()
        self._keyset.clear()
        self._reset_state()

    def _enter_event_loop(self) -> bool:
        """Bind the engine to the running event loop; True if the previous one was closed without
        a stop.

        `asyncio.run` and its like cancel all tasks before they close their loop, and that stops the
        engine (`EngineTasks.stop_with_loop`). A loop that was closed otherwise cannot close
        connections any more: they are abandoned, as after a fork. The recorded uses are kept.
        """
        loop, previous = asyncio.get_running_loop(), self._event_loop
        if previous is not None and previous is not loop and not previous.is_closed():
            raise WrongEventLoop(
                "this engine is started on another event loop: create one Engine for each event "
                "loop, or await engine.stop() there first",
                "an ASGI app and a WSGI app in one process need an Engine each",
            )
        is_abandoned = previous is not None and previous is not loop
        if is_abandoned:
            log.warning("the event loop was closed before engine.stop(): the engine starts again")
            self.store.after_fork_in_child()
            self.authenticator.after_fork_in_child()
            self._open_connections.after_fork_in_child()
            self._clear_caches()
        self._event_loop = loop
        return is_abandoned

    async def _store_abandoned_usage(self) -> None:
        if self._usage.pending:
            await self.start()

    def after_fork_in_child(self) -> None:
        """In the child of a fork: use nothing of the parent's, and close nothing of it."""
        self._inherited += [self._opened, self._tasks, self._event_loop]
        self.store.after_fork_in_child()
        self.hasher.after_fork_in_child()
        self._l1.after_fork_in_child()
        self.counters.after_fork_in_child()
        self.authenticator.after_fork_in_child()
        self._usage.after_fork_in_child()
        self._open_connections.after_fork_in_child()
        if self._failures is not None:
            self._failures.after_fork_in_child()
        self._clear_caches()

    async def _started(self) -> Lookup:
        """The look-up of the started engine.

        Raises:
            StoreUnavailable: the store could not be opened.
            WrongEventLoop: the engine is started on another event loop.
        """
        self._enter_event_loop()
        if self._opened is None and self._timer() >= self._retry_start_at:
            await self.start()
        return self._require_opened().lookup

    def _require_opened(self) -> _Opened:
        if self._opened is None:
            raise StoreUnavailable("the store could not be opened yet", "see the log")
        return self._opened

    # For apps and adapters

    async def authenticate(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY
    ) -> Decision:
        """Decide by the values of a request's `Authorization` fields."""
        return await self.authenticator.authenticate(values, requirement)

    def revocation_event(
        self, values: Sequence[bytes], requirement: Requirement = ANY_KEY
    ) -> AbstractContextManager[asyncio.Event]:
        """After an allow: an event that is set when the same check would be denied, because the key
        was revoked or changed, or has expired. An outage does not set it."""
        token = self.authenticator.read_credential(values)
        if isinstance(token, Reason):  # allowed without a key
            return nullcontext(asyncio.Event())
        return self._open_connections.track(token, requirement)

    def record_client(self, key_id: str, client: ClientGetter) -> None:
        """After an allow, if `records_clients`: record where the request came from."""
        self._usage.record_client(key_id, client)

    @property
    def log_failure(self) -> LogFailure | None:
        """Logs a refused request; None: refused requests are not logged."""
        return None if self._failures is None else self._failures.add

    def now_ms(self) -> int:
        """The time that expiry is judged at: the store's, in milliseconds since the epoch."""
        return self._freshness.now_ms()

    async def keyring(self) -> Keyring:
        """Manages the keys of the store.

        Raises:
            StoreUnavailable: the store could not be opened yet.
        """
        await self.start()
        keyring = self._require_opened().keyring
        await self._keyset.refresh()  # new tokens are made with the newest secrets
        return keyring

    async def store_secrets(self) -> StoreSecrets:
        """Rotates the store's own secrets.

        Raises:
            StoreUnavailable: the store could not be opened yet.
        """
        await self.keyring()
        return StoreSecrets(self.store, self._require_opened().propagation, self.now_ms)

    # Health and numbers

    async def ready(self) -> None:
        """Return if a key could be checked now: the store answers, and this process is fresh.

        Raises:
            KeylatchError: the reason why not; after three seconds at most.
        """
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self.keyring()
                await self.store.ping()
                await self._freshness.revalidate()
        except TimeoutError:
            raise StoreUnavailable(
                f"the store did not answer within {_READY_SECONDS:g} s", "see the log"
            ) from None

    def components(self) -> list[ComponentHealth]:
        """The health of the components, as last observed. Checks need only `store` and `lease`."""
        return self._stats.components(*self._observed())

    def stats(self) -> Stats:
        """The numbers that `keylatch.metrics` exports, without waiting."""
        return self._stats.read(*self._observed())

    def _observed(
        self,
    ) -> tuple[bool, ComponentHealth | None, SharedCache | None, Notifier | None]:
        opened = self._opened
        if opened is None:
            return False, self._failed_start, None, None
        return True, self._failed_start, opened.shared_cache, opened.notifier

    # In the background

    async def _store_usage(self, last_used: Mapping[str, int], batch: UsageBatch) -> None:
        await self.store.usage.record(last_used, batch)
        await self._revocation_monitor.check(last_used)
        self.authenticator.sample_timings()

    def _on_break(self, found: Break) -> None:
        self.counters.restores.add()
        self._l1.clear()
        if self._opened is not None:
            self._opened.lost_revocations.add(found)

    async def _run_maintenance(self) -> None:
        while True:
            await asyncio.sleep(_MAINTENANCE_SECONDS)
            self._flush_failures()
            try:
                await self._freshness.revalidate()
                await self._keyset.refresh()
                await self.store.run_maintenance(self.now_ms())
            except KeylatchError as error:
                log.warning(
                    "maintenance of the store failed; the next one runs in %g s: %s",
                    *(_MAINTENANCE_SECONDS, error.message),
                )

    def _flush_failures(self) -> None:
        if self._failures is not None:
            self._failures.flush()

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _check_health(clock: Callable[[], float]) -> Health:
    return Health(
        "checks are refused with 503",
        "checks are answered again",
        recovery_seconds=_RECOVERY_SECONDS,
        clock=clock,
    )


def _tracing() -> "Tracing":
    from keylatch.telemetry.tracing import Tracing  # an extra

    return Tracing()


def _retrieve_exception(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # all callers of `start` may have been cancelled


def _register_fork_hooks(engine: Engine) -> None:
    """Servers fork workers from a process that may have opened a store already."""
    if not hasattr(os, "register_at_fork"):
        return  # Windows has no fork
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
