"""The bell: "something changed": either what, under seal, or "go and look". Its loss is survived.

It rings through Redis where there is one, else through the store. It makes a revoke known in
milliseconds; without it, every process still looks four times in the length of a lease. Whatever
does not bear the seal is a call to look.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

from keylatch.caches.redis_client import FAILURES, CircuitBreaker
from keylatch.errors import StoreUnavailable
from keylatch.revocation.notices import Notice, Signer
from keylatch.storage.store import Store

_RETRY_SECONDS: Final = 1.0
_PING_SECONDS: Final = 10.0

OnNotice = Callable[[Notice | None], None]


class Notifier(Protocol):
    """One of the two bells."""

    signer: Signer
    """Of this store."""

    async def publish(self, notice: Notice | None) -> None:
        """Tell every process the news, or to look; may be lost, never raises, takes 50 ms at
        most."""

    async def subscribe(self, on_notice: OnNotice) -> None:
        """Call `on_notice` whenever it rings, with its notice or None if it has none, and whenever
        the line is up again; until cancelled."""

    async def close(self) -> None:
        """Let the connections go."""


class RedisNotifier:
    """PUBLISH and SUBSCRIBE.

    Args:
        client: publishes; shares its breaker with the shared cache.
        subscriber: a client without a read timeout, for the subscription.
        breaker: see `CircuitBreaker`.
        channel: of this store.
        signer: of this store.
    """

    def __init__(
        self, client: Any, subscriber: Any, breaker: CircuitBreaker, channel: str, signer: Signer
    ) -> None:
        self._client = client
        self._subscriber = subscriber
        self._breaker = breaker
        self._channel = channel
        self.signer = signer

    async def publish(self, notice: Notice | None) -> None:
        signed = self.signer.sign(notice)
        await self._breaker.attempt(lambda: self._client.publish(self._channel, signed))

    async def subscribe(self, on_notice: OnNotice) -> None:
        while True:
            try:
                async with self._subscriber.pubsub(ignore_subscribe_messages=True) as subscription:
                    await subscription.subscribe(self._channel)
                    on_notice(None)
                    await self._receive(subscription, on_notice)
            except FAILURES:
                await asyncio.sleep(_RETRY_SECONDS)

    async def _receive(self, subscription: Any, on_notice: OnNotice) -> None:
        while True:
            message = await subscription.get_message(timeout=_PING_SECONDS)
            if message is not None:
                on_notice(self.signer.verify(message["data"]))
            else:
                await subscription.ping()  # a line that died in silence fails here

    async def close(self) -> None:
        await self._subscriber.aclose()


class StoreNotifier:
    """PostgreSQL's NOTIFY and LISTEN, for deployments without Redis."""

    def __init__(self, store: Store, signer: Signer) -> None:
        self._store = store
        self.signer = signer

    async def publish(self, notice: Notice | None) -> None:
        try:
            await self._store.invalidations.notify(self.signer.sign(notice).decode())
        except StoreUnavailable:
            return

    async def subscribe(self, on_notice: OnNotice) -> None:
        while True:
            try:
                await self._store.invalidations.listen(
                    lambda payload: on_notice(self.signer.verify(payload.encode()))
                )
            except StoreUnavailable:
                await asyncio.sleep(_RETRY_SECONDS)

    async def close(self) -> None:
        return None
