"""Threads for one kind of work with a file, so that no other kind waits for them.

A fork must not happen while a thread is at work: `hold` waits until none is, and lets none begin.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from keylatch.telemetry.meter import Count

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
        self.forget()

    def forget(self) -> None:
        """In the child of a fork: the threads and what they hold are the parent's."""
        self._threads: ThreadPoolExecutor | None = None
        self._places = threading.Semaphore(self._size)
        self._begun, self._done = Count(), Count()

    @property
    def under_way(self) -> int:
        """Pieces of work that threads do, or that wait for one."""
        ended = self._done.value  # before what has begun: never fewer than none
        return self._begun.value - ended

    async def run(self, work: Callable[[], T]) -> T:
        """The result of the work, done by a thread."""
        places, done = self._places, self._done

        def placed() -> T:
            try:
                with places:
                    return work()
            finally:
                done.add()

        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._size, thread_name_prefix=self._name)
        self._begun.add()
        try:
            result = asyncio.get_running_loop().run_in_executor(self._threads, placed)
        except RuntimeError:  # the interpreter ends and starts no more threads: no request waits
            return placed()
        return await result

    def close(self) -> None:
        """Wait for what is under way, and let the threads go."""
        if self._threads is not None:
            self._threads.shutdown(wait=True)
            self._threads = None

    def hold(self) -> None:
        """Wait until no thread is at work, and let none begin."""
        for _ in range(self._size):
            self._places.acquire()

    def resume(self) -> None:
        """After `hold`, in the same process: go on."""
        for _ in range(self._size):
            self._places.release()
