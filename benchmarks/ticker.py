"""How late an event loop is: somebody on it who wants to be called every millisecond.

Ticks are due at their moments. One stall of 20 ms makes twenty ticks late and not one.
"""

import asyncio
import contextlib
import time
from types import TracebackType
from typing import Final

PAUSE_SECONDS: Final = 0.001


class Ticker:
    """Ticks during an `async with`; then `lateness` holds a value for every tick, in seconds."""

    def __init__(self) -> None:
        self.lateness: list[float] = []

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
        while True:
            now = time.perf_counter()
            due = note(self.lateness, due, now)
            await asyncio.sleep(due - now)


def note(lateness: list[float], due: float, now: float) -> float:
    """Note every tick that is due by now; when the next one is."""
    while due <= now:
        lateness.append(now - due)
        due += PAUSE_SECONDS
    return due
