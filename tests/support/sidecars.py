"""A sidecar on a real socket."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Iterator
from typing import Any

import httpx

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.settings import Settings
from keylatch_sidecar.app import create_app
from tests.support.clock import Clock
from tests.support.servers import serving


class Sidecar:
    """A sidecar on a real socket, and its operator, who makes the first key of an organisation."""

    def __init__(
        self, url: str, probes: str, clock: Clock, operator: Engine, runner: asyncio.Runner
    ) -> None:
        self.url = url
        self._probes = probes
        self.clock = clock
        self._operator = operator
        self._runner = runner
        self._numbers = itertools.count(1)

    def create(self, organization: str = "", name: str = "Admin key", **fields: Any) -> Created:
        """A key, of a new organisation where none is named."""
        organization = organization or f"organization-{next(self._numbers)}"

        async def create() -> Created:
            keyring = await self._operator.keyring()
            created = await keyring.create(organization, name, **fields)
            if self._operator.store.is_shared:  # a member that does not run is waited for
                await self._operator.stop()
            return created

        return self._runner.run(create())

    def client(self, key: Created | None = None) -> httpx.Client:
        """An HTTP client that sends this key."""
        headers = {"Authorization": f"Bearer {key.token.reveal()}"} if key else {}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=30, trust_env=False, verify=False
        )

    def probe(self) -> httpx.Client:
        """An HTTP client without a key, at the listener for metrics."""
        return httpx.Client(base_url=self._probes, timeout=30, trust_env=False)


@contextlib.contextmanager
def sidecar_on(store_url: str, clock: Clock, **settings: Any) -> Iterator[Sidecar]:
    """A sidecar that is served until the end of the block."""

    def engine() -> Engine:
        return Engine(
            Settings.load(**{"store": store_url, "redis": "", **settings}),
            clock=clock,
            timer=clock,
            hasher=Hasher("argon2id", CHEAPEST),
        )

    probes = socket.create_server(("127.0.0.1", 0))
    port = probes.getsockname()[1]
    app = create_app(engine(), metrics_address=port)
    with serving(app, [probes]) as url, asyncio.Runner() as runner:
        operator = engine()
        yield Sidecar(url, f"http://127.0.0.1:{port}", clock, operator, runner)
        runner.run(operator.stop())
