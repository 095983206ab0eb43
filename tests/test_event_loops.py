"""An engine belongs to one event loop at a time: another one starts it anew, or is refused."""

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from keylatch._background import EngineTasks
from keylatch.adapters.portal import Portal
from keylatch.asgi import APIKeyMiddleware
from keylatch.core.decisions import Allow, Deny, Reason
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.errors import WrongEventLoop
from keylatch.management.keyring import Created
from keylatch.wsgi import APIKeyMiddleware as WSGIMiddleware
from tests.support.clock import Clock
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer

T = TypeVar("T")


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.new_database()
    return f"sqlite:///{tmp_path}/keys.db"


def bearer(token: Token) -> list[bytes]:
    return [b"Bearer " + token.reveal().encode()]


async def create(engine: Engine) -> Created:
    return await (await engine.keyring()).create("acme", "ci")


async def last_used(make_engine: MakeEngine, key: Created) -> datetime | None:
    """What another process finds in the store."""
    async with make_engine() as other:
        record = await (await other.keyring()).get("acme", key.record.id)
    assert record is not None
    return record.last_used


@contextmanager
def loop_on_a_thread() -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
    """Another event loop of this process, which goes on until the end of the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_an_engine_is_a_context(make_engine: MakeEngine) -> None:
    """`async with` starts it and stops it: what was used inside is stored."""

    async def scenario() -> datetime | None:
        async with make_engine() as engine:
            key = await create(engine)
            assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
        return await last_used(make_engine, key)

    assert asyncio.run(scenario()) is not None


def use_on_a_loop_of_its_own(engine: Engine, make_engine: MakeEngine) -> datetime | None:
    """What is stored after a loop ended without a stop of the engine."""

    async def use() -> Created:
        key = await create(engine)
        assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
        return key

    return asyncio.run(last_used(make_engine, asyncio.run(use())))


def test_the_end_of_the_loop_stores_what_was_used(make_engine: MakeEngine) -> None:
    """`asyncio.run` without a stop loses no use."""
    assert use_on_a_loop_of_its_own(make_engine(), make_engine) is not None


class IgnoresTheLoop(EngineTasks):
    """The broken twin: nothing happens when the loop ends."""

    def stop_with_loop(self, stop_engine: object) -> None:
        return None


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_twin_that_ignores_the_end_of_the_loop_loses_uses(make_engine: MakeEngine) -> None:
    """So the test above holds something."""
    engine = make_engine()
    engine._tasks = IgnoresTheLoop()
    assert use_on_a_loop_of_its_own(engine, make_engine) is None
    del engine
    gc.collect()  # nothing has closed its connections


def test_each_loop_starts_the_engine_anew(make_engine: MakeEngine) -> None:
    """Loops one after the other, as a test for each: every check is answered, and a revocation in
    between holds."""
    engine = make_engine()
    key = asyncio.run(create(engine))
    for _ in range(3):
        assert isinstance(asyncio.run(engine.authenticate(bearer(key.token))), Allow)

    async def revoke() -> None:
        async with make_engine() as other:
            assert await (await other.keyring()).delete("acme", key.record.id)

    asyncio.run(revoke())
    assert asyncio.run(engine.authenticate(bearer(key.token))) == Deny(Reason.REVOKED)


def test_a_test_client_without_with_works(make_engine: MakeEngine) -> None:
    """FastAPI's own way to test has an event loop for each request: 200 each time."""
    engine = make_engine()
    app = FastAPI()
    app.add_middleware(APIKeyMiddleware, engine=engine)
    app.add_api_route("/me", lambda: "hello")
    key = asyncio.run(create(engine))
    client = TestClient(app)
    headers = {"Authorization": bearer(key.token)[0].decode()}
    assert [client.get("/me", headers=headers).status_code for _ in range(4)] == [200] * 4
    assert asyncio.run(last_used(make_engine, key)) is not None


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_loop_that_was_closed_with_its_tasks_is_left_behind(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing runs when a loop is closed with tasks on it. The next loop starts the engine anew,
    says so, and the use is stored by the next stop."""
    engine, loop = make_engine(), asyncio.new_event_loop()
    key = loop.run_until_complete(create(engine))
    assert isinstance(loop.run_until_complete(engine.authenticate(bearer(key.token))), Allow)
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    assert isinstance(asyncio.run(stop_and_check(engine, key)), Allow)
    assert "the event loop was closed before engine.stop(): the engine starts again" in (
        caplog.messages
    )
    assert asyncio.run(last_used(make_engine, key)) is not None
    del engine, loop, tasks, task
    gc.collect()  # nothing can close psycopg's connections to a loop that is gone


async def stop_and_check(engine: Engine, key: Created) -> Any:
    await engine.stop()
    decision = await engine.authenticate(bearer(key.token))
    await engine.stop()
    return decision


def test_a_second_loop_beside_the_first_is_refused(
    make_engine: MakeEngine, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A start says what to do; a request that is no hit gets 503, and the log says it once."""
    engine = make_engine()
    with loop_on_a_thread() as run:
        key = run(create(engine))
        with pytest.raises(WrongEventLoop, match="create one Engine for each event loop"):
            asyncio.run(engine.start())
        with pytest.raises(WrongEventLoop):
            asyncio.run(engine.stop())
        for _ in range(2):
            decision = asyncio.run(engine.authenticate(bearer(key.token)))
            assert decision == Deny(Reason.UNAVAILABLE)
        refused = [message for message in caplog.messages if "each event loop" in message]
        assert len(refused) == 1
        assert isinstance(run(engine.authenticate(bearer(key.token))), Allow)
        run(engine.stop())


def test_one_engine_for_an_asgi_and_a_wsgi_app_is_refused(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """The WSGI app's requests run on a loop of their own: the ASGI app does not start, and the log
    says what to do."""
    engine = make_engine()
    wsgi = WSGIMiddleware(lambda environ, start: [b"hello"], engine=engine)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "SCRIPT_NAME": ""}
    list(wsgi(environ | {"HTTP_AUTHORIZATION": f"Bearer kl_live_{'x' * 40}"}, lambda *_: print))
    wsgi._portal.run(engine.start())
    app = FastAPI()
    app.add_middleware(APIKeyMiddleware, engine=engine)
    with pytest.raises(WrongEventLoop, match="create one Engine"), TestClient(app):
        pass
    wsgi.close()


def test_a_wsgi_app_beside_a_running_asgi_app_is_refused_with_503(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """The other way round: a request that is no hit gets 503, and the log says why."""
    caplog.set_level(logging.WARNING)
    engine, answers = make_engine(), []

    def start_response(status: str, *_: Any) -> Callable[[bytes], object]:
        answers.append(status)
        return print

    with loop_on_a_thread() as run:
        key = run(create(engine))
        wsgi = WSGIMiddleware(lambda environ, start: [b"hello"], engine=engine)
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/",
            "SCRIPT_NAME": "",
            "HTTP_AUTHORIZATION": bearer(key.token)[0].decode(),
        }
        list(wsgi(environ, start_response))
        assert answers == ["503 Service Unavailable"]
        assert any("create one Engine for each event loop" in each for each in caplog.messages)
        run(engine.stop())
    wsgi.close()


def test_a_portal_beside_another_loop_ends_and_leaves_the_engine(make_engine: MakeEngine) -> None:
    """The portal of an engine that runs on another loop ends its thread without an exception, and
    the engine goes on."""
    engine = make_engine()
    with loop_on_a_thread() as run:
        key = run(create(engine))
        portal = Portal.for_engine(engine)
        with pytest.raises(WrongEventLoop):
            portal.run(engine.start())
        thread = portal._thread
        portal.close()
        assert thread is not None
        assert not thread.is_alive()
        assert isinstance(run(engine.authenticate(bearer(key.token))), Allow)
        run(engine.stop())
