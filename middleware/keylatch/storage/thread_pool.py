"""A thread pool for one kind of work with a file, as a bulkhead: no other kind waits for it.

The process must not fork while a thread works: `pause` waits until none does, and lets none start.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from keylatch.telemetry.counters import Counter

T = TypeVar("T")


class ThreadPool:
    """A bounded number of threads that start with the first work.

    Args:
        name: of the threads.
        size: how many.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self.reset()

    def reset(self) -> None:
        """Start anew in the child of a fork, which has none of the parent's threads."""
        self._threads: ThreadPoolExecutor | None = None
        self._slots = threading.Semaphore(self._size)
        self._started, self._finished = Counter(), Counter()

    @property
    def under_way(self) -> int:
        """Pieces of work in progress, or waiting for a thread."""
        finished = self._finished.value  # read first: the difference is never negative
        return self._started.value - finished

    async def run(self, work: Callable[[], T]) -> T:
        """The result of the work, which a thread does."""
        slots, finished = self._slots, self._finished

        def run_in_slot() -> T:
            try:
                with slots:
                    return work()
            finally:
                finished.add()

        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._size, thread_name_prefix=self._name)
        self._started.add()
        try:
            result = asyncio.get_running_loop().run_in_executor(self._threads, run_in_slot)
        except RuntimeError:  # the interpreter shuts down and starts no threads: no request waits
            return run_in_slot()
        return await result

    def close(self) -> None:
        """Wait for the work in progress, and end the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=True)
            self._threads = None

    def pause(self) -> None:
        """Wait until no thread works, and let none start."""
        for _ in range(self._size):
            self._slots.acquire()

    def resume(self) -> None:
        """After `pause`, in the same process."""
        for _ in range(self._size):
            self._slots.release()
