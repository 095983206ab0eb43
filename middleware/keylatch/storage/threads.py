"""Threads for one kind of work with a file, so that no other kind waits for them.

A fork must not happen while a thread is at work: `pause` waits until none is, and lets none begin.
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
        """In the child of a fork: the threads and what they hold are the parent's."""
        self._threads: ThreadPoolExecutor | None = None
        self._slots = threading.Semaphore(self._size)
        self._started, self._finished = Counter(), Counter()

    @property
    def under_way(self) -> int:
        """Pieces of work that threads do, or that wait for one."""
        finished = self._finished.value  # before what has begun: never fewer than none
        return self._started.value - finished

    async def run(self, work: Callable[[], T]) -> T:
        """The result of the work, done by a thread."""
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
        except RuntimeError:  # the interpreter ends and starts no more threads: no request waits
            return run_in_slot()
        return await result

    def close(self) -> None:
        """Wait for what is under way, and let the threads go."""
        if self._threads is not None:
            self._threads.shutdown(wait=True)
            self._threads = None

    def pause(self) -> None:
        """Wait until no thread is at work, and let none begin."""
        for _ in range(self._size):
            self._slots.acquire()

    def resume(self) -> None:
        """After `pause`, in the same process: go on."""
        for _ in range(self._size):
            self._slots.release()
