"""Uses: noted on the request's path by one attribute and one tick, stored later by a task.

When a key was last used coalesces (each key knows its newest time, and waits once); how often it
was let in is ticked by a counter that it has while it waits. All is flushed half a second after
the first use, then at most every five seconds, or as soon as 1,000 keys wait. What was counted
belongs to the day of its flush. A crash loses at most the last 5.5 seconds; a graceful stop loses
nothing.

A tick is one call into C, so no thread comes between its reading and its writing. A thread may
still be stopped between taking the counter and ticking it, while a flush takes the counter away:
so each flush looks at the counters of the one before once more.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

from keylatch.caches.cache import Use
from keylatch.errors import StoreUnavailable
from keylatch.model import Caller, Reason
from keylatch.telemetry.condition import Condition
from keylatch.usage.clients import family_of, network_of
from keylatch.usage.tally import ALLOWED, DAY_MS, Client, Tally
from keylatch.usage.unstored import CAPACITY, Unstored

_SOON_SECONDS: Final = 0.5
_INTERVAL_SECONDS: Final = 5.0
_FLUSH_AT: Final = 1_000

Ticks: TypeAlias = "itertools.count[int]"
Write = Callable[[Mapping[str, int], Tally], Awaitable[None]]


class Usage:
    """The uses that the store does not know yet.

    Args:
        write: stores when keys were last used (id → milliseconds), and a tally, once; may raise
            `StoreUnavailable`, then both are kept and tried again.
        sleep: waits for so many seconds; a test moves it.
        now_ms: the time, in milliseconds since the epoch: it says what day it is.
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
        self.condition = Condition("uses wait for the store", "uses are stored again")
        self.forget()

    def forget(self) -> None:
        """After a fork: the parent flushes what it noted."""
        self._lock = threading.Lock()  # threads note while the loop takes what was noted
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[tuple[Use, Ticks]] = []
        self._refused: dict[tuple[str, Reason], int] = {}
        self._seen: dict[str, Client] = {}
        self._surplus = itertools.count()  # uses for which there was no place
        self._taken: list[tuple[str, Ticks, int]] = []  # counters, and up to where they were read
        self._unstored = Unstored()
        self._noted = asyncio.Event()
        self._full = asyncio.Event()
        self.condition.forget()

    @property
    def waiting(self) -> int:
        """Keys whose use is not stored yet."""
        return len(self._waiting) + self._unstored.keys

    def note(self, use: Use, now_ms: float) -> None:
        """A key was let in; never waits. Beyond 50,000 waiting keys, new ones are not noted."""
        use.used_at = now_ms
        next(use.ticks or self._add(use))

    def touch(self, use: Use, now_ms: float) -> None:
        """A good key was used for something that it may not do."""
        use.used_at = now_ms
        if use.ticks is None:
            self._add(use)

    def refuse(self, key_id: str, reason: Reason) -> None:
        """A token of this key was refused. Beyond 50,000 of them, new pairs are not counted."""
        with self._lock:
            count = self._refused.get((key_id, reason), 0)
            if count or len(self._refused) < CAPACITY:
                self._refused[key_id, reason] = count + 1
                if not count and len(self._refused) == 1:
                    self._tell(self._noted)
            else:
                next(self._surplus)

    def see(self, key_id: str, caller: Caller) -> None:
        """After `note`: whence; the first time between two flushes is kept, and none is asked for
        after that."""
        if key_id in self._seen:
            return
        host, agent = caller()
        client = Client(network_of(host), family_of(agent), self._now_ms())
        with self._lock:
            if len(self._seen) < CAPACITY:
                self._seen[key_id] = client

    @property
    def lost(self) -> int:
        """Uses that were not counted so far, because too many keys were waiting."""
        return self._unstored.lost

    def _add(self, use: Use) -> Ticks:
        """What counts the key's uses until the next flush."""
        with self._lock:
            if use.ticks is None:
                if len(self._waiting) >= CAPACITY:
                    return self._surplus
                use.ticks = itertools.count()
                self._waiting.append((use, use.ticks))
                if len(self._waiting) == 1:
                    self._tell(self._noted)
                elif len(self._waiting) == _FLUSH_AT + 1:
                    self._tell(self._full)
            return use.ticks

    def _tell(self, event: asyncio.Event) -> None:
        if self._loop is None or self._loop.is_closed():
            event.set()  # nobody waits for it yet
        else:
            self._loop.call_soon_threadsafe(event.set)

    async def run(self) -> None:
        """Flush again and again, until cancelled."""
        with self._lock:  # events belong to the loop on which somebody waited for them
            self._loop = asyncio.get_running_loop()
            self._noted, self._full = asyncio.Event(), asyncio.Event()
            if self._waiting or self._refused or not self._unstored.is_empty:
                self._noted.set()
        while True:
            await self._noted.wait()
            await self._sleep(_SOON_SECONDS)
            await self.flush()
            await self._pause()

    async def flush(self) -> None:
        """Store what is waiting. What cannot be stored waits on."""
        self._take()
        self._noted.clear()
        self._full.clear()
        try:
            while not self._unstored.is_empty:
                await self._write(*self._unstored.told())
                self._unstored.stored()
        except StoreUnavailable as error:
            self.condition.failed(error.message, error.hint)
            self._noted.set()
        except BaseException:
            self._noted.set()
            raise
        else:
            self.condition.succeeded()

    def _take(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
            refused, self._refused = self._refused, {}
            seen, self._seen = self._seen, {}
            surplus, self._surplus = self._surplus, itertools.count()
        unstored, day = self._unstored, self._now_ms() // DAY_MS
        late, self._taken = self._taken, []
        for key_id, ticks, read in late:
            unstored.count((key_id, day, ALLOWED), next(ticks) - read)
        for use, ticks in waiting:
            use.ticks = None  # before it is read: whoever uses it meanwhile adds it again
            unstored.use(use.secret, int(use.used_at))
            count = next(ticks)
            unstored.count((use.key_id, day, ALLOWED), count)
            self._taken.append((use.key_id, ticks, count + 1))
        for (key_id, reason), count in refused.items():
            unstored.count((key_id, day, reason.name), count)
        unstored.see(seen)
        unstored.lose(next(surplus))
        unstored.day = day

    async def _pause(self) -> None:
        """Wait for the interval, or until many keys wait."""
        full = asyncio.create_task(self._full.wait())
        slept = asyncio.ensure_future(self._sleep(_INTERVAL_SECONDS))
        try:
            await asyncio.wait({full, slept}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            full.cancel()
            slept.cancel()
