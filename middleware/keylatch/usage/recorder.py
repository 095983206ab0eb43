"""Usage: a check sets one attribute and steps one counter; a background task stores both.

Last uses coalesce: each entry holds its newest time, and is pending once. Uses are counted by a
counter that an entry has while it is pending. A flush follows half a second after the first use,
then at most every five seconds, or as soon as 1,000 keys are pending. Counts belong to the day of
their flush. A crash loses at most the last 5.5 seconds; a graceful stop loses nothing.

A step of a counter is one call into C, so threads need no lock for it. But a thread may be
preempted after it took the counter and before it steps it, and a flush may detach the counter in
between: therefore each flush reads the counters of the previous flush again.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

from keylatch.caches.local_cache import UsageCounter
from keylatch.core.decisions import ClientGetter, Reason
from keylatch.errors import StoreUnavailable
from keylatch.storage.usage import ALLOWED, DAY_MS, Client, UsageBatch
from keylatch.telemetry.health import Health
from keylatch.usage.buffer import CAPACITY, UsageBuffer
from keylatch.usage.client_info import family_of, network_of

_FIRST_FLUSH_SECONDS: Final = 0.5
_INTERVAL_SECONDS: Final = 5.0
_FLUSH_AT_KEYS: Final = 1_000

Steps: TypeAlias = "itertools.count[int]"
"""`next` counts one, without a lock: see `Counter`."""
Write = Callable[[Mapping[str, int], UsageBatch], Awaitable[None]]


class UsageRecorder:
    """Records uses, and flushes them to the store.

    Args:
        write: stores last uses (key id → milliseconds) and a batch of counts, once; if it raises
            `StoreUnavailable`, both are kept and written again.
        sleep: waits, in seconds.
        now_ms: the time, in milliseconds since the epoch, which determines the day.
    """

    def __init__(
        self,
        write: Write,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now_ms: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        self._write = write
        self._sleep = sleep
        self._now_ms = now_ms
        self.health = Health("usage counts wait for the store", "usage counts are stored again")
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Drop pending usage: the parent stores it."""
        self._lock = threading.Lock()  # other threads record while the event loop drains
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: list[tuple[UsageCounter, Steps]] = []
        self._refusals: dict[tuple[str, Reason], int] = {}
        self._clients: dict[str, Client] = {}
        self._dropped = itertools.count()  # uses beyond `CAPACITY`
        self._drained: list[tuple[str, Steps, int]] = []  # with what was read of each
        self._buffer = UsageBuffer()
        self._has_pending = asyncio.Event()
        self._is_full = asyncio.Event()
        self.health.clear()

    @property
    def pending(self) -> int:
        """The number of keys whose last use is not stored yet."""
        return len(self._pending) + self._buffer.pending_keys

    def record(self, counter: UsageCounter, now_ms: float) -> None:
        """Record an allowed use, without waiting. Beyond 50,000 pending keys, uses of others are
        only counted as dropped."""
        counter.used_at = now_ms
        next(counter.steps or self._add_pending(counter))

    def record_last_used(self, counter: UsageCounter, now_ms: float) -> None:
        """Record a use of a valid key that lacks the permission: its time, and no count."""
        counter.used_at = now_ms
        if counter.steps is None:
            self._add_pending(counter)

    def record_refusal(self, key_id: str, reason: Reason) -> None:
        """Count a refusal of a key. Beyond 50,000 pairs of key and reason, new ones are dropped."""
        with self._lock:
            count = self._refusals.get((key_id, reason), 0)
            if count or len(self._refusals) < CAPACITY:
                self._refusals[key_id, reason] = count + 1
                if not count and len(self._refusals) == 1:
                    self._set_event(self._has_pending)
            else:
                next(self._dropped)

    def record_client(self, key_id: str, caller: ClientGetter) -> None:
        """Record the client of an allowed use; only the first one between two flushes is read."""
        if key_id in self._clients:
            return
        host, agent = caller()
        client = Client(network_of(host), family_of(agent), self._now_ms())
        with self._lock:
            if len(self._clients) < CAPACITY:
                self._clients[key_id] = client

    @property
    def dropped(self) -> int:
        """Uses that were not counted because too many keys were pending."""
        return self._buffer.dropped

    def _add_pending(self, counter: UsageCounter) -> Steps:
        """The counter of the key's uses until the next flush."""
        with self._lock:
            if counter.steps is None:
                if len(self._pending) >= CAPACITY:
                    return self._dropped
                counter.steps = itertools.count()
                self._pending.append((counter, counter.steps))
                if len(self._pending) == 1:
                    self._set_event(self._has_pending)
                elif len(self._pending) == _FLUSH_AT_KEYS + 1:
                    self._set_event(self._is_full)
            return counter.steps

    def _set_event(self, event: asyncio.Event) -> None:
        if self._loop is None or self._loop.is_closed():
            event.set()  # no task waits for it
        else:
            self._loop.call_soon_threadsafe(event.set)

    async def run(self) -> None:
        """Flush repeatedly, until cancelled."""
        with self._lock:  # an asyncio event belongs to the loop on which it was first awaited
            self._loop = asyncio.get_running_loop()
            self._has_pending, self._is_full = asyncio.Event(), asyncio.Event()
            if self._pending or self._refusals or not self._buffer.is_empty:
                self._has_pending.set()
        while True:
            await self._has_pending.wait()
            await self._sleep(_FIRST_FLUSH_SECONDS)
            await self.flush()
            await self._wait_for_flush()

    async def flush(self) -> None:
        """Store pending usage. If the store fails, it stays pending."""
        self._drain()
        self._has_pending.clear()
        self._is_full.clear()
        try:
            while not self._buffer.is_empty:
                await self._write(*self._buffer.next_batch())
                self._buffer.mark_stored()
        except StoreUnavailable as error:
            self.health.record_failure(error.message, error.hint)
            self._has_pending.set()
        except BaseException:
            self._has_pending.set()
            raise
        else:
            self.health.record_success()

    def _drain(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
            refusals, self._refusals = self._refusals, {}
            clients, self._clients = self._clients, {}
            dropped, self._dropped = self._dropped, itertools.count()
        buffer = self._buffer
        buffer.day = day = self._now_ms() // DAY_MS
        self._drain_steps(pending, day)
        for (key_id, reason), count in refusals.items():
            buffer.add_count((key_id, day, reason.name), count)
        buffer.add_clients(clients)
        buffer.drop(next(dropped))

    def _drain_steps(self, pending: list[tuple[UsageCounter, Steps]], day: int) -> None:
        drained, self._drained = self._drained, []
        for key_id, steps, counted in drained:
            self._buffer.add_count((key_id, day, ALLOWED), next(steps) - counted)
        for counter, steps in pending:
            counter.steps = None  # before it is read: a use from now on adds it again
            self._buffer.add_last_used(counter.secret_id, int(counter.used_at))
            count = next(steps)
            self._buffer.add_count((counter.key_id, day, ALLOWED), count)
            self._drained.append((counter.key_id, steps, count + 1))

    async def _wait_for_flush(self) -> None:
        """Wait for the interval, or until many keys are pending."""
        is_full = asyncio.create_task(self._is_full.wait())
        slept = asyncio.ensure_future(self._sleep(_INTERVAL_SECONDS))
        try:
            await asyncio.wait({is_full, slept}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            is_full.cancel()
            slept.cancel()
