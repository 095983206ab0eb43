"""What is measured: a sidecar, over connections, or an engine in this process.

As in the middleware, a check that the engine decides from its local cache does not go through the
event loop; a cache miss is a task. As many run concurrently as there are clients.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from keylatch.authentication.authenticator import CacheMiss
from keylatch.core.decisions import Allow, Decision
from keylatch.core.refusals import ANSWERS
from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch_bench.connection import Address, Connection
from keylatch_bench.errors import BenchError
from keylatch_bench.load_generator import Client, Credential, Outcome, check

_PROXY_HEADERS: Final = (
    b"",
    b"X-Forwarded-Method: GET\r\nX-Forwarded-Uri: /\r\n",
    b"X-Original-Method: GET\r\nX-Original-URL: /\r\n",
)
"""What a sidecar may expect of proxies (`KEYLATCH_VERIFY_REQUEST`)."""


class SystemUnderTest(Protocol):
    """Checks keys."""

    clients: Sequence[Client]
    flood_clients: Sequence[Client]
    """As many others, so that the checks do not wait for clients that are busy with the flood."""

    async def open(self) -> None:
        """Connect or start.

        Raises:
            BenchError, KeylatchError: the target cannot be used.
        """

    async def first_check(self, credential: Credential) -> Outcome:
        """Check a valid key, and find the request headers with which it is allowed."""

    async def close(self) -> None:
        """Disconnect or stop."""


class Sidecar:
    """See `SystemUnderTest`.

    Args:
        address: of its `/verify`.
        connections: number of connections for checks, and as many for the flood.
    """

    def __init__(self, address: Address, connections: int) -> None:
        self._address = address
        self._connections = [Connection(address) for _ in range(2 * connections)]
        self.clients: Sequence[Client] = self._connections[:connections]
        self.flood_clients: Sequence[Client] = self._connections[connections:]

    async def open(self) -> None:
        for connection in self._connections:
            try:
                await connection.open()
            except OSError as error:
                wrong = f"cannot connect to {self._address}: {error.strerror or 'no answer'}"
                raise BenchError(
                    wrong, "is the sidecar running, and is that its address?"
                ) from None
        status = await check(self.clients[0], Credential(b"", 401))
        if status not in (401, 403):
            wrong = f"{self._address}/verify answers a request without a key with {status}"
            raise BenchError(wrong, "is that a keylatch sidecar?")

    async def first_check(self, credential: Credential) -> Outcome:
        outcome: Outcome = 403
        for headers in _PROXY_HEADERS:
            for connection in self._connections:
                connection.request_headers = headers
            outcome = await check(self.clients[0], credential)
            if outcome != 403:
                break
        return outcome

    async def close(self) -> None:
        for connection in self._connections:
            connection.cancel()


class EngineClient:
    """See `keylatch_bench.load_generator.Client`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._task: asyncio.Task[None] | None = None

    def check(self, credential: Credential, on_outcome: Callable[[Outcome], None]) -> None:
        values = [credential.value] if credential.value else []
        outcome = self._engine.authenticator.check_cached(values)
        if isinstance(outcome, CacheMiss):
            self._task = asyncio.create_task(self._check_miss(outcome, on_outcome))
        else:
            on_outcome(_status(outcome))

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _check_miss(self, miss: CacheMiss, on_outcome: Callable[[Outcome], None]) -> None:
        on_outcome(_status(await self._engine.authenticator.check(miss)))


def _status(decision: Decision) -> Outcome:
    return 200 if isinstance(decision, Allow) else ANSWERS[decision.reason].status


class InProcess:
    """See `SystemUnderTest`.

    Args:
        settings: store and Redis.
        checks: how many may run concurrently.
    """

    def __init__(self, settings: Settings, checks: int) -> None:
        self.engine = Engine(settings)
        self.clients: Sequence[Client] = [EngineClient(self.engine) for _ in range(checks)]
        self.flood_clients: Sequence[Client] = [EngineClient(self.engine) for _ in range(checks)]

    async def open(self) -> None:
        await self.engine.store.open(int(time.time() * 1000))  # raises why it cannot be opened
        await self.engine.start()

    async def first_check(self, credential: Credential) -> Outcome:
        return await check(self.clients[0], credential)

    async def close(self) -> None:
        await self.engine.stop()
