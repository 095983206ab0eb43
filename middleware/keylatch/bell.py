"""The bell: "something changed, go and look". Its content is never trusted, its loss is survived.

It rings through Redis where there is one, else through the store. It makes a revoke known in
milliseconds; without it, every process still looks four times in the length of a lease.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

from keylatch.breaker import FAILURES, Breaker
from keylatch.errors import StoreUnavailable
from keylatch.store import Store

_AGAIN_SECONDS: Final = 1.0
_SILENCE_SECONDS: Final = 10.0


class Bell(Protocol):
    """One of the two bells."""

    async def ring(self) -> None:
        """Tell every process to look; may be lost, never raises, takes 50 ms at most."""

    async def listen(self, heard: Callable[[], None]) -> None:
        """Call `heard` whenever it rings, and whenever the line is up again; until cancelled."""

    async def close(self) -> None:
        """Let the connections go."""


class RedisBell:
    """PUBLISH and SUBSCRIBE.

    Args:
        client: publishes; shares its breaker with the shared cache.
        listener: a client without a read timeout, for the subscription.
        breaker: see `Breaker`.
        channel: of this store.
    """

    def __init__(self, client: Any, listener: Any, breaker: Breaker, channel: str) -> None:
        self._client = client
        self._listener = listener
        self._breaker = breaker
        self._channel = channel

    async def ring(self) -> None:
        await self._breaker.attempt(lambda: self._client.publish(self._channel, b""))

    async def listen(self, heard: Callable[[], None]) -> None:
        while True:
            try:
                async with self._listener.pubsub(ignore_subscribe_messages=True) as subscription:
                    await subscription.subscribe(self._channel)
                    heard()
                    await self._hear(subscription, heard)
            except FAILURES:
                await asyncio.sleep(_AGAIN_SECONDS)

    async def _hear(self, subscription: Any, heard: Callable[[], None]) -> None:
        while True:
            if await subscription.get_message(timeout=_SILENCE_SECONDS) is not None:
                heard()
            else:
                await subscription.ping()  # a line that died in silence fails here

    async def close(self) -> None:
        await self._listener.aclose()


class StoreBell:
    """PostgreSQL's NOTIFY and LISTEN, for deployments without Redis."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def ring(self) -> None:
        try:
            await self._store.ring()
        except StoreUnavailable:
            return

    async def listen(self, heard: Callable[[], None]) -> None:
        while True:
            try:
                await self._store.listen(heard)
            except StoreUnavailable:
                await asyncio.sleep(_AGAIN_SECONDS)

    async def close(self) -> None:
        return None
