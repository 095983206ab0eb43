"""A WebSocket is as good as the key that opened it, for as long as it is open."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from chat_app import chat
from keylatch.asgi import APIKeyMiddleware
from keylatch.core.decisions import Requirement
from keylatch.core.timestamps import datetime_of
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.revocation.open_connections import OpenConnections
from keylatch.storage.store import Store
from tests.support.clock import Clock
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer, eventually, serving

seen: list[str] = []


async def talk(websocket: WebSocket) -> None:
    """Never listens, only talks."""
    await websocket.accept()
    try:
        while True:
            await websocket.send_text("tick")
            await asyncio.sleep(0.01)
    except WebSocketDisconnect:
        seen.append("closed")


class Manager:
    """Makes and revokes keys, from another process's point of view."""

    def __init__(self, engine: Engine, runner: asyncio.Runner) -> None:
        self._engine = engine
        self._runner = runner

    def create(self, **fields: Any) -> Created:
        return self._runner.run(self._create(fields))

    async def _create(self, fields: dict[str, Any]) -> Created:
        keyring = await self._engine.keyring()
        return await keyring.create("default", "chat", **fields)

    def change(self, key: Created, **values: Any) -> None:
        self._runner.run(self._change(key, values))

    async def _change(self, key: Created, values: dict[str, Any]) -> None:
        await (await self._engine.keyring()).change("default", key.record.id, **values)

    def revoke(self, key: Created) -> None:
        self._runner.run(self._revoke(key))

    async def _revoke(self, key: Created) -> None:
        await (await self._engine.keyring()).delete("default", key.record.id)


@contextmanager
def chatting(make_engine: MakeEngine, **options: Any) -> Iterator[tuple[str, Manager]]:
    """The example app and a talkative one on a real socket, and who manages the keys."""

    def engine() -> Engine:
        store = options.get("store")
        return make_engine(**{**options, "store": store and Store(store)})

    routes = [("/chat", chat), ("/rooms/{room}", chat), ("/talk", talk)]
    app = Starlette(routes=[WebSocketRoute(*each) for each in routes])
    rules = {"SENDING": ["GET /chat", "GET /rooms/{room}"]}
    app.add_middleware(APIKeyMiddleware, engine=engine(), permissions=rules)
    with serving(app) as url, asyncio.Runner() as runner:
        manager = engine()
        yield url.replace("http", "ws"), Manager(manager, runner)
        runner.run(manager.stop())


def opened(url: str, key: Created) -> ClientConnection:
    headers = {"Authorization": f"Bearer {key.token.reveal()}"}
    return connect(url, additional_headers=headers, proxy=None)


def ended(connection: ClientConnection) -> tuple[int, str]:
    """How it was closed, whatever still came before that."""
    try:
        while True:
            connection.recv(timeout=10)
    except ConnectionClosed as closed:
        return (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (0, "cut off")


REVOKED = (1008, "The API key is not valid any more")


@pytest.fixture(params=["sqlite", "postgresql"])
def chats(request: pytest.FixtureRequest, make_engine: MakeEngine) -> Iterator[tuple[str, Manager]]:
    options: dict[str, Any] = {}
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        options["store"] = server.new_database()
    with chatting(make_engine, **options) as chats:
        yield chats


@pytest.mark.long
def test_a_revoke_closes_what_the_key_has_open_and_nothing_else(
    chats: tuple[str, Manager],
) -> None:
    """Whether the app listens or talks; it receives the disconnect."""
    url, manager = chats
    key, other = manager.create(), manager.create()
    seen.clear()
    with ExitStack() as stack:
        chat, talk, unmoved = (
            stack.enter_context(opened(url + path, of))
            for path, of in (("/chat", key), ("/talk", key), ("/chat", other))
        )
        greetings = (chat.recv(), talk.recv(), unmoved.recv())
        assert greetings == ("hello chat", "tick", "hello chat")
        chat.send("still there?")
        assert chat.recv() == "still there?"
        manager.revoke(key)
        assert ended(chat) == REVOKED
        assert ended(talk) == REVOKED
        unmoved.send("me too?")
        assert unmoved.recv() == "me too?"
    eventually(lambda: seen == ["closed"])


@pytest.mark.long
def test_whatever_ends_a_key_ends_its_connections(make_engine: MakeEngine, clock: Clock) -> None:
    """Disabled, expired, or left with too small a permission."""
    with chatting(make_engine) as (url, manager):
        expires_at = int((clock() + 60) * 1000)
        expiring, disabled = manager.create(expires_at=datetime_of(expires_at)), manager.create()
        smaller = manager.create()
        with ExitStack() as stack:
            one, two, three = (
                stack.enter_context(opened(f"{url}/talk", key))
                for key in (expiring, disabled, smaller)
            )
            clock.tick(61)
            assert ended(one) == REVOKED
            manager.change(disabled, active=False)
            assert ended(two) == REVOKED
            manager.change(smaller, permission="SENDING")
            assert ended(three) == REVOKED


@pytest.mark.long
def test_what_still_suffices_keeps_a_connection_open(make_engine: MakeEngine) -> None:
    """A key with FULL that becomes one for SENDING, where a rule opens the path for that: also by
    a rule with a parameter."""
    with chatting(make_engine) as (url, manager):
        key = manager.create()
        with opened(f"{url}/rooms/7", key) as room, opened(f"{url}/talk", key) as talking:
            assert room.recv() == "hello chat"
            manager.change(key, permission="SENDING")
            assert ended(talking) == REVOKED
            room.send("still there?")
            assert room.recv() == "still there?"


@pytest.mark.anyio
async def test_a_token_that_went_bad_before_it_was_watched_ends_at_once() -> None:
    """Between the check and the watch there is a gap; what falls into it is found."""
    answers = iter([False])

    class Checker:
        async def is_still_allowed(self, token: Any, requirement: Requirement) -> bool:
            return next(answers)

    class Fresh:
        def is_fresh(self) -> bool:
            return True

    watch = OpenConnections(60)
    looking = asyncio.create_task(watch.run(Fresh(), Checker()))  # type: ignore[arg-type]
    with watch.track("token", Requirement()) as event:  # type: ignore[arg-type]
        await asyncio.wait_for(event.wait(), 10)
    looking.cancel()


@pytest.mark.anyio
async def test_an_outage_ends_nothing(make_engine: MakeEngine, store_url: str) -> None:
    """No process knows that the key is bad: an open connection is no new decision."""
    engine = make_engine()
    key = await (await engine.keyring()).create("default", "chat")
    values = [b"Bearer " + key.token.reveal().encode()]
    await engine.authenticate(values)
    token = key.token
    assert await engine.authenticator.is_still_allowed(token, Requirement())
    await engine.store.close()
    engine._l1.clear()
    engine.store = make_engine().store
    engine._opened = None
    engine._retry_start_at = float("inf")
    assert await engine.authenticator.is_still_allowed(token, Requirement())
    await engine.stop()
