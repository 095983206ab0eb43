"""Calls that a key still has under way when it ends, over real sockets and four processes."""

import asyncio
import contextlib
import random
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.engine import make_url

from keylatch.authentication.hashing import Hasher
from keylatch.core.timestamps import datetime_of
from keylatch.engine import Engine
from keylatch.management.keyring import Created, Keyring
from keylatch.settings import Settings
from keylatch.storage.schema import invalidations, keys
from tests.support.engines import Times
from tests.support.raw_http import RawResponse, parse_response
from tests.support.servers import PostgresServer

pytestmark = pytest.mark.long

T = TypeVar("T")
WORKER = Path(__file__).parent.parent / "support" / "worker_sidecar.py"
PROCESSES = 4
CALLS = 25
"""Of each key, around its DELETE."""


class Deployment:
    """Four sidecars on one store, and an operator."""

    def __init__(self, store: str, *twin: str) -> None:
        self.store = store
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), store, *twin],
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(PROCESSES)
        ]
        self.ports = [
            int(process.stdout.readline()) for process in self._processes if process.stdout
        ]

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()
            if process.stdout:
                process.stdout.close()

    def operate(self, work: Callable[[Keyring], Awaitable[T]]) -> T:
        """What the operator does with the keyring, in this process."""

        async def run() -> T:
            engine = Engine(
                Settings.load(store=self.store, redis="", lease=0.5), hasher=Hasher("sha256")
            )
            try:
                return await work(await engine.keyring())
            finally:
                await engine.stop()

        return asyncio.run(run())

    def rows(self, *columns: Any) -> list[Any]:
        """What the store holds."""
        url = make_url(self.store)
        if url.get_backend_name() == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        engine = create_engine(url)
        with engine.connect() as connection:
            found = connection.execute(select(*columns)).all()
        engine.dispose()
        return list(found)


@contextlib.contextmanager
def deployed(store: str, *twin: str) -> Iterator[Deployment]:
    deployment = Deployment(store, *twin)
    try:
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("racing")
    with deployed(f"sqlite:///{folder}/keys.db") as deployment:
        yield deployment


@pytest.fixture(scope="module")
def on_postgresql(postgres: PostgresServer) -> Iterator[Deployment]:
    with deployed(postgres.new_database()) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def that_trusts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A broken twin: it does not judge the acting key again."""
    folder = tmp_path_factory.mktemp("racing")
    with deployed(f"sqlite:///{folder}/keys.db", "trusting") as deployment:
        yield deployment


class HeldCall:
    """A call whose header fields were sent and whose body was not."""

    def __init__(self, port: int, key: Created, method: str, path: str, body: bytes) -> None:
        self._body = body
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        fields = [
            f"{method} {path} HTTP/1.1",
            "Host: test",
            f"Authorization: Bearer {key.token.reveal()}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Expect: 100-continue",
            "Connection: close",
        ]
        self._socket.sendall("\r\n".join([*fields, "", ""]).encode())
        # The sidecar asks for the body once it has let the caller in (RFC 9110 section 10.1.1).
        self._received = self._socket.recv(65536)

    @property
    def is_held(self) -> bool:
        return self._received.startswith(b"HTTP/1.1 100 ")

    def finish(self) -> RawResponse:
        """Send the body; the answer."""
        if self.is_held:
            self._socket.sendall(self._body)
            self._received = b""
        while piece := self._socket.recv(65536):
            self._received += piece
        self._socket.close()
        return parse_response(self._received)


Ending = Callable[[Keyring, Created], Awaitable[object]]
ENDINGS: dict[str, Ending] = {
    "revoked": lambda keyring, key: keyring.delete(key.record.organization_id, key.record.id),
    "demoted": lambda keyring, key: keyring.change(
        key.record.organization_id, key.record.id, permission="SENDING"
    ),
    "disabled": lambda keyring, key: keyring.change(
        key.record.organization_id, key.record.id, active=False
    ),
    "organisation disabled": lambda keyring, key: keyring.set_organization_active(
        key.record.organization_id, False
    ),
    "everything revoked": lambda keyring, key: keyring.revoke_all(key.record.organization_id),
    "rotated": lambda keyring, key: keyring.rotate(key.record.organization_id, key.record.id),
    "expired": lambda keyring, key: keyring._store.keys.change(
        *(key.record.organization_id, key.record.id, keyring.now_ms()),
        {"expires_at": keyring.now_ms() - 1},
    ),
}
"""What happens while the body is on its way; no test moves the time by which keys expire."""

CALLS_WITH_BODIES = {
    "POST /v1/api-keys": b'{"name": "new"}',
    "PATCH /v1/api-keys/{id}": b'{"name": "renamed"}',
    "POST /v1/api-keys/{id}/rotate": b'{"graceSeconds": 60}',
    "POST /v1/api-keys/{id}/rotate/cancel": b"{}",
    "POST /v1/api-keys/{id}/rotate/finish": b"{}",
    "POST /v1/api-keys/revoke-all": b'{"reason": "a drill"}',
    "POST /v1/api_keys": b'{"name": "new"}',
}


class RacingContract:
    """What both stores promise."""

    @pytest.fixture
    def deployment(self) -> Deployment:
        raise AssertionError("each store has its own")

    @pytest.mark.parametrize("ending", ENDINGS)
    @pytest.mark.parametrize("operation", CALLS_WITH_BODIES)
    def test_a_key_that_ends_while_its_body_is_on_its_way_changes_nothing(
        self, deployment: Deployment, operation: str, ending: str
    ) -> None:
        """It was accepted after its header fields; the response is 401, or 403 for less rights."""
        organization = f"org-{operation.split('/', 1)[1]}-{ending}".translate(NAMELESS)

        async def prepare(keyring: Keyring) -> tuple[Created, str]:
            end = keyring.now_ms() + 60_000 if ending == "expired" else None
            key = await keyring.create(organization, "acting", expires_at=datetime_of(end))
            target = await keyring.create(organization, "target", expires_at=datetime_of(end))
            await keyring.rotate(organization, target.record.id, grace=timedelta(seconds=600))
            return key, target.record.id

        key, target = deployment.operate(prepare)
        method, path = operation.replace("{id}", target).split(" ")
        port = deployment.ports[len(operation + ending) % PROCESSES]
        call = HeldCall(port, key, method, path, CALLS_WITH_BODIES[operation])
        assert call.is_held
        deployment.operate(lambda keyring: ENDINGS[ending](keyring, key))
        before = snapshot(deployment, organization)
        answer = call.finish()
        insufficient = ending == "demoted" and not path.startswith("/v1/api_keys")
        assert answer.status == (403 if insufficient else 401), answer
        assert snapshot(deployment, organization) == before

    @pytest.mark.timeout(1_800)  # in full
    def test_no_effect_commits_after_the_delete(self, deployment: Deployment, times: Times) -> None:
        """Thousands of calls with keys that are being revoked, ordered by the store's sequence."""
        late, outcomes = race(deployment, times(500, 10_000))
        assert late == []
        assert outcomes[200] > 0
        assert outcomes[401] > 0
        assert outcomes.keys() <= {200, 401, 503}, outcomes


NAMELESS = str.maketrans({"/": "-", "{": "", "}": "", " ": "-"})


def snapshot(deployment: Deployment, organization: str) -> list[Any]:
    """All that a refused call must not touch; when a key was used is no part of it."""

    async def look(keyring: Keyring) -> list[Any]:
        keys = await keyring.list(organization, deleted=True)
        return [
            [replace(key.record, last_used=None, previous_last_used=None) for key in keys],
            await keyring.events(organization, 100),
        ]

    keys_and_deeds: list[Any] = deployment.operate(look)
    return keys_and_deeds


def race(deployment: Deployment, calls: int) -> tuple[list[str], Counter[int]]:
    """Keys that call while they are revoked.

    Returns:
        effects of a key that have a later sequence number than its DELETE, and how often each
        status was answered.
    """
    rounds = calls // CALLS

    async def prepare(keyring: Keyring) -> tuple[Created, list[tuple[Created, str]]]:
        admin = await keyring.create("racing", "admin")
        return admin, [
            (
                await keyring.create("racing", "acting"),
                (await keyring.create("racing", "target")).record.id,
            )
            for _ in range(rounds)
        ]

    admin, pairs = deployment.operate(prepare)
    deleted, outcomes = asyncio.run(_race(deployment.ports, admin, pairs))
    late = [
        f"a key created at {seq} by {creator}"
        for creator, seq in deployment.rows(keys.c.created_by, keys.c.created_seq)
        if seq > deleted.get(creator or "", seq)
    ]
    actors = {target: key.record.id for key, target in pairs}
    late += [
        f"a change of {key_id} at {seq}"
        for key_id, seq in deployment.rows(invalidations.c.key_id, invalidations.c.seq)
        if key_id in actors and seq > deleted[actors[key_id]]
    ]
    return late, outcomes


async def _race(
    ports: list[int], admin: Created, pairs: list[tuple[Created, str]]
) -> tuple[dict[str, int], Counter[int]]:
    deleted: dict[str, int] = {}
    outcomes: Counter[int] = Counter()
    chance = random.Random(1)
    limits = httpx.Limits(max_connections=200)
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60, limits=limits
                )
            )
            for port in ports
        ]

        async def call(key: Created, method: str, path: str, **body: Any) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key.token.reveal()}"}
            client = chance.choice(clients)
            answer = await client.request(method, path, headers=headers, **body)
            outcomes[answer.status_code] += 1
            return answer

        for key, target in pairs:
            kinds: list[tuple[str, str, dict[str, Any]]] = [
                ("POST", "/v1/api-keys", {"json": {"name": "late"}}),
                ("POST", "/v1/api_keys", {"json": {"name": "late"}}),
                ("PATCH", f"/v1/api-keys/{target}", {"json": {"name": "late"}}),
                ("POST", f"/v1/api-keys/{target}/rotate", {"json": {"graceSeconds": 0}}),
                ("POST", "/v1/api-keys", {"json": {"name": "late", "permission": "SENDING"}}),
            ]
            racing = [
                asyncio.ensure_future(call(key, method, path, **body))
                for method, path, body in (chance.choice(kinds) for _ in range(CALLS))
            ]
            await asyncio.wait(
                racing[: chance.randrange(1, CALLS)], return_when=asyncio.FIRST_COMPLETED
            )
            path = f"/v1/api-keys/{key.record.id}"
            while (answer := await call(admin, "DELETE", path)).status_code == 503:
                pass
            deleted[key.record.id] = answer.json()["revocation"]["seq"]
            await asyncio.gather(*racing)
    return deleted, outcomes


class TestSQLite(RacingContract):
    """One file on one host."""

    @pytest.fixture
    def deployment(self, on_sqlite: Deployment) -> Deployment:
        return on_sqlite


@pytest.mark.service("postgres")
class TestPostgreSQL(RacingContract):
    """A server."""

    @pytest.fixture
    def deployment(self, on_postgresql: Deployment) -> Deployment:
        return on_postgresql


class TestTheTwin:
    """A deployment that does not judge the acting key again in the transaction."""

    @pytest.fixture
    def deployment(self, that_trusts: Deployment) -> Deployment:
        return that_trusts

    def test_it_commits_effects_after_the_delete(self, deployment: Deployment) -> None:
        """The same race finds them."""
        late, _ = race(deployment, 500)
        assert late

    def test_it_takes_a_body_that_came_late(self, deployment: Deployment) -> None:
        """And makes a key for a revoked one."""
        key = deployment.operate(lambda keyring: keyring.create("late", "acting"))
        body = CALLS_WITH_BODIES["POST /v1/api-keys"]
        call = HeldCall(deployment.ports[0], key, "POST", "/v1/api-keys", body)
        deployment.operate(lambda keyring: ENDINGS["revoked"](keyring, key))
        assert call.finish().status == 200
