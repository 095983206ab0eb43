"""Single flight: of many who want the same thing at once, one fetches and all receive it.

The work runs in a task of its own, so a leader whose client hangs up takes nobody down with it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Flights(Generic[T]):
    """The fetches under way in this process."""

    def __init__(self) -> None:
        self._under_way: dict[Hashable, asyncio.Task[T]] = {}

    async def join(self, key: Hashable, fetch: Callable[[], Awaitable[T]]) -> T:
        """The result of `fetch`, shared with everybody who asks for `key` meanwhile.

        A result may be older than the call: whoever joins late judges it as if it were cached.
        """
        task = self._under_way.get(key)
        # Done is over, although the loop may not have come to `_landed` yet.
        if task is None or task.done():
            task = asyncio.create_task(_run(fetch), name="keylatch-flight")
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._landed(key, done))
        return await asyncio.shield(task)

    def forget(self) -> None:
        """After a fork: the parent's tasks are not here."""
        self._under_way = {}

    def _landed(self, key: Hashable, task: asyncio.Task[T]) -> None:
        if self._under_way.get(key) is task:
            del self._under_way[key]
        if not task.cancelled():
            task.exception()  # its waiters have it; all of them may have hung up


async def _run(fetch: Callable[[], Awaitable[T]]) -> T:
    return await fetch()
