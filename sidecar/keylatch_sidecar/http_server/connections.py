"""All HTTP connections of a process: ends those whose client is late, and makes room for others."""

import asyncio
import os
import resource
from collections import deque
from logging import getLogger
from typing import TYPE_CHECKING, ClassVar, Final
from weakref import WeakKeyDictionary

from uvicorn.server import ServerState

from keylatch.telemetry.repeated_warning import RepeatedWarning
from keylatch_sidecar.http_server.limits import MAX_DESCRIPTORS, Limits

if TYPE_CHECKING:
    from keylatch_sidecar.http_server.protocol import LimitedProtocol

_SWEEP_PARTS: Final = 10
_RETRY_SECONDS: Final = 0.1
"""For so long nothing is looked for where nothing was found."""

log = getLogger("keylatch.serving")


class Connections:
    """Of one server.

    Args:
        limits: of times.
        connections: uvicorn's own set, in which each is from its beginning to its end.
        max_connections: how many there may be.
    """

    _by_server: ClassVar[WeakKeyDictionary[ServerState, "Connections"]] = WeakKeyDictionary()

    def __init__(
        self, limits: Limits, connections: "set[LimitedProtocol]", max_connections: int
    ) -> None:
        self._limits = limits
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self.rejected = RepeatedWarning(log, "an incomplete request was rejected with %d")
        self.upgrades = RepeatedWarning(log, "a request to upgrade the protocol was ignored")
        self._limit_reached = RepeatedWarning(
            log,
            "the limit of %d connections (by file descriptors) is reached: an idle one was closed",
        )
        self._is_sweeping = False
        self._to_sweep: list[LimitedProtocol] = []
        self._max_connections = max_connections
        # The silent ones as they were when last looked for, the first to go in front.
        self._eviction_queue: deque[tuple[tuple[int, float], LimitedProtocol]] = deque()
        self._retry_at = 0.0

    @classmethod
    def of_server(cls, state: ServerState, limits: Limits) -> "Connections":
        """The connections of a server, by its state."""
        if state not in cls._by_server:
            max_connections = (
                int(descriptor_limit() * limits.connections_share) - _open_descriptors()
            )
            cls._by_server[state] = cls(limits, state.connections, max(1, max_connections))  # type: ignore[arg-type]
        return cls._by_server[state]

    def add(self, new: "LimitedProtocol") -> None:
        """Watch over a new connection, and close another one if that is one too many; the new one
        itself where all others are being answered."""
        if not self._is_sweeping:
            self._sweep()
        if len(self._connections) > self._max_connections:
            self._limit_reached.add(self._max_connections)
            (self._next_to_evict(new) or new).transport.abort()

    def _sweep(self) -> None:
        """Look at a part of all connections: at 50,000 at once everything else would wait 0.1 s."""
        self._is_sweeping = bool(self._connections)
        if not self._is_sweeping:
            return
        self._loop.call_later(self._limits.sweep_seconds / _SWEEP_PARTS, self._sweep)
        self._to_sweep = self._to_sweep or list(self._connections)
        now = self._loop.time()
        for _ in range(1 + len(self._connections) // _SWEEP_PARTS):
            if self._to_sweep:
                self._to_sweep.pop().close_if_timed_out(now)

    def _next_to_evict(self, new: "LimitedProtocol") -> "LimitedProtocol | None":
        while self._eviction_queue or self._queue_evictable(new):
            rank, connection = self._eviction_queue.popleft()
            if connection.eviction_rank == rank:
                return connection
        return None

    def _queue_evictable(self, new: "LimitedProtocol") -> bool:
        """Find those that go next: all of the lowest rank, and so many that a look costs each new
        connection the time of 64."""
        now = self._loop.time()
        if now < self._retry_at:
            return False
        ranked = [(each.eviction_rank, each) for each in self._connections if each is not new]
        evictable = [(rank, each) for rank, each in ranked if rank is not None]
        evictable.sort(key=lambda pair: pair[0])
        lowest = sum(silence[0] == evictable[0][0][0] for silence, _ in evictable)
        self._eviction_queue.extend(evictable[: max(lowest, len(ranked) // 64)])
        if not evictable:
            self._retry_at = now + _RETRY_SECONDS
        return bool(evictable)


def _open_descriptors() -> int:
    """How many file descriptors this process has open, for whatever. With 16,000 open it takes
    10 ms to count them, so this is done once, at the first connection."""
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - no paths are wanted


def descriptor_limit() -> int:
    """How many file descriptors this process may use."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MAX_DESCRIPTORS)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of this process and its workers as far as is of use; systemd and Docker
    leave it at 1,024 for programs that cannot take more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= target:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (OSError, ValueError) as error:  # a system call filter, for instance
        log.warning("the limit of file descriptors stays at %d: %s", soft, error)
