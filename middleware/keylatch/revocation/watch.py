"""Open connections: whoever let one in by a key is told when that key is good no more.

A request is judged once, when it starts; a WebSocket stays open. So the same tombstones that end
cached entries end connections: at news from the feed, and each second for keys that expire.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from keylatch.model import Wanted
from keylatch.tokens import Token

_EXPIRY_SECONDS: Final = 1.0


class Watch:
    """The open connections of one process.

    Args:
        look: brings the feed up to date, where that takes no waiting.
        is_good: whether a token is still good for what it was let in for; an outage ends nothing.
        seconds: how often to look while somebody is watched.
    """

    def __init__(
        self,
        look: Callable[[], object],
        is_good: Callable[[Token, Wanted], Awaitable[bool]],
        seconds: float,
    ) -> None:
        self._look = look
        self._is_good = is_good
        self._seconds = seconds
        self.forget()

    def forget(self) -> None:
        """After a fork: the connections are the parent's."""
        self._open: dict[asyncio.Event, tuple[Token, Wanted]] = {}
        self._new_events()

    def _new_events(self) -> None:
        self._somebody, self._news = asyncio.Event(), asyncio.Event()
        if self._open:
            self._somebody.set()
            self._news.set()

    @property
    def watched(self) -> int:
        """How many there are."""
        return len(self._open)

    def hear(self) -> None:
        """Something changed."""
        if self._open:  # else nobody waits, and this may be a thread without a loop
            self._news.set()

    @contextmanager
    def over(self, token: Token, wanted: Wanted) -> Iterator[asyncio.Event]:
        """An event that is set once the token is good no more; watched until the block ends."""
        ended = asyncio.Event()
        self._open[ended] = (token, wanted)
        self._somebody.set()
        self._news.set()  # it may have been revoked since it was let in
        try:
            yield ended
        finally:
            self._open.pop(ended, None)

    async def run(self) -> None:
        """Look after them, until cancelled."""
        self._new_events()  # they belong to the loop on which somebody waited for them
        judged_at = 0.0
        while True:
            if not self._open:
                self._somebody.clear()
                await self._somebody.wait()
            try:
                async with asyncio.timeout(self._seconds):
                    await self._news.wait()
            except TimeoutError:
                self._look()  # news reach `hear`
            now = asyncio.get_running_loop().time()
            if self._news.is_set() or now >= judged_at + _EXPIRY_SECONDS:
                self._news.clear()
                judged_at = now
                await self._judge()

    async def _judge(self) -> None:
        for ended, (token, wanted) in tuple(self._open.items()):
            if not await self._is_good(token, wanted):
                self._open.pop(ended, None)
                ended.set()
