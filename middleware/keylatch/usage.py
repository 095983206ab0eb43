"""lastUsed: noted on the request's path as one dictionary write, stored later by a task.

Uses coalesce (`key id → newest time`) and are flushed half a second after the first one, then at
most every five seconds, or as soon as 1,000 keys wait. A crash loses at most the last 5.5
seconds; a graceful stop loses nothing.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from keylatch.errors import StoreUnavailable

_SOON_SECONDS: Final = 0.5
_INTERVAL_SECONDS: Final = 5.0
_FLUSH_AT: Final = 1_000
_CAPACITY: Final = 50_000

log = logging.getLogger("keylatch")


class Usage:
    """The uses that the store does not know yet.

    Args:
        write: stores them; may raise `StoreUnavailable`, then they are kept and tried again.
        sleep: waits for so many seconds; a test moves it.
    """

    def __init__(
        self,
        write: Callable[[Mapping[str, int]], Awaitable[None]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._write = write
        self._sleep = sleep
        self.forget()

    def forget(self) -> None:
        """After a fork: the parent flushes what it noted."""
        self._lock = threading.Lock()  # threads note while the loop takes what was noted
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, int] = {}
        self._noted = asyncio.Event()
        self._full = asyncio.Event()

    def note(self, key_id: str, now_ms: int) -> None:
        """A key was used; never waits. Beyond 50,000 waiting keys, new ones are not noted."""
        waiting = self._waiting
        if key_id in waiting:
            waiting[key_id] = now_ms
            if waiting is self._waiting:
                return
        # New, or a flush took the dict away, and nobody knows whether before or after that.
        with self._lock:
            self._note(key_id, now_ms)

    def _note(self, key_id: str, now_ms: int) -> None:
        waiting = self._waiting
        if key_id not in waiting:
            if len(waiting) >= _CAPACITY:
                return
            if not waiting:
                self._tell(self._noted)
            elif len(waiting) == _FLUSH_AT:
                self._tell(self._full)
        waiting[key_id] = now_ms

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
            if self._waiting:
                self._noted.set()
        while True:
            await self._noted.wait()
            await self._sleep(_SOON_SECONDS)
            await self.flush()
            await self._pause()

    async def flush(self) -> None:
        """Store what is waiting. What cannot be stored waits on."""
        with self._lock:
            taken, self._waiting = self._waiting, {}
        uses = taken.copy()  # a thread may still write into the other
        self._noted.clear()
        self._full.clear()
        try:
            await self._write(uses)
        except StoreUnavailable as error:
            log.warning("lastUsed of %d keys waits for the store: %s", len(uses), error)
            self._keep(uses)
        except BaseException:
            self._keep(uses)
            raise

    def _keep(self, uses: Mapping[str, int]) -> None:
        with self._lock:
            for key_id, used_at in uses.items():
                if key_id not in self._waiting and len(self._waiting) < _CAPACITY:
                    self._waiting[key_id] = used_at
            if self._waiting:
                self._noted.set()

    async def _pause(self) -> None:
        """Wait for the interval, or until many keys wait."""
        full = asyncio.create_task(self._full.wait())
        slept = asyncio.ensure_future(self._sleep(_INTERVAL_SECONDS))
        try:
            await asyncio.wait({full, slept}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            full.cancel()
            slept.cancel()
