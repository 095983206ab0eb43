"""lastUsed: noted on the request's path by writing one attribute, stored later by a task.

Uses coalesce (each key knows its newest time, and waits once) and are flushed half a second after
the first one, then at most every five seconds, or as soon as 1,000 keys wait. A crash loses at
most the last 5.5 seconds; a graceful stop loses nothing.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from keylatch.cache import Use
from keylatch.condition import Condition
from keylatch.errors import StoreUnavailable
from keylatch.meter import Count

_SOON_SECONDS: Final = 0.5
_INTERVAL_SECONDS: Final = 5.0
_FLUSH_AT: Final = 1_000
_CAPACITY: Final = 50_000


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
        self.condition = Condition("uses wait for the store", "uses are stored again")
        self.forget()

    def forget(self) -> None:
        """After a fork: the parent flushes what it noted."""
        self._lock = threading.Lock()  # threads note while the loop takes what was noted
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[Use] = []
        self._unstored: dict[str, int] = {}
        self._noted = asyncio.Event()
        self._full = asyncio.Event()
        self.condition.forget()
        self.lost = Count()
        """Uses that were not noted because too many keys waited."""

    @property
    def waiting(self) -> int:
        """Keys whose use is not stored yet."""
        return len(self._waiting) + len(self._unstored)

    def note(self, use: Use, now_ms: float) -> None:
        """A key was used; never waits. Beyond 50,000 waiting keys, new ones are not noted."""
        use.used_at = now_ms
        if not use.is_waiting:
            self._add(use)

    def _add(self, use: Use) -> None:
        with self._lock:
            if use.is_waiting:
                return
            if len(self._waiting) + len(self._unstored) >= _CAPACITY:
                self.lost.add()
                return
            use.is_waiting = True
            self._waiting.append(use)
            if len(self._waiting) == 1:
                self._tell(self._noted)
            elif len(self._waiting) == _FLUSH_AT + 1:
                self._tell(self._full)

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
            if self._waiting or self._unstored:
                self._noted.set()
        while True:
            await self._noted.wait()
            await self._sleep(_SOON_SECONDS)
            await self.flush()
            await self._pause()

    async def flush(self) -> None:
        """Store what is waiting. What cannot be stored waits on."""
        uses = self._taken()
        self._noted.clear()
        self._full.clear()
        try:
            await self._write(uses)
        except StoreUnavailable as error:
            self.condition.failed(error.message, error.hint)
            self._keep(uses)
        except BaseException:
            self._keep(uses)
            raise
        else:
            self.condition.succeeded()

    def _taken(self) -> dict[str, int]:
        with self._lock:
            waiting, self._waiting = self._waiting, []
            uses, self._unstored = self._unstored, {}
        for use in waiting:
            use.is_waiting = False  # before it is read: whoever uses it meanwhile adds it again
            uses[use.key_id] = max(uses.get(use.key_id, 0), int(use.used_at))
        return uses

    def _keep(self, uses: dict[str, int]) -> None:
        with self._lock:
            self._unstored = uses
            if uses:
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
