"""Single flight: of many who want the same thing at once, one fetches and all receive it.

The work runs in a task of its own, so a leader whose client hangs up takes nobody down with it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """The fetches under way in this process."""

    def __init__(self) -> None:
        self._in_flight: dict[Hashable, asyncio.Task[T]] = {}

    async def do(self, key: Hashable, fetch: Callable[[], Awaitable[T]]) -> T:
        """The result of `fetch`, shared with everybody who asks for `key` meanwhile.

        A result may be older than the call: whoever joins late judges it as if it were cached.
        """
        task = self._in_flight.get(key)
        # Done is over, although the loop may not have come to `_on_done` yet.
        if task is None or task.done():
            task = asyncio.create_task(_run(fetch), name="keylatch-single-flight")
            self._in_flight[key] = task
            task.add_done_callback(lambda done: self._on_done(key, done))
        return await asyncio.shield(task)

    def after_fork_in_child(self) -> None:
        """After a fork: the parent's tasks are not here."""
        self._in_flight = {}

    def _on_done(self, key: Hashable, task: asyncio.Task[T]) -> None:
        if self._in_flight.get(key) is task:
            del self._in_flight[key]
        if not task.cancelled():
            task.exception()  # its waiters have it; all of them may have hung up


async def _run(fetch: Callable[[], Awaitable[T]]) -> T:
    return await fetch()
