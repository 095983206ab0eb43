"""Background tasks: what a stop cancels, and what it waits for."""

import asyncio

import pytest

from keylatch._background import EngineTasks

pytestmark = pytest.mark.anyio


class Waiting:
    """A loop that waits for an event up to a time limit, as a lease and open connections do."""

    def __init__(self) -> None:
        self.limit: asyncio.Timeout | None = None
        self.rounds = 0

    async def run(self) -> None:
        while True:
            self.rounds += 1
            try:
                async with asyncio.timeout(None) as self.limit:
                    await asyncio.Event().wait()
            except TimeoutError:
                continue


async def expire_before_the_loop_runs(waiting: Waiting) -> None:
    """The time limit has cancelled the task, and the task has not run since."""
    await asyncio.sleep(0)
    assert waiting.limit is not None
    waiting.limit.reschedule(0)
    await asyncio.sleep(0)


async def test_a_stop_ends_a_loop_whose_time_limit_expires_at_that_moment() -> None:
    """The cancellation by the time limit is not mistaken for that of the stop."""
    tasks, waiting = EngineTasks(), Waiting()
    tasks.start_loop(waiting.run())
    await expire_before_the_loop_runs(waiting)
    async with asyncio.timeout(10):
        await tasks.stop()
    assert waiting.rounds == 1


async def test_a_stop_that_skips_tasks_under_cancellation_never_ends() -> None:
    """The broken twin: `Task.cancelling` also counts the cancellation by the time limit."""
    waiting = Waiting()
    task = asyncio.create_task(waiting.run())
    await expire_before_the_loop_runs(waiting)
    assert task.cancelling() == 1
    for _ in range(3):
        await asyncio.sleep(0)
    assert (task.done(), waiting.rounds) == (False, 2)
    task.cancel()
    await asyncio.wait([task])
