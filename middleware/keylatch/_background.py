"""The background tasks of an engine: loops, and short tasks that a stop waits for."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

_SHUTDOWN_SECONDS: Final = 1.0

log = logging.getLogger("keylatch")


class EngineTasks:
    """The background tasks of one engine, all on its event loop."""

    def __init__(self) -> None:
        self._loops: list[asyncio.Task[None]] = []
        self._finite_tasks: set[asyncio.Task[None]] = set()
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._is_stopping = False

    def start_loop(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that ends only when `stop` cancels it."""
        self._event_loop = asyncio.get_running_loop()
        self._loops.append(self._create_task(work))

    def start_soon(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that only `stop` waits for, up to a second. Thread-safe."""
        if self._event_loop is None or asyncio._get_running_loop() is self._event_loop:
            self._finite_tasks.add(self._create_task(work))
        else:
            self._event_loop.call_soon_threadsafe(
                lambda: self._finite_tasks.add(self._create_task(work))
            )

    def stop_with_loop(self, stop_engine: Callable[[], Awaitable[None]]) -> None:
        """Stop the engine when its event loop ends first.

        `asyncio.run`, test clients and pytest plugins cancel all tasks of a loop and await them
        before they close it: so a cancelled task can still store uses and close connections.
        """
        self._watcher = self._create_task(self._watch_loop(stop_engine))

    async def _watch_loop(self, stop_engine: Callable[[], Awaitable[None]]) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            if not self._is_stopping:
                await stop_engine()
            raise

    async def stop(self) -> None:
        """Cancel the loops; wait up to a second for the other tasks."""
        self._is_stopping = True
        if self._watcher is asyncio.current_task():
            # The event loop ends and has cancelled all tasks. A second cancel would interrupt
            # psycopg while it cleans up.
            await self._wait_for_loops()
        elif self._watcher is not None:
            self._watcher.cancel()
        for loop in self._loops:
            loop.cancel()
        if self._finite_tasks:
            await asyncio.wait(self._finite_tasks, timeout=_SHUTDOWN_SECONDS)
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._loops = []

    async def _wait_for_loops(self) -> None:
        if self._loops:
            await asyncio.wait(self._loops, timeout=_SHUTDOWN_SECONDS)

    def _create_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._finite_tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a background task failed: %r", task.get_coro(), exc_info=task.exception())
