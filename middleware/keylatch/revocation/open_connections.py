"""Open connections: whoever let one in by a key is told when that key is good no more.

A request is judged once, when it starts; a WebSocket stays open. So the same tombstones that end
cached entries end connections: at news from the feed, and each second for keys that expire.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from keylatch.core.decisions import Requirement
from keylatch.core.tokens import Token

_EXPIRY_SECONDS: Final = 1.0


class OpenConnections:
    """The open connections of one process.

    Args:
        refresh: brings the feed up to date, where that takes no waiting.
        is_good: whether a token is still good for what it was let in for; an outage ends nothing.
        poll_seconds: how often to look while somebody is watched.
    """

    def __init__(
        self,
        refresh: Callable[[], object],
        is_good: Callable[[Token, Requirement], Awaitable[bool]],
        poll_seconds: float,
    ) -> None:
        self._refresh = refresh
        self._is_good = is_good
        self._poll_seconds = poll_seconds
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """After a fork: the connections are the parent's."""
        self._connections: dict[asyncio.Event, tuple[Token, Requirement]] = {}
        self._new_events()

    def _new_events(self) -> None:
        self._not_empty, self._changed = asyncio.Event(), asyncio.Event()
        if self._connections:
            self._not_empty.set()
            self._changed.set()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._connections)

    def on_change(self) -> None:
        """Something changed."""
        if self._connections:  # else nobody waits, and this may be a thread without a loop
            self._changed.set()

    @contextmanager
    def track(self, token: Token, requirement: Requirement) -> Iterator[asyncio.Event]:
        """An event that is set once the token is good no more; watched until the block ends."""
        ended = asyncio.Event()
        self._connections[ended] = (token, requirement)
        self._not_empty.set()
        self._changed.set()  # it may have been revoked since it was let in
        try:
            yield ended
        finally:
            self._connections.pop(ended, None)

    async def run(self) -> None:
        """Look after them, until cancelled."""
        self._new_events()  # they belong to the loop on which somebody waited for them
        checked_at = 0.0
        while True:
            if not self._connections:
                self._not_empty.clear()
                await self._not_empty.wait()
            try:
                async with asyncio.timeout(self._poll_seconds):
                    await self._changed.wait()
            except TimeoutError:
                self._refresh()  # changes reach `on_change`
            now = asyncio.get_running_loop().time()
            if self._changed.is_set() or now >= checked_at + _EXPIRY_SECONDS:
                self._changed.clear()
                checked_at = now
                await self._check_all()

    async def _check_all(self) -> None:
        for ended, (token, requirement) in tuple(self._connections.items()):
            if not await self._is_good(token, requirement):
                self._connections.pop(ended, None)
                ended.set()
