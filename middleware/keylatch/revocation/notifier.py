"""Notifiers: publish to every process that the log has new rows. A lost notice does no harm.

Notices go through Redis where it is configured, else through PostgreSQL. With them a revocation
takes effect in milliseconds; without them every process still polls four times in a lease period. A
payload without rows, or without a valid MAC, makes a process poll the store.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Protocol

from keylatch.caches.redis_client import CircuitBreaker, explain, failures
from keylatch.errors import StoreUnavailable
from keylatch.revocation.notices import Notice, Signer
from keylatch.storage.store import Store
from keylatch.telemetry.health import Health

_RETRY_SECONDS: Final = 1.0
_PING_SECONDS: Final = 3.0
_REPLY_SECONDS: Final = 2.0
_RECOVERY_SECONDS: Final = 5.0

OnNotice = Callable[[Notice | None], None]


class Notifier(Protocol):
    """Publishes notices and receives those of other processes."""

    health: Health
    """Whether it receives notices."""

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
        clock: seconds since the Unix epoch.
    """

    def __init__(
        self,
        client: Any,
        subscriber: Any,
        breaker: CircuitBreaker,
        channel: str,
        signer: Signer,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.health = _health("Redis", clock, _RECOVERY_SECONDS)
        self._client = client
        self._subscriber = subscriber
        self._breaker = breaker
        self._channel = channel
        self._signer = signer
        self._limit: asyncio.Timeout | None = None
        breaker.on_new_primary = self._subscribe_anew

    async def publish(self, notice: Notice | None) -> None:
        signed = self._signer.sign(notice)
        await self._breaker.attempt("PUBLISH", lambda: self._client.publish(self._channel, signed))

    async def subscribe(self, on_notice: OnNotice) -> None:
        while True:
            async with self._until_new_primary():
                try:
                    async with self._subscriber.pubsub() as subscription:
                        await subscription.subscribe(self._channel)
                        await self._receive(subscription, on_notice)
                except failures() as error:
                    self.health.record_failure(*explain(error))
                    await asyncio.sleep(_RETRY_SECONDS)

    @asynccontextmanager
    async def _until_new_primary(self) -> AsyncIterator[None]:
        # A host that is gone closes no connection, and the pause after a failure need not end.
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(None) as self._limit:
                    yield
        finally:
            self._limit = None

    def _subscribe_anew(self) -> None:
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def _receive(self, subscription: Any, on_notice: OnNotice) -> None:
        while True:
            message = await subscription.get_message(timeout=_PING_SECONDS)
            if message is None:
                # The reply is a message, too. A host that is gone closes no connection.
                await subscription.ping()
                message = await subscription.get_message(timeout=_REPLY_SECONDS)
            if message is None:
                raise TimeoutError
            self.health.record_success()
            if message["type"] == "subscribe":
                on_notice(None)
            elif message["type"] == "message":
                on_notice(self._signer.verify(message["data"]))

    async def close(self) -> None:
        await self._subscriber.aclose()


class StoreNotifier:
    """PostgreSQL's NOTIFY and LISTEN, for deployments without Redis.

    Args:
        store: publishes and listens.
        signer: signs and verifies with the store's peppers.
        clock: seconds since the Unix epoch.
    """

    def __init__(
        self, store: Store, signer: Signer, clock: Callable[[], float] = time.time
    ) -> None:
        self.health = _health("the store", clock, 0.0)
        self._store = store
        self._signer = signer

    async def publish(self, notice: Notice | None) -> None:
        try:
            await self._store.invalidations.notify(self._signer.sign(notice).decode())
        except StoreUnavailable:
            return

    async def subscribe(self, on_notice: OnNotice) -> None:
        def on_payload(payload: str) -> None:
            self.health.record_success()
            on_notice(self._signer.verify(payload.encode()))

        while True:
            try:
                await self._store.invalidations.listen(on_payload)
            except StoreUnavailable as error:
                self.health.record_failure(error.message, error.hint)
                await asyncio.sleep(_RETRY_SECONDS)

    async def close(self) -> None:
        return None


def _health(source: str, clock: Callable[[], float], recovery_seconds: float) -> Health:
    return Health(
        f"cannot receive notices from {source} (revocations wait for the next poll)",
        f"receives notices from {source} again",
        recovery_seconds=recovery_seconds,
        clock=clock,
    )
