"""Open connections: closes them when the key that allowed them is no longer valid.

A request is decided once, when it starts; a WebSocket stays open. So the tombstones that invalidate
cached entries also end connections: after every applied change, and each second for keys that
expire.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from keylatch.core.decisions import Requirement
from keylatch.core.tokens import Token
from keylatch.revocation.freshness import Freshness

_EXPIRY_SECONDS: Final = 1.0


class ChecksTokens(Protocol):
    """Decides again on a token: `Authenticator`."""

    async def is_still_allowed(self, token: Token, requirement: Requirement) -> bool:
        """Whether a token that was allowed is allowed now, or cannot be decided on."""


class OpenConnections:
    """The open connections of one process.

    Args:
        poll_seconds: how often to look for changes while a connection is open.
    """

    def __init__(self, poll_seconds: float) -> None:
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
        return len(self._connections)

    def on_change(self) -> None:
        """Changes were applied; from any thread."""
        if self._connections:  # without connections, there may be no event loop either
            self._changed.set()

    @contextmanager
    def track(self, token: Token, requirement: Requirement) -> Iterator[asyncio.Event]:
        """An event that is set once the token is no longer allowed, until the end of the block."""
        ended = asyncio.Event()
        self._connections[ended] = (token, requirement)
        self._not_empty.set()
        self._changed.set()  # it may have been revoked since it was allowed
        try:
            yield ended
        finally:
            self._connections.pop(ended, None)

    async def run(self, freshness: Freshness, authenticator: ChecksTokens) -> None:
        """Check the connections, until cancelled."""
        self._new_events()  # an event belongs to the loop that first waits for it
        checked_at = 0.0
        while True:
            if not self._connections:
                self._not_empty.clear()
                await self._not_empty.wait()
            try:
                async with asyncio.timeout(self._poll_seconds):
                    await self._changed.wait()
            except TimeoutError:
                freshness.is_fresh()  # applies changes, which call `on_change`
            now = asyncio.get_running_loop().time()
            if self._changed.is_set() or now >= checked_at + _EXPIRY_SECONDS:
                self._changed.clear()
                checked_at = now
                await self._check_all(authenticator)

    async def _check_all(self, authenticator: ChecksTokens) -> None:
        for ended, (token, requirement) in tuple(self._connections.items()):
            if not await authenticator.is_still_allowed(token, requirement):
                self._connections.pop(ended, None)
                ended.set()
