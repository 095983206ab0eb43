"""Notifiers: publish to every process that the log has new rows. A lost notice does no harm.

Notices go through Redis where it is configured, else through PostgreSQL. With them a revocation
takes effect in milliseconds; without them every process still polls four times in a lease period. A
payload without rows, or without a valid MAC, makes a process poll the store.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

from keylatch.caches.redis_client import CircuitBreaker, failures
from keylatch.errors import StoreUnavailable
from keylatch.revocation.notices import Notice, Signer
from keylatch.storage.store import Store

_RETRY_SECONDS: Final = 1.0
_PING_SECONDS: Final = 10.0

OnNotice = Callable[[Notice | None], None]


class Notifier(Protocol):
    """Publishes notices and receives those of other processes."""

    async def publish(self, notice: Notice | None) -> None:
        """Send a notice to every process; None: have them poll. It may be lost, never raises, and
        takes 50 ms at most."""

    async def subscribe(self, on_notice: OnNotice) -> None:
        """Call `on_notice` with every notice, with None for a payload without rows or valid MAC,
        and with None after every connect; until cancelled."""

    async def close(self) -> None:
        """Close the connections."""


class RedisNotifier:
    """PUBLISH and SUBSCRIBE.

    Args:
        client: publishes; shares its breaker with the shared cache.
        subscriber: a client without a read timeout, for the subscription.
        breaker: see `CircuitBreaker`.
        channel: of this store.
        signer: signs and verifies with the store's peppers.
    """

    def __init__(
        self, client: Any, subscriber: Any, breaker: CircuitBreaker, channel: str, signer: Signer
    ) -> None:
        self._client = client
        self._subscriber = subscriber
        self._breaker = breaker
        self._channel = channel
        self._signer = signer

    async def publish(self, notice: Notice | None) -> None:
        signed = self._signer.sign(notice)
        await self._breaker.attempt(lambda: self._client.publish(self._channel, signed))

    async def subscribe(self, on_notice: OnNotice) -> None:
        while True:
            try:
                async with self._subscriber.pubsub(ignore_subscribe_messages=True) as subscription:
                    await subscription.subscribe(self._channel)
                    on_notice(None)
                    await self._receive(subscription, on_notice)
            except failures():
                await asyncio.sleep(_RETRY_SECONDS)

    async def _receive(self, subscription: Any, on_notice: OnNotice) -> None:
        while True:
            message = await subscription.get_message(timeout=_PING_SECONDS)
            if message is not None:
                on_notice(self._signer.verify(message["data"]))
            else:
                await subscription.ping()  # fails if the connection is dead

    async def close(self) -> None:
        await self._subscriber.aclose()


class StoreNotifier:
    """PostgreSQL's NOTIFY and LISTEN, for deployments without Redis."""

    def __init__(self, store: Store, signer: Signer) -> None:
        self._store = store
        self._signer = signer

    async def publish(self, notice: Notice | None) -> None:
        try:
            await self._store.invalidations.notify(self._signer.sign(notice).decode())
        except StoreUnavailable:
            return

    async def subscribe(self, on_notice: OnNotice) -> None:
        while True:
            try:
                await self._store.invalidations.listen(
                    lambda payload: on_notice(self._signer.verify(payload.encode()))
                )
            except StoreUnavailable:
                await asyncio.sleep(_RETRY_SECONDS)

    async def close(self) -> None:
        return None
