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
from keylatch_sidecar.limits import MAX_DESCRIPTORS, Limits

if TYPE_CHECKING:
    from keylatch_sidecar.proxies.bounded import Bounded

_PARTS: Final = 10
_NONE_SECONDS: Final = 0.1
"""For so long nothing is looked for where nothing was found."""

log = getLogger("keylatch.serving")


class Connections:
    """Of one server.

    Args:
        limits: of times.
        connections: uvicorn's own set, in which each is from its beginning to its end.
        most: how many there may be.
    """

    _of: ClassVar[WeakKeyDictionary[ServerState, "Connections"]] = WeakKeyDictionary()

    def __init__(self, limits: Limits, connections: "set[Bounded]", most: int) -> None:
        self._limits = limits
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self.rejected = RepeatedWarning(
            log, "a request was answered with %d before it was complete"
        )
        self.upgrades = RepeatedWarning(
            log, "an upgrade to another protocol was asked for and ignored"
        )
        self._crowded = RepeatedWarning(
            log,
            "%d connections are all that the file descriptors suffice for: a silent one was closed",
        )
        self._is_swept = False
        self._to_look_at: list[Bounded] = []
        self._most = most
        # The silent ones as they were when last looked for, the first to go in front.
        self._silent: deque[tuple[tuple[int, float], Bounded]] = deque()
        self._none_until = 0.0

    @classmethod
    def of(cls, state: ServerState, limits: Limits) -> "Connections":
        """The connections of a server, by its state."""
        if state not in cls._of:
            most = int(descriptors() * limits.connections_share) - _in_use()
            cls._of[state] = cls(limits, state.connections, max(1, most))  # type: ignore[arg-type]
        return cls._of[state]

    def add(self, new: "Bounded") -> None:
        """Watch over a new connection, and close another one if that is one too many; the new one
        itself where all others are being answered."""
        if not self._is_swept:
            self._sweep()
        if len(self._connections) > self._most:
            self._crowded.add(self._most)
            (self._oldest_silent(new) or new).transport.abort()

    def _sweep(self) -> None:
        """Look at a part of all connections: at 50,000 at once everything else would wait 0.1 s."""
        self._is_swept = bool(self._connections)
        if not self._is_swept:
            return
        self._loop.call_later(self._limits.sweep_seconds / _PARTS, self._sweep)
        self._to_look_at = self._to_look_at or list(self._connections)
        now = self._loop.time()
        for _ in range(1 + len(self._connections) // _PARTS):
            if self._to_look_at:
                self._to_look_at.pop().end_if_late(now)

    def _oldest_silent(self, new: "Bounded") -> "Bounded | None":
        while self._silent or self._look(new):
            silence, connection = self._silent.popleft()
            if connection.silence == silence:
                return connection
        return None

    def _look(self, new: "Bounded") -> bool:
        """Find those that go next: all of the lowest rank, and so many that a look costs each new
        connection the time of 64."""
        now = self._loop.time()
        if now < self._none_until:
            return False
        found = [(each.silence, each) for each in self._connections if each is not new]
        silent = [(silence, each) for silence, each in found if silence is not None]
        silent.sort(key=lambda pair: pair[0])
        lowest = sum(silence[0] == silent[0][0][0] for silence, _ in silent)
        self._silent.extend(silent[: max(lowest, len(found) // 64)])
        if not silent:
            self._none_until = now + _NONE_SECONDS
        return bool(silent)


def _in_use() -> int:
    """How many file descriptors this process has open, for whatever. With 16,000 open it takes
    10 ms to count them, so this is done once, at the first connection."""
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - no paths are wanted


def descriptors() -> int:
    """How many file descriptors this process may use."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MAX_DESCRIPTORS)


def raise_descriptors() -> None:
    """Raise the soft limit of this process and its workers as far as is of use; systemd and Docker
    leave it at 1,024 for programs that cannot take more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:  # a system call filter, for instance
        log.warning("the limit of file descriptors stays at %d: %s", soft, error)
