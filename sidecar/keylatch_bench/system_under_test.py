"""What is measured: a sidecar over its connections, or an engine in this process.

In process a check that the engine answers at once takes no trip through the event loop, as in the
middleware; one that it cannot is a task, and as many run at a time as there are lines.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from keylatch.core.decisions import Allow, Decision
from keylatch.core.refusals import ANSWERS
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch_bench.connection import Address, Connection, Unusable
from keylatch_bench.load_generator import Client, Credential, Outcome, check

_PROXY_HEADERS: Final = (
    b"",
    b"X-Forwarded-Method: GET\r\nX-Forwarded-Uri: /\r\n",
    b"X-Original-Method: GET\r\nX-Original-URL: /\r\n",
)
"""What a sidecar may expect of the proxies that ask it (`KEYLATCH_VERIFY_REQUEST`)."""


class Subject(Protocol):
    """Whatever checks keys."""

    clients: Sequence[Client]
    flood_clients: Sequence[Client]
    """As many again, so that a flood does not wait in the way of the checks that it disturbs."""

    async def open(self) -> None:
        """Make sure that it is there.

        Raises:
            Unusable, KeylatchError: it is not.
        """

    async def first_check(self, credential: Credential) -> Outcome:
        """The first check of a good key; see to it that it can be allowed."""

    async def close(self) -> None:
        """Let it go."""


class Sidecar:
    """See `Subject`.

    Args:
        address: where it answers `/verify`.
        connections: how many to keep.
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
                raise Unusable(wrong, "is the sidecar running, and is that its address?") from None
        nobody = await check(self.clients[0], Credential(b"", 401))
        if nobody not in (401, 403):
            wrong = f"{self._address}/verify answers a call without a key with {nobody}"
            raise Unusable(wrong, "is that a keylatch sidecar?")

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
        known = self._engine.check_cached([credential.value] if credential.value else [])
        if isinstance(known, Token):
            self._task = asyncio.create_task(self._check_miss(known, on_outcome))
        else:
            on_outcome(_status(known))

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _check_miss(self, token: Token, on_outcome: Callable[[Outcome], None]) -> None:
        on_outcome(_status(await self._engine.check(token)))


def _status(decision: Decision) -> Outcome:
    return 200 if isinstance(decision, Allow) else ANSWERS[decision.reason].status


class InProcess:
    """See `Subject`.

    Args:
        settings: store and Redis.
        checks: how many may run at a time.
    """

    def __init__(self, settings: Settings, checks: int) -> None:
        self.engine = Engine(settings)
        self.clients: Sequence[Client] = [EngineClient(self.engine) for _ in range(checks)]
        self.flood_clients: Sequence[Client] = [EngineClient(self.engine) for _ in range(checks)]

    async def open(self) -> None:
        await self.engine.store.open(int(time.time() * 1000))  # tells why it cannot
        await self.engine.start()

    async def first_check(self, credential: Credential) -> Outcome:
        return await check(self.clients[0], credential)

    async def close(self) -> None:
        await self.engine.stop()
