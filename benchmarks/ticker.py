"""How late an event loop is: a task on it that is due every millisecond.

Ticks are due at their moments. One stall of 20 ms makes twenty ticks late and not one.
"""

import asyncio
import contextlib
import time
from types import TracebackType
from typing import Final

PAUSE_SECONDS: Final = 0.001


class Ticker:
    """Ticks during an `async with`.

    Then `lateness` holds a value for every tick, and `worked` the loop's own processor time between
    two of them, both in seconds: a loop that is late and did not work had to wait for a processor,
    or for the interpreter's lock.
    """

    def __init__(self) -> None:
        self.lateness: list[float] = []
        self.worked: list[float] = []

    async def __aenter__(self) -> "Ticker":
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _tick(self) -> None:
        due = time.perf_counter()
        before = time.thread_time()
        while True:
            now, spent = time.perf_counter(), time.thread_time()
            due = record_tick(self.lateness, due, now)
            self.worked.append(spent - before)
            before = spent
            await asyncio.sleep(due - now)


def record_tick(lateness: list[float], due: float, now: float) -> float:
    """Note every tick that is due by now; when the next one is."""
    while due <= now:
        lateness.append(now - due)
        due += PAUSE_SECONDS
    return due
