"""Draining: after SIGTERM the sidecar goes on for a while, but `/readyz` answers 503.

A load balancer needs some seconds until it sends no request any more to a server that is not ready,
and Kubernetes until it sends none to a pod that it stops. A listener that closes at SIGTERM refuses
what they send until then.

The process that gets SIGTERM counts the seconds. Its workers watch for a file in the directory that
they share: a lock, a pipe or a semaphore could be left in a wrong state by a worker that is killed.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_WATCH_SECONDS: Final = 0.1
_FILE: Final = "draining"

log = logging.getLogger("keylatch.serving")


class Drain:
    """Whether the sidecar drains, and for how long.

    Args:
        seconds: from SIGTERM to the stop; 0: SIGTERM stops at once.
        worker_directory: shared by the workers; None: there is one worker.
        timer: seconds that never go back.

    Attributes:
        has_begun: whether it drains, as far as this process knows. An attribute, because every
            request reads it.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        worker_directory: Path | None = None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._path = None if worker_directory is None else worker_directory / _FILE
        self._timer = timer
        self._ends_at = 0.0
        self.has_begun = False

    @property
    def is_configured(self) -> bool:
        """Whether SIGTERM starts it."""
        return self._seconds > 0

    def begin(self) -> None:
        """Start to drain. A second call changes nothing."""
        if self.has_begun:
            return
        self.has_begun = True
        self._ends_at = self._timer() + self._seconds
        if self._path is not None:
            self._path.touch()
        log.info(
            "draining for %g s: /readyz answers 503, everything else goes on; "
            "another SIGTERM stops at once",
            self._seconds,
        )

    @property
    def is_over(self) -> bool:
        """Whether it has begun in this process and its time has passed."""
        return self.has_begun and self._timer() >= self._ends_at

    async def watch(self) -> None:
        """In a worker: set `has_begun` when the parent has begun to drain."""
        if self._path is None or not self.is_configured:
            return
        while not self._path.exists():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(_WATCH_SECONDS)
        self.has_begun = True
