"""Single flight: concurrent fetches of one key share one call and its result.

The call runs in its own task, so a caller that is cancelled does not cancel it for the others.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """The fetches in flight in this process."""

    def __init__(self) -> None:
        self._in_flight: dict[Hashable, asyncio.Task[T]] = {}

    async def do(self, key: Hashable, fetch: Callable[[], Awaitable[T]]) -> T:
        """The result of `fetch`, shared with all concurrent calls for the same `key`.

        The fetch may have begun before this call, so its result has to be validated like a cached
        one.
        """
        task = self._in_flight.get(key)
        # A finished task is not joined, even if the loop has not called `_on_done` yet.
        if task is None or task.done():
            task = asyncio.create_task(_run(fetch), name="keylatch-single-flight")
            self._in_flight[key] = task
            task.add_done_callback(lambda done: self._on_done(key, done))
        return await asyncio.shield(task)

    def after_fork_in_child(self) -> None:
        """Drop the parent's tasks: they do not run in the child."""
        self._in_flight = {}

    def _on_done(self, key: Hashable, task: asyncio.Task[T]) -> None:
        if self._in_flight.get(key) is task:
            del self._in_flight[key]
        if not task.cancelled():
            task.exception()  # mark it as retrieved: all waiters may be cancelled


async def _run(fetch: Callable[[], Awaitable[T]]) -> T:
    return await fetch()
