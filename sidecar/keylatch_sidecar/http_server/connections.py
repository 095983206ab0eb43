"""All HTTP connections of a process: closes those that are timed out, and makes room for others."""

import asyncio
from collections import deque
from logging import getLogger
from typing import ClassVar, Final, Protocol
from weakref import WeakKeyDictionary

from uvicorn.server import ServerState

from keylatch.telemetry.repeated_warning import RepeatedWarning
from keylatch_sidecar.http_server.file_descriptors import descriptor_limit, open_descriptors
from keylatch_sidecar.http_server.limits import Limits

_SWEEP_PARTS: Final = 10
_RETRY_SECONDS: Final = 0.1
"""After a search that found no connection to evict, none is searched for so long."""

log = getLogger("keylatch.serving")


class Connection(Protocol):
    """What `Connections` needs of a connection."""

    @property
    def transport(self) -> asyncio.WriteTransport: ...

    @property
    def eviction_rank(self) -> tuple[int, float] | None:
        """The lowest rank is evicted first. None: not evictable."""

    def close_if_timed_out(self, now: float) -> None:
        """Close the connection if the client has used up its time."""


class Connections:
    """The connections of one server.

    Args:
        limits: of times.
        connections: uvicorn's own set, which has each connection from its start to its end.
        max_connections: the limit of their number.
    """

    _by_server: ClassVar[WeakKeyDictionary[ServerState, "Connections"]] = WeakKeyDictionary()

    def __init__(self, limits: Limits, connections: set[Connection], max_connections: int) -> None:
        self._limits = limits
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self.rejected = RepeatedWarning(log, "rejected an incomplete request with %d")
        self.upgrades = RepeatedWarning(log, "ignored a request to upgrade the protocol")
        self._limit_reached = RepeatedWarning(
            log,
            "closed an idle connection: %d are open, the limit by file descriptors",
        )
        self._is_sweeping = False
        self._to_sweep: list[Connection] = []
        self._max_connections = max_connections
        # Evictable connections and their ranks at the last search, the lowest rank first.
        self._eviction_queue: deque[tuple[tuple[int, float], Connection]] = deque()
        self._retry_at = 0.0

    @classmethod
    def of_server(cls, state: ServerState, limits: Limits) -> "Connections":
        """The connections of the server that has this state."""
        if state not in cls._by_server:
            share = int(descriptor_limit() * limits.connections_share)
            max_connections = max(1, share - open_descriptors())
            cls._by_server[state] = cls(limits, state.connections, max_connections)  # type: ignore[arg-type]
        return cls._by_server[state]

    def add(self, new: Connection) -> None:
        """Include a new connection in sweeps. Beyond the limit, close another connection, or the
        new one if every other is being answered."""
        if not self._is_sweeping:
            self._sweep()
        if len(self._connections) > self._max_connections:
            self._limit_reached.add(self._max_connections)
            (self._next_to_evict(new) or new).transport.abort()

    def _sweep(self) -> None:
        """Check a part of the connections: checking 50,000 at once would block for 0.1 s."""
        self._is_sweeping = bool(self._connections)
        if not self._is_sweeping:
            return
        self._loop.call_later(self._limits.sweep_seconds / _SWEEP_PARTS, self._sweep)
        self._to_sweep = self._to_sweep or list(self._connections)
        now = self._loop.time()
        for _ in range(1 + len(self._connections) // _SWEEP_PARTS):
            if self._to_sweep:
                self._to_sweep.pop().close_if_timed_out(now)

    def _next_to_evict(self, new: Connection) -> Connection | None:
        while self._eviction_queue or self._queue_evictable(new):
            rank, connection = self._eviction_queue.popleft()
            if connection.eviction_rank == rank:
                return connection
        return None

    def _queue_evictable(self, new: Connection) -> bool:
        """Queue the next connections to evict: all of the lowest rank, and at least one in 64, so
        that the search costs each new connection the time of 64."""
        now = self._loop.time()
        if now < self._retry_at:
            return False
        ranked = [(each.eviction_rank, each) for each in self._connections if each is not new]
        evictable = [(rank, each) for rank, each in ranked if rank is not None]
        evictable.sort(key=lambda pair: pair[0])
        lowest = sum(rank[0] == evictable[0][0][0] for rank, _ in evictable)
        self._eviction_queue.extend(evictable[: max(lowest, len(ranked) // 64)])
        if not evictable:
            self._retry_at = now + _RETRY_SECONDS
        return bool(evictable)
