"""What an engine does in the background: loops that a stop ends, errands that a stop waits for."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final

_LAST_ERRANDS_SECONDS: Final = 1.0

log = logging.getLogger("keylatch")


class Jobs:
    """The background tasks of one engine; all of them run on its event loop."""

    def __init__(self) -> None:
        self._loops: list[asyncio.Task[None]] = []
        self._errands: set[asyncio.Task[None]] = set()
        self._home: asyncio.AbstractEventLoop | None = None

    def loop(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work that goes on until it is cancelled."""
        self._home = asyncio.get_running_loop()
        self._loops.append(self._begin(work))

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work that no request waits for, but a stop does, for a moment. Any thread may ask."""
        if self._home is None or asyncio._get_running_loop() is self._home:
            self._errands.add(self._begin(work))
        else:
            self._home.call_soon_threadsafe(lambda: self._errands.add(self._begin(work)))

    async def end(self) -> None:
        """Cancel the loops, and give errands a second to finish."""
        for loop in self._loops:
            loop.cancel()
        if self._errands:
            await asyncio.wait(self._errands, timeout=_LAST_ERRANDS_SECONDS)
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._loops = []

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._errands.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a background task failed", exc_info=task.exception())
