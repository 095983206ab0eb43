"""The ASGI middleware around Starlette and FastAPI apps: decisions, principals, lifespan."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from keylatch.asgi import APIKeyMiddleware
from keylatch.core.decisions import Principal
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError
from keylatch.management.keyring import Created
from keylatch.storage.store import Secrets, Store
from tests.support.engines import MakeEngine
from tests.support.raw_http import Header, asgi_request, http_scope, lifespan
from tests.support.servers import serving

RULES = {"SENDING": ["POST /v1/emails", "GET /v1/emails"]}


async def whoami(request: Request) -> Response:
    user = request.user
    return JSONResponse({"name": user.display_name, "in": user.is_authenticated})


@requires("SENDING")
async def sending(request: Request) -> Response:
    return Response("sent")


def starlette_app(engine: Engine) -> Starlette:
    everything = ["GET", "POST", "DELETE"]
    app = Starlette(
        routes=[
            Route("/v1/emails", sending, methods=everything),
            Route("/{path:path}", whoami, methods=everything),
        ]
    )
    app.add_middleware(APIKeyMiddleware, engine=engine, public=["/healthz"], permissions=RULES)
    return app


def fastapi_app(engine: Engine) -> FastAPI:
    app = FastAPI(openapi_url=None)
    app.add_middleware(APIKeyMiddleware, engine=engine, public=["/healthz"], permissions=RULES)
    everything = ["GET", "HEAD", "POST", "DELETE"]
    app.add_api_route("/v1/emails", sending, methods=everything)
    app.add_api_route("/{path:path}", whoami, methods=everything)
    return app


Build = Callable[[Engine], ASGIApp]
both = pytest.mark.parametrize("build", [starlette_app, fastapi_app])


async def create(engine: Engine, permission: str = "FULL") -> Created:
    """A key; READING is one of an older configuration, which no rule names any more."""
    created = await (await engine.keyring()).create("default", f"my {permission}")
    await engine.store.keys.change("default", created.record.id, 0, {"permission": permission})
    return created


def auth_header(key: Created) -> list[Header]:
    return [(b"authorization", b"Bearer " + key.token.reveal().encode())]


@both
@pytest.mark.anyio
async def test_the_app_learns_who_is_calling(engine: Engine, build: Build) -> None:
    """`request.user` is the key's principal, `request.auth.scopes` what it may do."""
    seen: list[Any] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend((Request(scope).user, Request(scope).auth.scopes))
        await Response()(scope, receive, send)

    key = await create(engine, "SENDING")
    app = APIKeyMiddleware(inner, engine=engine, permissions=RULES)
    assert (await asgi_request(app, "/v1/emails", auth_header(key))).status == 200
    user, scopes = seen
    expected = Principal(key.record.id, "my SENDING", "default", "SENDING", "live")
    assert user == expected
    assert (user.is_authenticated, user.display_name, user.identity) == (
        *(True, "my SENDING"),
        key.record.id,
    )
    assert list(scopes) == ["authenticated", "SENDING"]
    answer = await asgi_request(build(engine), "/anything", auth_header(await create(engine)))
    assert json.loads(answer.body) == {"name": "my FULL", "in": True}


@both
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("permission", "method", "path", "status"),
    [
        *(("FULL", method, "/v1/emails", 200) for method in ("GET", "POST", "DELETE")),
        ("FULL", "GET", "/v1/domains", 200),
        ("SENDING", "POST", "/v1/emails", 200),
        ("SENDING", "HEAD", "/v1/emails", 200),
        ("SENDING", "DELETE", "/v1/emails", 403),
        ("SENDING", "POST", "/v1/emails/", 403),
        ("SENDING", "GET", "/v1/domains", 403),
        ("READING", "GET", "/v1/emails", 403),
        ("READING", "GET", "/v1/domains", 403),
        ("", "GET", "/v1/emails", 403),
    ],
)
async def test_a_permission_allows_what_is_named_for_it(
    engine: Engine, build: Build, permission: str, method: str, path: str, status: int
) -> None:
    """FULL may do everything, also what `@requires("SENDING")` guards; the others fail closed."""
    key = await create(engine, permission)
    assert (
        await asgi_request(build(engine), path, auth_header(key), method=method)
    ).status == status


@pytest.mark.anyio
async def test_requires_guards_what_the_rules_forgot(make_engine: MakeEngine) -> None:
    """The rules open a route to two permissions, `@requires` to one: both must agree."""
    engine = make_engine(permissions="FULL,SENDING,READING")
    app = Starlette(routes=[Route("/v1/emails", sending)])
    rules = {"SENDING": ["GET /v1/emails"], "READING": ["GET /v1/emails"]}
    app.add_middleware(APIKeyMiddleware, engine=engine, permissions=rules)
    reader = await create(engine, "READING")
    assert (await asgi_request(app, "/v1/emails", auth_header(reader))).status == 403
    sender = await create(engine, "SENDING")
    assert (await asgi_request(app, "/v1/emails", auth_header(sender))).body == b"sent"
    await engine.stop()


@both
@pytest.mark.anyio
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_public_path_needs_no_key_and_gives_no_rights(
    engine: Engine, build: Build, method: str
) -> None:
    """Without I/O and without a principal, whatever credential the request has."""
    assert (await asgi_request(build(engine), "/healthz", method=method)).status == 200
    key = await create(engine)
    for headers in (auth_header(key), [(b"authorization", b"Bearer made up")]):
        answer = await asgi_request(build(engine), "/healthz", headers)
        assert json.loads(answer.body) == {"name": "", "in": False}


@both
@pytest.mark.anyio
@pytest.mark.parametrize(
    "path", ["/healthz/", "/healthzz", "/healthz/x", "//healthz", "/HEALTHZ", "/healthz%00", "/"]
)
async def test_the_neighbours_of_a_public_path_are_guarded(
    engine: Engine, build: Build, path: str
) -> None:
    """Exactly that path, because routers differ in what else they take for it."""
    assert (await asgi_request(build(engine), path)).status == 401


@pytest.mark.anyio
async def test_a_mounted_app_names_its_own_paths(engine: Engine) -> None:
    """Below a mount, rules and public paths are those that the mounted app's router sees."""
    outer = Starlette(routes=[Mount("/api", starlette_app(engine)), Route("/healthz", whoami)])
    assert (await asgi_request(outer, "/api/healthz")).status == 200
    assert (await asgi_request(outer, "/api/api/healthz")).status == 401
    assert (await asgi_request(outer, "/api/v1/emails")).status == 401
    key = await create(engine, "SENDING")
    assert (await asgi_request(outer, "/api/v1/emails", auth_header(key))).body == b"sent"
    assert (await asgi_request(outer, "/api/api/v1/emails", auth_header(key))).status == 403


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["lifespan.2", "webtransport", "", "HTTP"])
async def test_scopes_of_another_kind_pass_through_untouched(engine: Engine, kind: str) -> None:
    """What is neither HTTP nor a WebSocket is none of our business."""
    passed: list[Scope] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope)

    scope = {"type": kind}
    await APIKeyMiddleware(inner, engine=engine)(scope, _no_message, _not_sent)
    assert passed[0] is scope
    assert scope == {"type": kind}


@pytest.mark.anyio
async def test_the_callers_scope_is_not_written_on(engine: Engine) -> None:
    """The caller's scope is unchanged, headers included."""
    key = await create(engine)
    headers = [*auth_header(key), (b"x-keylatch-key-id", b"evil")]
    for path in ("/healthz", "/v1/domains"):
        scope = http_scope(path, headers)
        before = {**scope, "headers": list(headers)}
        messages: list[Message] = []

        async def send(message: Message, messages: list[Message] = messages) -> None:
            messages.append(message)

        inner = Starlette(routes=[Route(path, whoami)])
        app = APIKeyMiddleware(inner, engine=engine, public=["/healthz"])
        await app(scope, _no_message, send)
        assert messages[0]["status"] == 200
        assert scope == before


async def _no_message() -> Message:
    raise AssertionError("the app must not receive")


async def _not_sent(message: Message) -> None:
    raise AssertionError(f"the app must not send {message}")


@pytest.mark.anyio
async def test_two_middlewares_with_different_stores_keep_to_themselves(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    """Nothing is global: a key of one app opens no other app in the same process."""
    one, other = make_engine(), make_engine(store=Store(f"sqlite:///{tmp_path}/other.db"))
    keys = [await create(one), await create(other)]
    apps = [APIKeyMiddleware(starlette_app(engine), engine=engine) for engine in (one, other)]
    statuses = [
        [(await asgi_request(app, "/", auth_header(key))).status for key in keys] for app in apps
    ]
    assert statuses == [[200, 401], [401, 200]]
    for engine in (one, other):
        await engine.stop()


def test_every_wrong_setting_and_rule_is_reported_at_once() -> None:
    """Settings, public paths and rules are wrong in one and the same message."""
    with pytest.raises(ConfigurationError) as caught:
        APIKeyMiddleware(
            Starlette(),
            store="mysql://db",
            redis="cache",
            lease=0,
            hasher="md5",
            realm='"',
            environment="LIVE",
            public=["/docs/*"],
            permissions={"SENDING": ["/v1/emails"]},
        )
    names = [wrong.split(":")[0] for wrong, _ in caught.value.mistakes]
    assert len(names) == 8
    for name in ("STORE", "REDIS", "LEASE", "HASHER", "REALM", "ENVIRONMENT"):
        assert f"KEYLATCH_{name}" in names


def test_the_realm_is_ones_own(tmp_path: Path) -> None:
    """Challenges name the realm of the setting."""
    store = f"sqlite:///{tmp_path}/keys.db"
    with serving(APIKeyMiddleware(Starlette(), store=store, redis="", realm="my API")) as url:
        assert httpx.get(url).headers["www-authenticate"] == 'Bearer realm="my API"'


# Its life


class CallLogStore(Store):
    """A store that notes when it is opened and closed."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.recorded: list[str] = []

    async def open(self, now_ms: int) -> Secrets:
        self.recorded.append("opened")
        return await super().open(now_ms)

    async def close(self) -> None:
        self.recorded.append("closed")
        await super().close()


class Life:
    """What happens to an app; it may fail at either end."""

    def __init__(self, call_log: CallLogStore, *, fails: str = "") -> None:
        self._call_log = call_log
        self._fails = fails

    @asynccontextmanager
    async def __call__(self, app: Starlette) -> AsyncIterator[None]:
        self._note("started")
        yield
        self._note("stopped")

    def _note(self, event: str) -> None:
        self._call_log.recorded.append(event)
        if event == self._fails:
            raise RuntimeError(f"the app's own {event}")


@pytest.fixture
def call_log(store_url: str) -> CallLogStore:
    return CallLogStore(store_url)


@pytest.mark.anyio
async def test_the_engine_lives_as_long_as_the_app(
    make_engine: MakeEngine, call_log: CallLogStore
) -> None:
    """It starts before the app and stops after it, and the server gets both messages."""
    inner = Starlette(lifespan=Life(call_log))
    async with lifespan(APIKeyMiddleware(inner, engine=make_engine(store=call_log))) as said:
        assert said == [{"type": "lifespan.startup.complete"}]
        assert call_log.recorded == ["opened", "started"]
    assert said[1:] == [{"type": "lifespan.shutdown.complete"}]
    assert call_log.recorded == ["opened", "started", "stopped", "closed"]


async def knows_only_http(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])


async def ignores_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    return


async def listens_and_leaves(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()


async def starts_and_leaves(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})


@pytest.mark.anyio
@pytest.mark.parametrize(
    "app", [knows_only_http, ignores_lifespan, listens_and_leaves, starts_and_leaves]
)
async def test_an_app_that_knows_no_lifespan_has_one_anyway(
    make_engine: MakeEngine, call_log: CallLogStore, app: ASGIApp
) -> None:
    """Whatever events the app leaves, the engine gets its start and its stop."""
    async with lifespan(APIKeyMiddleware(app, engine=make_engine(store=call_log))) as said:
        assert said == [{"type": "lifespan.startup.complete"}]
        assert call_log.recorded == ["opened"]
    assert said[1:] == [{"type": "lifespan.shutdown.complete"}]
    assert call_log.recorded == ["opened", "closed"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("event", "answers"),
    [
        ("started", ["lifespan.startup.failed"]),
        ("stopped", ["lifespan.startup.complete", "lifespan.shutdown.failed"]),
    ],
)
async def test_an_app_that_fails_is_not_covered_up(
    make_engine: MakeEngine, call_log: CallLogStore, event: str, answers: list[str]
) -> None:
    """Its failure reaches the server, and the engine is not left running."""
    inner = Starlette(lifespan=Life(call_log, fails=event))
    app = APIKeyMiddleware(inner, engine=make_engine(store=call_log))
    with pytest.raises(RuntimeError, match="the app's own"):
        async with lifespan(app) as said:
            pass
    assert [message["type"] for message in said] == answers
    assert call_log.recorded[-1] == "closed"


@pytest.mark.anyio
@pytest.mark.parametrize("app", [Starlette(), knows_only_http])
async def test_a_store_of_a_newer_keylatch_stops_the_start(
    engine: Engine, make_engine: MakeEngine, app: ASGIApp, store_url: str
) -> None:
    """The server gets `startup.failed` with the reason, because it would ignore an exception."""
    with closing(sqlite3.connect(store_url.removeprefix("sqlite:///"))) as raw, raw:
        raw.execute("UPDATE keylatch_version SET version_num = '9999'")
    with pytest.raises(Exception, match="9999"):
        async with lifespan(APIKeyMiddleware(app, engine=make_engine())) as said:
            pass
    assert [message["type"] for message in said] == ["lifespan.startup.failed"]
    assert "hint: upgrade keylatch" in said[0]["message"]


@pytest.mark.anyio
async def test_without_lifespan_the_first_request_starts_the_engine(
    make_engine: MakeEngine, engine: Engine
) -> None:
    """A mounted app receives no lifespan events; many first requests start it once."""
    key = await create(engine)
    mounted = make_engine()
    outer = Starlette(routes=[Mount("/api", APIKeyMiddleware(Response("in"), engine=mounted))])
    answers = await asyncio.gather(
        *(asgi_request(outer, "/api/x", auth_header(key)) for _ in range(5))
    )
    assert [answer.body for answer in answers] == [b"in"] * 5
    await mounted.stop()


@pytest.mark.parametrize("app", [starlette_app, lambda engine: knows_only_http])
def test_a_graceful_stop_stores_when_keys_were_used(make_engine: MakeEngine, app: Build) -> None:
    """Stopped right after a request, the server has stored its lastUsed."""
    operator = make_engine()
    key = asyncio.run(_operated(operator, lambda: create(operator)))
    assert key.record.last_used is None
    engine = make_engine()
    with serving(APIKeyMiddleware(app(engine), engine=engine)) as url:
        httpx.get(url, headers={"Authorization": f"Bearer {key.token.reveal()}"})
    stored = asyncio.run(
        _operated(operator, lambda: operator.store.keys.get("default", key.record.id))
    )
    assert stored is not None
    assert stored.last_used == key.record.created_at


async def _operated(engine: Engine, work: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await work()
    finally:
        await engine.stop()


# WebSockets


async def greet(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(f"hello {websocket.user.key_name}")
    await websocket.close()


SOCKETS = Starlette(routes=[WebSocketRoute("/chat", greet), WebSocketRoute("/other", greet)])


def test_a_websocket_is_opened_by_a_good_key_only(make_engine: MakeEngine) -> None:
    """Refused before it is accepted, with the same answers as over HTTP."""
    operator = make_engine()

    async def keys() -> list[Created]:
        return [await create(operator, permission) for permission in ("FULL", "SENDING")]

    full, sender = asyncio.run(_operated(operator, keys))
    app = APIKeyMiddleware(SOCKETS, engine=make_engine(), permissions={"SENDING": ["GET /chat"]})
    with serving(app) as url:

        def call(path: str, credential: str = "") -> str:
            fields = {"Authorization": credential} if credential else {}
            place = url.replace("http", "ws") + path
            with connect(place, additional_headers=fields, proxy=None) as socket:
                return str(socket.recv())

        assert call("/chat", f"Bearer {full.token.reveal()}") == "hello my FULL"
        assert call("/other", f"Bearer {full.token.reveal()}") == "hello my FULL"
        assert call("/chat", f"Bearer {sender.token.reveal()}") == "hello my SENDING"
        for path, credential, status, error in (
            ("/chat", "", 401, "unauthorized"),
            ("/chat", "Bearer", 400, "invalid_request"),
            ("/chat", "Bearer made-up", 401, "invalid_token"),
            ("/other", f"Bearer {sender.token.reveal()}", 403, "insufficient_scope"),
        ):
            with pytest.raises(InvalidStatus) as refused:
                call(path, credential)
            response = refused.value.response
            assert response.status_code == status
            assert json.loads(response.body or b"")["error"] == error
            assert response.headers["X-Keylatch-Error"] == error
            assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.anyio
async def test_a_server_without_the_extension_closes_before_accepting(engine: Engine) -> None:
    """Where no HTTP answer can be given, the handshake fails all the same."""
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        messages.append(message)

    scope = {"type": "websocket", "path": "/chat", "headers": [], "extensions": {}}
    await APIKeyMiddleware(SOCKETS, engine=engine)(scope, receive, send)
    assert messages == [{"type": "websocket.close", "code": 1008}]
