"""The bell: "something changed": either what, under seal, or "go and look". Its loss is survived.

It rings through Redis where there is one, else through the store. It makes a revoke known in
milliseconds; without it, every process still looks four times in the length of a lease. Whatever
does not bear the seal is a call to look.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

from keylatch.caches.breaker import FAILURES, Breaker
from keylatch.errors import StoreUnavailable
from keylatch.revocation.news import News, Seal
from keylatch.store import Store

_AGAIN_SECONDS: Final = 1.0
_SILENCE_SECONDS: Final = 10.0

Heard = Callable[[News | None], None]


class Bell(Protocol):
    """One of the two bells."""

    seal: Seal
    """Of this store."""

    async def ring(self, news: News | None) -> None:
        """Tell every process the news, or to look; may be lost, never raises, takes 50 ms at
        most."""

    async def listen(self, heard: Heard) -> None:
        """Call `heard` whenever it rings, with its news or None where it brings none, and whenever
        the line is up again; until cancelled."""

    async def close(self) -> None:
        """Let the connections go."""


class RedisBell:
    """PUBLISH and SUBSCRIBE.

    Args:
        client: publishes; shares its breaker with the shared cache.
        listener: a client without a read timeout, for the subscription.
        breaker: see `Breaker`.
        channel: of this store.
        seal: of this store.
    """

    def __init__(
        self, client: Any, listener: Any, breaker: Breaker, channel: str, seal: Seal
    ) -> None:
        self._client = client
        self._listener = listener
        self._breaker = breaker
        self._channel = channel
        self.seal = seal

    async def ring(self, news: News | None) -> None:
        sealed = self.seal.closed(news)
        await self._breaker.attempt(lambda: self._client.publish(self._channel, sealed))

    async def listen(self, heard: Heard) -> None:
        while True:
            try:
                async with self._listener.pubsub(ignore_subscribe_messages=True) as subscription:
                    await subscription.subscribe(self._channel)
                    heard(None)
                    await self._hear(subscription, heard)
            except FAILURES:
                await asyncio.sleep(_AGAIN_SECONDS)

    async def _hear(self, subscription: Any, heard: Heard) -> None:
        while True:
            message = await subscription.get_message(timeout=_SILENCE_SECONDS)
            if message is not None:
                heard(self.seal.opened(message["data"]))
            else:
                await subscription.ping()  # a line that died in silence fails here

    async def close(self) -> None:
        await self._listener.aclose()


class StoreBell:
    """PostgreSQL's NOTIFY and LISTEN, for deployments without Redis."""

    def __init__(self, store: Store, seal: Seal) -> None:
        self._store = store
        self.seal = seal

    async def ring(self, news: News | None) -> None:
        try:
            await self._store.ring(self.seal.closed(news).decode())
        except StoreUnavailable:
            return

    async def listen(self, heard: Heard) -> None:
        while True:
            try:
                await self._store.listen(lambda said: heard(self.seal.opened(said.encode())))
            except StoreUnavailable:
                await asyncio.sleep(_AGAIN_SECONDS)

    async def close(self) -> None:
        return None
