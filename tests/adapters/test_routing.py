"""Rules are matched by the app's routers, through middlewares and mounts; and views' permissions.

Each app here has a view for FULL that a rule with a parameter, or a public path with one, would
open if only text were compared.
"""

import asyncio
import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import flask
import litestar
import pytest
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse
from django.test import Client, override_settings
from django.urls import include, path, re_path
from fastapi import APIRouter, FastAPI, Security
from litestar.middleware import DefineMiddleware
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Match, Mount, Route, Router, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect
from werkzeug.test import Client as WSGIClient

from keylatch.adapters.routing import find_framework
from keylatch.asgi import APIKeyMiddleware
from keylatch.django import requires as django_requires
from keylatch.errors import ConfigurationError
from keylatch.fastapi import APIKey, permissions_of
from keylatch.flask import permissions_of as flask_permissions_of
from keylatch.flask import requires
from keylatch.testing import Keys
from keylatch.wsgi import APIKeyMiddleware as WSGIMiddleware
from tests import test_django  # which sets Django up
from tests.support.raw_http import asgi_request

assert test_django

RULES = {"FULL": ["GET /v1/export"], "SENDING": ["GET /v1/{name}", "GET /alias/{a}"]}


def named_view(name: str) -> Any:
    async def view(request: Request) -> PlainTextResponse:
        return PlainTextResponse(name)

    return view


export, one = named_view("export, for FULL"), named_view("one")
ROUTES = [Route("/v1/export", export), Route("/v1/{name}", one), Route("/alias/{x}", export)]


class AppClient:
    """An app behind the middleware, and what it answers to keys of each kind."""

    def __init__(self, app: Any, **rules: Any) -> None:
        self.keys = Keys()
        self.app = APIKeyMiddleware(
            app, engine=self.keys.engine(), **(rules or {"permissions": RULES})
        )

    def get(self, where: str, permission: str = "SENDING", **scope: Any) -> tuple[int, bytes]:
        headers = []
        if permission:
            key = self.keys.create(permission=permission)
            headers = [(b"authorization", f"Bearer {key.token}".encode())]
        host = [(b"host", scope.pop("host", b"test"))]
        more = [*scope.pop("headers", ()), *host, *headers]
        answer = asyncio.run(asgi_request(self.app, where, more, **scope))
        return answer.status, answer.body


class Slotted:
    """A middleware without a `__dict__`: nothing can be seen through it."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._inner(scope, receive, send)


def closed_over(inner: Any) -> Any:
    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)

    return middleware


async def handed(inner: Any, scope: Any, receive: Any, send: Any) -> None:
    await inner(scope, receive, send)


async def passed_on(request: Request, call_next: Any) -> Any:
    return await call_next(request)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda app: app,
        lambda app: CORSMiddleware(app, allow_origins=["*"]),
        lambda app: BaseHTTPMiddleware(app, dispatch=passed_on),
        closed_over,
        lambda app: functools.partial(handed, app),
        lambda app: closed_over(CORSMiddleware(closed_over(app))),
        lambda app: app.router,
        lambda app: APIKeyMiddleware(app, engine=Keys().engine(), public=["/alias/x", "/v1/7"]),
    ],
)
def test_a_router_is_found_behind_middlewares(wrapped: Callable[[Any], Any]) -> None:
    """Whatever form they have: the alias of a view that is named for FULL stays closed."""
    app = Starlette(routes=ROUTES)
    assert find_framework(wrapped(app)) in (app, app.router)
    client = AppClient(wrapped(app))
    assert client.get("/alias/x") == (403, client.get("/nowhere")[1])
    if not isinstance(wrapped(app), APIKeyMiddleware):
        assert client.get("/v1/7") == (200, b"one")
        assert client.get("/alias/x", "FULL") == (200, b"export, for FULL")


def test_an_app_that_cannot_be_seen_is_compared_by_text() -> None:
    """Letter case, a slash at the end and a suffix do not tell a path from an exact rule's."""
    client = AppClient(Slotted(Starlette(routes=ROUTES)))
    assert client.get("/v1/7")[0] == 200
    for where in ("/v1/export", "/v1/EXPORT", "/v1/export.json", "/v1/exp\uff4frt"):
        assert client.get(where)[0] == 403


def test_of_two_apps_in_a_middleware_neither_is_used() -> None:
    """Which of them gets a request is known to the middleware alone."""
    one_app, other = Starlette(routes=ROUTES), Starlette()

    async def chooses(scope: Any, receive: Any, send: Any) -> None:
        await (one_app if scope["path"] else other)(scope, receive, send)

    assert find_framework(chooses) is None
    assert AppClient(chooses).get("/v1/EXPORT")[0] == 403


class Changing:
    """A middleware that makes another path of the one that keylatch has seen."""

    def __init__(self, inner: Any, change: Callable[[str], str]) -> None:
        self._inner, self._change = inner, change

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._inner({**scope, "path": self._change(scope["path"])}, receive, send)


@pytest.mark.parametrize(
    ("change", "where"),
    [(lambda path: path.rstrip("/"), "/v1/export/"), (str.lower, "/v1/EXPORT")],
)
def test_a_path_that_a_middleware_changes_allows_nothing(change: Any, where: str) -> None:
    """Although the router would lead the path that the client sent to another view."""
    rules = {"FULL": ["GET /v1/export"], "SENDING": ["GET /v1/{name:path}"]}
    routes = [Route("/v1/export", export), Route("/v1/{name:path}", one)]
    client = AppClient(Changing(Starlette(routes=routes), change), permissions=rules)
    assert [client.get(where, each)[0] for each in ("SENDING", "FULL")] == [403, 200]
    assert client.get("/v1/7") == (200, b"one")


class Dispatching:
    """A middleware that hands on to several apps, held in some way."""

    def __init__(self, inner: Any, others: Any) -> None:
        self._inner, self._others = inner, others

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._inner(scope, receive, send)


@pytest.mark.parametrize(
    "held",
    [
        lambda app: {"/legacy": app},
        lambda app: [("/legacy", app)],
        lambda app: (closed_over(closed_over(app)),),
        lambda app: CORSMiddleware(closed_over(app)),
    ],
)
def test_another_app_is_seen_wherever_a_middleware_holds_it(held: Callable[[Any], Any]) -> None:
    """In a collection, and further in than the first: which of the two is meant, is not known."""
    first = Starlette(routes=ROUTES)
    assert find_framework(Dispatching(first, held(Starlette()))) is None
    assert find_framework(Dispatching(first, held(first))) is first
    assert find_framework(Dispatching(PlainTextResponse("x"), held(first))) is first


@pytest.mark.parametrize(
    "added",
    [lambda app: None, lambda app: app.add_middleware(Slotted)],
)
def test_starlette_hands_its_router_over(added: Callable[[Any], None]) -> None:
    """Added with `add_middleware`, also outside of one that nothing can be seen through."""
    keys, app = Keys(), Starlette(routes=ROUTES)
    added(app)
    app.add_middleware(APIKeyMiddleware, engine=keys.engine(), permissions=RULES)
    headers = [(b"authorization", f"Bearer {keys.create(permission='SENDING').token}".encode())]
    assert asyncio.run(asgi_request(app, "/alias/x", headers)).status == 403
    assert asyncio.run(asgi_request(app, "/v1/7", headers)).body == b"one"


@pytest.mark.parametrize(
    "app",
    [
        Starlette(routes=[Mount("/api", Starlette(routes=ROUTES))]),
        Starlette(routes=[Mount("/api", CORSMiddleware(Router(ROUTES)))]),
        Starlette(routes=[Mount("", routes=[Mount("/{tenant}", routes=ROUTES)])]),
        Starlette(routes=[Host("test", app=Router([Mount("/api", routes=ROUTES)]))]),
        Router(default=Router([Mount("/api", routes=ROUTES)])),
    ],
)
def test_mounted_apps_count(app: Any) -> None:
    """Rules name paths of the whole app, and views are found wherever they are."""
    rules = {"FULL": ["GET /api/v1/export"], "SENDING": ["GET /api/v1/{a}", "GET /api/alias/{a}"]}
    client = AppClient(app, permissions=rules)
    assert client.get("/api/v1/7") == (200, b"one")
    assert client.get("/api/v1/export")[0] == client.get("/api/alias/x")[0] == 403


def test_an_app_of_another_framework_below_a_mount() -> None:
    """Litestar takes a slash at the end for none, also there."""

    @litestar.get("/v1/export")
    async def lite_export() -> str:
        return "export"

    @litestar.get("/v1/{name:str}")
    async def lite_one() -> str:
        return "one"

    app = Starlette(routes=[Mount("/api", litestar.Litestar([lite_export, lite_one]))])  # type: ignore[arg-type]
    rules = {"FULL": ["GET /api/v1/export"], "SENDING": ["GET /api/v1/{name}/", "GET /api/v1/{n}"]}
    client = AppClient(app, permissions=rules)
    assert client.get("/api/v1/7/")[0] == client.get("/api/v1/7")[0] == 200
    assert client.get("/api/v1/export/")[0] == 403


def test_inside_of_litestar_the_route_is_chosen_already() -> None:
    """As one of its own middlewares."""
    keys = Keys()

    @litestar.get("/v1/export")
    async def lite_export() -> str:
        return "export"

    @litestar.get("/v1/{name:str}")
    async def lite_one() -> str:
        return "one"

    rules = {"FULL": ["GET /v1/export"], "SENDING": ["GET /v1/{name}", "GET /v1/{name}/"]}
    middleware = DefineMiddleware(APIKeyMiddleware, engine=keys.engine(), permissions=rules)  # type: ignore[arg-type]
    app = litestar.Litestar([lite_export, lite_one], middleware=[middleware])
    headers = [(b"authorization", f"Bearer {keys.create(permission='SENDING').token}".encode())]
    statuses = [
        asyncio.run(asgi_request(app, where, headers, state={})).status  # type: ignore[arg-type]
        for where in ("/v1/7", "/v1/export", "/v1/export/")
    ]
    assert statuses == [200, 403, 403]


class Counted(Route):
    """Counts how often it is matched, and can fail on demand."""

    requested = 0
    error: Exception | None = None

    def matches(self, scope: Any) -> Any:
        type(self).requested += 1
        if self.error is not None and "user" not in scope:
            raise self.error
        return super().matches(scope)


def test_the_router_is_asked_only_where_that_decides() -> None:
    """Not for keys with FULL, nor for those that are no good, nor where a rule is exact; the app
    itself asks once."""
    client = AppClient(
        Starlette(routes=[Counted("/v1/export", export), Counted("/v1/{name}", one)])
    )
    for where, permission, times in (
        ("/v1/7", "FULL", 2),
        ("/v1/7", "", 0),
        ("/v1/export", "SENDING", 0),
        ("/nowhere", "SENDING", 0),
        ("/v1/export", "FULL", 1),
    ):
        Counted.requested = 0
        client.get(where, permission)
        assert (where, permission, Counted.requested) == (where, permission, times)


@pytest.mark.parametrize("error", [ValueError("no"), AssertionError(), KeyError("x")])
def test_a_router_that_fails_allows_no_request(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer is 403, never 500, and the log says so once."""
    client = AppClient(Starlette(routes=[Counted("/v1/{name}", one)]))
    Counted.error = error
    try:
        with caplog.at_level(logging.WARNING, "keylatch"):
            assert [client.get("/v1/7")[0] for _ in range(2)] == [403, 403]
    finally:
        Counted.error = None
    assert [each for each in caplog.messages if "router" in each] == [
        f"the app's router failed ({type(error).__name__}): the request requires a FULL key"
    ]


class ForVersion(Route):
    """Matches only with a header."""

    def matches(self, scope: Any) -> Any:
        if (b"x-version", b"2") not in scope["headers"]:
            return Match.NONE, {}
        return super().matches(scope)


def test_what_a_client_sent_first_does_not_decide_what_a_rule_means() -> None:
    """The route of an exact rule's path is cached, but not by any header of a client."""
    routes = [ForVersion("/v1/export", one), *ROUTES]
    client = AppClient(Starlette(routes=routes))
    client.get("/v1/7", headers=[(b"x-version", b"2")])
    assert client.get("/alias/x")[0] == 403


def test_routes_that_are_added_later_count() -> None:
    """The route of an exact rule that was not there at first."""
    app = Starlette(routes=[Route("/v1/{name}", one)])
    client = AppClient(app)
    assert client.get("/v1/7")[0] == 200
    app.router.routes[:0] = [Route("/v1/export", export), Route("/alias/{x}", export)]
    assert client.get("/alias/x")[0] == 403


def test_an_exact_rule_speaks_of_a_view_by_each_of_its_paths() -> None:
    """Also where a rule with parameters spells the other one; requests to one view differ
    in their arguments."""
    routes = [Route("/users", one), Route("/users/{id}", one), Route("/files/{name}", export)]
    rules = {
        "FULL": ["GET /users", "GET /files/keys"],
        "SENDING": ["GET /users/{name}", "GET /files/{a}"],
    }
    client = AppClient(Starlette(routes=routes), permissions=rules)
    assert client.get("/users")[0] == client.get("/users/7")[0] == 403
    assert [client.get(where)[0] for where in ("/files/keys", "/files/key")] == [403, 200]


@pytest.mark.parametrize("root", ["/api", "/", ""])
@pytest.mark.parametrize(
    ("where", "status"),
    [("/v1/7", 200), ("/v1/x%", 403), ("/v1/7\n", 403), ("/v1/7\ufffd", 403), ("/v1/7/", 403)],
)
def test_below_a_root_path_rules_stay_the_same(root: str, where: str, status: int) -> None:
    """Whether the server puts it before the path or not."""
    client = AppClient(Starlette(routes=ROUTES))
    full = (root if root != "/" else "") + where
    assert client.get(where, root_path=root)[0] == status
    assert client.get(full, root_path=root)[0] == status


@pytest.mark.parametrize("where", ["/apiv1/7", "/api/api/v1/7", "/v1/api/7", "/v1/api"])
def test_a_root_path_that_can_be_cut_off_in_two_ways_is_for_full(where: str) -> None:
    """Within a segment, twice, or in the middle of the path."""
    client = AppClient(Slotted(Starlette()), permissions={"SENDING": ["GET /{p:path}"]})
    assert client.get(where, root_path="/api")[0] == 403
    assert client.get(where, "FULL", root_path="/api")[0] == 404


@pytest.mark.parametrize("raw", [b"/v1%2f7", b"/v1%2F7?x", b"/v1/%2f7"])
def test_an_encoded_slash_is_for_full(raw: bytes) -> None:
    """A proxy in front has not read it as one; in a query it is nothing special."""
    public = ["/v1/{name}", "/v1/7"]
    client = AppClient(Starlette(routes=ROUTES), public=public, permissions=RULES)
    assert client.get("/v1/7", "", raw_path=raw)[0] == 401
    assert client.get("/v1/7", raw_path=raw)[0] == 403
    assert client.get("/v1/7", "", raw_path=b"/v1/7?next=%2f")[0] == 200


@pytest.mark.parametrize("root", ["/v1", "/v1/export", "/alias", "/"])
def test_a_root_path_does_not_change_what_an_exact_rule_means(root: str) -> None:
    """Clients of daphne choose it: one that begins the rule's own path takes nothing away."""
    client = AppClient(Starlette(routes=ROUTES))
    assert client.get("/alias/x", root_path=root)[0] == 403
    assert client.get("/alias/x", "FULL", root_path="/v1")[0] == 200


def test_below_a_mount_of_litestar_the_inner_app_is_asked() -> None:
    """Its scope says which handler Litestar chose: the mount."""
    keys = Keys()
    rules = {"FULL": ["GET /v1/export/"], "SENDING": ["GET /v1/{a}/", "GET /alias/{a}/"]}
    routes = [Route(f"{each.path}/", each.endpoint) for each in ROUTES]
    inner = APIKeyMiddleware(Starlette(routes=routes), engine=keys.engine(), permissions=rules)

    @litestar.asgi("/api", is_mount=True, copy_scope=True)
    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        await inner({**scope, "root_path": ""}, receive, send)

    app: Any = litestar.Litestar([mounted])
    headers = [(b"authorization", f"Bearer {keys.create(permission='SENDING').token}".encode())]
    statuses = [
        asyncio.run(asgi_request(app, where, headers, state={})).status
        for where in ("/api/v1/7", "/api/alias/x", "/api/v1/export")
    ]
    assert statuses == [200, 403, 403]


# Headers that ask for another method

OTHER_METHODS = ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"]


class Following:
    """A middleware inside of keylatch's that follows such a header."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        methods = [value for name, value in scope["headers"] if b"method" in name]
        await self._inner(
            {**scope, **({"method": methods[0].decode()} if methods else {})}, receive, send
        )


@pytest.mark.parametrize("header", OTHER_METHODS)
@pytest.mark.parametrize("rule", ["POST /items/{id}", "POST /items/7"])
def test_a_header_that_asks_for_another_method_needs_full(header: str, rule: str) -> None:
    """Whatever rules and public paths say of the method that was sent."""
    routes = [
        Route("/items/{id}", one, methods=["POST"]),
        Route("/items/{id}", export, methods=["DELETE"]),
    ]
    other = [(header.lower().encode(), b"DELETE")]
    app = Following(Starlette(routes=routes))
    ruled = AppClient(app, permissions={"SENDING": [rule]})
    assert ruled.get("/items/7", method="POST") == (200, b"one")
    assert ruled.get("/items/7", method="POST", headers=other)[0] == 403
    assert ruled.get("/items/7", "FULL", method="POST", headers=other) == (200, b"export, for FULL")
    public = AppClient(app, public=[rule])
    assert public.get("/items/7", "", method="POST") == (200, b"one")
    assert public.get("/items/7", "", method="POST", headers=other)[0] == 401


@pytest.mark.parametrize("header", OTHER_METHODS)
def test_over_wsgi_and_in_django_it_is_the_same(header: str) -> None:
    """Flask's documentation shows such a middleware; in Django one may act on the chosen view."""
    app, other = flask_app(), {header: "DELETE"}
    keys = Keys()
    rules: Any = {"permissions": flask_permissions_of(app), "public": ["/users/<name>"]}
    app.wsgi_app = WSGIMiddleware(app.wsgi_app, engine=keys.engine(), **rules)  # type: ignore[method-assign]
    key, client = keys.create(permission="SENDING").headers, app.test_client()
    for more, statuses in (({}, [200, 200]), (other, [403, 401])):
        sent = [client.get("/v1/7/", headers={**key, **more})]
        sent.append(client.get("/users/ada", headers=more))
        assert [each.status_code for each in sent] == statuses
    given = {"engine": keys.engine(), "public": ["/open"]}
    urls = (
        path("open", django_say("open")),
        path("v1", django_requires("SENDING")(django_say("v1"))),
    )
    middleware = ["keylatch.django.APIKeyMiddleware"]
    with override_settings(ROOT_URLCONF=urls, KEYLATCH=given, MIDDLEWARE=middleware):
        for more, statuses in (({}, [200, 200]), (other, [403, 401])):
            sent = [Client().post("/v1", headers={**key, **more})]
            sent.append(Client().get("/open", headers=more))
            assert [each.status_code for each in sent] == statuses


# Public paths


def test_public_paths_name_a_method() -> None:
    """Without one they are for reading: a public profile page does not allow its deletion."""
    routes = [Route("/users/{id}", one, methods=["GET", "DELETE", "POST", "OPTIONS"])]
    client = AppClient(Starlette(routes=routes), public=["/users/{id}", "POST /users/{id}", "/x"])
    statuses = {
        method: client.get("/users/7", "", method=method)[0]
        for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT")
    }
    assert statuses == {
        "GET": 200,
        "HEAD": 200,
        "POST": 200,
        "DELETE": 401,
        "OPTIONS": 401,
        "PUT": 401,
    }
    assert [client.get("/x", "", method=each)[0] for each in ("GET", "DELETE")] == [404, 401]


async def greet(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.close()


def websocket_status(client: AppClient, where: str, permission: str = "") -> bool:
    """Whether a WebSocket is opened."""
    key = client.keys.create(permission=permission).headers if permission else {}
    try:
        with TestClient(client.app).websocket_connect(where, headers=key):
            return True
    except (WebSocketDisconnect, WebSocketDenialResponse):
        return False


@pytest.mark.parametrize("public", ["/chat/7", "/chat/{room}"])
def test_a_public_page_makes_no_websocket_public(public: str) -> None:
    """On the same path; `WEBSOCKET` in its place does, and no page. For the rest of keys, what
    rules say of GET counts."""
    routes = [Route("/chat/{room}", one), WebSocketRoute("/chat/{room}", greet)]
    rules = {"FULL": ["GET /chat/admin"], "SENDING": ["GET /chat/{x}"]}
    page = AppClient(Starlette(routes=routes), public=[public], permissions=rules)
    assert page.get("/chat/7", "") == (200, b"one")
    assert [websocket_status(page, "/chat/7", each) for each in ("", "SENDING", "FULL")] == [
        0,
        1,
        1,
    ]
    socket = AppClient(Starlette(routes=routes), public=[f"WEBSOCKET {public}"], permissions=rules)
    assert socket.get("/chat/7", "")[0] == socket.get("/chat/7", "", method="WEBSOCKET")[0] == 401
    assert page.get("/chat/7", method="WEBSOCKET")[0] == 403
    assert websocket_status(socket, "/chat/7")
    assert [websocket_status(socket, "/chat/admin", each) for each in ("", "SENDING", "FULL")] == [
        0,
        0,
        1,
    ]
    bare = AppClient(Starlette(routes=routes), public=[public])
    assert [websocket_status(bare, "/chat/7", each) for each in ("", "SENDING", "FULL")] == [
        0,
        0,
        1,
    ]


def test_a_rule_for_a_public_page_is_that_of_the_websocket() -> None:
    """What the path declares for GET is not lost where the page is public."""
    routes = [Route("/chat", one), WebSocketRoute("/chat", greet)]
    client = AppClient(
        Starlette(routes=routes), public=["/chat"], permissions={"SENDING": ["GET /chat"]}
    )
    assert client.get("/chat", "")[0] == 200
    assert [websocket_status(client, "/chat", each) for each in ("", "SENDING", "FULL")] == [
        0,
        1,
        1,
    ]


@pytest.mark.parametrize("public", ["/x", "/x/{a}"])
def test_a_public_path_makes_no_other_view_public_for_head(public: str) -> None:
    """FastAPI does not start where it declares nothing and the one for GET does."""
    app, api_key = FastAPI(openapi_url=None), APIKey()
    sending = [Security(api_key, scopes=["FULL"])]
    path_of_both = public.replace("{a}", "{b}")
    app.add_api_route(path_of_both, lambda: "head", methods=["HEAD"])
    app.add_api_route(path_of_both, lambda: "page", dependencies=sending)
    with pytest.raises(ConfigurationError, match=f"opens HEAD {path_of_both}"):
        AppClient(app, public=[public], permissions=permissions_of(app))
    assert AppClient(app, public=["/y"], permissions=permissions_of(app)) is not None


def test_a_public_path_with_parameters_makes_no_websocket_public() -> None:
    """FastAPI starts beside one for pages, and not with one for WebSockets."""
    app = FastAPI(openapi_url=None)
    app.add_api_websocket_route("/chat/{room}", greet)
    assert AppClient(app, public=["/{a}/{b}"], permissions=permissions_of(app)) is not None
    with pytest.raises(ConfigurationError, match="opens WEBSOCKET /chat/"):
        AppClient(app, public=["WEBSOCKET /{a}/{b}"], permissions=permissions_of(app))
    rule = {"SENDING": ["WEBSOCKET /chat"]}
    with pytest.raises(ConfigurationError, match="a WebSocket is opened by it"):
        AppClient(app, permissions=rule)


def test_an_exact_rule_wins_over_a_public_pattern() -> None:
    """By its path, and by another path of the same view."""
    routes = [Route("/users/me", export), Route("/users/{id}", one), Route("/u/{x}", export)]
    rules = {"FULL": ["GET /users/me"]}
    client = AppClient(
        Starlette(routes=routes), public=["/users/{id}", "/u/{x}"], permissions=rules
    )
    assert client.get("/users/7", "") == (200, b"one")
    for where in ("/users/me", "/u/7"):
        assert [client.get(where, each)[0] for each in ("", "SENDING", "FULL")] == [401, 403, 200]


def fastapi_app() -> FastAPI:
    app = FastAPI(openapi_url=None)
    router = APIRouter(prefix="/users")
    router.add_api_route("/me", lambda: "me")
    router.add_api_route("/{id}", lambda id: id)  # noqa: A006
    app.include_router(router)
    return app


@pytest.mark.parametrize(
    ("public", "opened"),
    [
        (["/users/{id}"], "/users/me"),
        (["/users/me", "/users/{id}"], ""),
        (["/users/{name}", "GET /users/me"], ""),
        (["/users/me", "/users/x"], ""),
        (["/{a}/{b}"], "/users/me"),
        (["DELETE /users/{id}"], ""),
    ],
)
def test_fastapi_does_not_start_if_a_public_path_makes_another_route_public(
    public: list[str], opened: str
) -> None:
    """A route without a key that `public` does not spell as the route does."""
    app = fastapi_app()
    if not opened:
        assert AppClient(app, public=public, permissions=permissions_of(app)) is not None
        return
    with pytest.raises(ConfigurationError, match=f'name "GET {opened}" in public as well'):
        AppClient(app, public=public, permissions=permissions_of(app))


def test_a_route_that_asks_for_a_key_is_not_public_by_the_way() -> None:
    """A declaration wins over a public pattern, and the required key is checked."""
    app, api_key = FastAPI(openapi_url=None), APIKey()
    sending = [Security(api_key, scopes=["SENDING"])]
    app.add_api_route("/users/me", lambda: "me", dependencies=sending)
    app.add_api_route("/users/{id}", lambda id: id)  # noqa: A006
    client = AppClient(app, public=["/users/{id}"], permissions=permissions_of(app))
    assert client.get("/users/7", "")[0] == 200
    assert [client.get("/users/me", each)[0] for each in ("", "SENDING")] == [401, 200]


def test_what_is_mounted_can_be_public() -> None:
    """An app that is no framework's, such as static files, can declare nothing."""
    app = FastAPI(openapi_url=None)
    app.mount("/static", Slotted(PlainTextResponse("a file")))
    client = AppClient(app, public=["/static/{file}"], permissions=permissions_of(app))
    assert client.get("/static/a.css", "") == (200, b"a file")


def test_fastapi_does_not_start_if_a_public_path_makes_a_mount_public() -> None:
    """An opaque app may have views for FULL: a public path must name its mount."""
    app = FastAPI(openapi_url=None)
    app.mount("/admin", Slotted(PlainTextResponse("users")))
    for public in ("/admin/{page}", "/users/{id}"):
        assert AppClient(app, public=[public], permissions=permissions_of(app)) is not None
    with pytest.raises(ConfigurationError, match="opens the app mounted at /admin"):
        AppClient(app, public=["/{section}/{page}"], permissions=permissions_of(app))


def flask_app() -> flask.Flask:
    app = flask.Flask("app")
    app.url_map.strict_slashes = False
    app.add_url_rule("/v1/export", "export", lambda: "export, for FULL")
    app.add_url_rule("/v1/<name>/", "one", requires("SENDING")(lambda name: name))
    app.add_url_rule("/users/<name>", "profile", lambda name: name)
    return app


def flask_statuses(app: flask.Flask, *paths: str, **rules: Any) -> list[int]:
    """What a SENDING key gets."""
    keys = Keys()
    app.wsgi_app = WSGIMiddleware(app.wsgi_app, engine=keys.engine(), **rules)  # type: ignore[method-assign]
    headers = keys.create(permission="SENDING").headers
    return [app.test_client().get(each, headers=headers).status_code for each in paths]


@pytest.mark.parametrize("copied", [lambda rules: rules, lambda rules: {**rules, "READING": []}])
def test_flask_views_that_declare_nothing_are_for_full(copied: Callable[[Any], Any]) -> None:
    """Under each spelling that its router takes, also where rules are added by hand."""
    app = flask_app()
    rules = copied(flask_permissions_of(app))
    keys = Keys(permissions="FULL,SENDING,READING")
    app.wsgi_app = WSGIMiddleware(app.wsgi_app, engine=keys.engine(), permissions=rules)  # type: ignore[method-assign]
    headers = keys.create(permission="SENDING").headers
    client = app.test_client()
    statuses = [
        client.get(where, headers=headers).status_code
        for where in ("/v1/7/", "/v1/export", "/v1/export/", "/v1/7")
    ]
    assert statuses == [200, 403, 403, 403]


def test_flask_does_not_start_if_a_public_path_makes_another_view_public() -> None:
    """Its static files are its own affair."""
    app = flask_app()
    rules = flask_permissions_of(app)
    public = ["/users/<name>", "/static/<file>"]
    assert flask_statuses(app, "/users/ada", public=public, permissions=rules) == [200]
    with pytest.raises(ConfigurationError, match="opens GET /users/<name>, which declares nothing"):
        WSGIMiddleware(app, engine=Keys().engine(), public=["/{a}/{b}"], permissions=rules)


# Django


def django_say(name: str) -> Callable[..., HttpResponse]:
    def view(request: HttpRequest, **_: str) -> HttpResponse:
        return HttpResponse(name)

    return view


def rest_urls() -> list[Any]:
    """Views of REST framework, and suffixes for them; it looks at Django's settings on import."""
    from rest_framework.renderers import JSONRenderer
    from rest_framework.response import Response
    from rest_framework.urlpatterns import format_suffix_patterns
    from rest_framework.views import APIView

    class Say(APIView):
        authentication_classes = ()
        permission_classes = ()
        renderer_classes = (JSONRenderer,)
        text = ""

        def get(self, request: Any, **_: str) -> Response:
            return Response(self.text)

    views = {name: Say.as_view(text=name) for name in ("export", "one")}
    urls = [path("rest/export", views["export"]), path("rest/<name>", views["one"])]
    return [*format_suffix_patterns(urls)]


def django_statuses(urls: Any, paths: list[str], permission: str = "SENDING", **rules: Any) -> Any:
    """What a key gets."""
    keys = Keys()
    given = {"engine": keys.engine(), **rules}
    with override_settings(
        ROOT_URLCONF=tuple(urls),
        KEYLATCH=given,
        MIDDLEWARE=[
            "keylatch.django.APIKeyMiddleware",
            "django.middleware.common.CommonMiddleware",
        ],
    ):
        headers = keys.create(permission=permission).headers if permission else {}
        return [Client().get(each, headers=headers).status_code for each in paths]


REST_RULES = {"FULL": ["GET /rest/export"], "SENDING": ["GET /rest/{name}"]}


def test_suffixes_of_rest_framework_open_nothing() -> None:
    """`export.json` is `export`; of what rules open, each suffix is as open."""
    paths = ["/rest/7", "/rest/7.json", "/rest/export", "/rest/export.json", "/rest/export.json/"]
    statuses = django_statuses(rest_urls(), paths, permissions=REST_RULES)
    assert statuses == [200, 200, 403, 403, 403]


def test_expressions_that_end_in_a_dollar_sign_open_nothing() -> None:
    """A newline at the end, letter case, an optional slash, and a redirect that adds one."""
    urls = [
        re_path(r"(?i)^v1/export/?$", django_say("export")),
        path("v1/slashed/", django_say("slashed")),
        path("v1/", include([re_path(r"^(?P<name>[^/]+)/?$", django_say("one"))])),
    ]
    rules = {
        "FULL": ["GET /v1/export", "GET /v1/slashed/"],
        "SENDING": ["GET /v1/{name}", "GET /v1/{name}/"],
    }
    paths = ["/v1/7", "/v1/7/", "/v1/export", "/v1/export/", "/v1/EXPORT", "/v1/export%0a"]
    statuses = django_statuses(urls, paths, permissions=rules)
    assert statuses == [200, 200, 403, 403, 403, 403]
    assert django_statuses(urls, ["/v1/slashed", "/v1/slashed/"], permissions=rules) == [200, 403]


def test_django_views_win_over_public_paths_by_the_way() -> None:
    """An exact rule, a declaration, or nothing at all: that stops the start, or asks for FULL where
    the views are chosen later."""
    profile = path("users/<name>", django_say("profile"))
    urls = [
        path("users/me", django_say("me")),
        path("users/sent", django_requires("SENDING")(django_say("sent"))),
        profile,
    ]
    rules = {"public": ["/users/{name}"], "permissions": {"FULL": ["GET /users/me"]}}
    paths = ["/users/me", "/users/sent", "/users/7"]
    assert django_statuses(urls, paths, "", **rules) == [401, 401, 200]
    assert django_statuses(urls, paths, "SENDING", **rules) == [403, 200, 200]
    with pytest.raises(ConfigurationError, match="opens GET /users/me, which declares nothing"):
        django_statuses(urls, paths, "", public=["/users/{name}"])
    with override_settings(
        ROOT_URLCONF=(profile,),
        KEYLATCH={"engine": Keys().engine(), "public": ["/users/{name}"]},
        MIDDLEWARE=[f"{__name__}.for_a_tenant", "keylatch.django.APIKeyMiddleware"],
    ):
        assert [Client().get(each).status_code for each in ("/users/me", "/users/7")] == [401, 200]


def test_an_expression_for_digits_is_written_as_int() -> None:
    """A public path for any text does not spell it, nor the other way round."""
    urls = [
        re_path(r"^pub/(?P<x>\d+)$", django_say("number")),
        re_path(r"^pub/(?P<y>[a-z]+)$", django_say("word")),
    ]
    both = ["/pub/{x:int}", "/pub/{y}"]
    for public, unsaid in zip(both, reversed(both), strict=True):
        with pytest.raises(ConfigurationError, match=re.escape(f'name "GET {unsaid}" in public')):
            django_statuses(urls, ["/pub/7"], public=[public])
    assert django_statuses(urls, ["/pub/7", "/pub/a"], "", public=both) == [200, 200]
    assert django_statuses(urls[:1], ["/pub/7", "/pub/a"], "", public=both[:1]) == [200, 401]


def for_a_tenant(get_response: Any) -> Any:
    """A middleware that stands before keylatch's and chooses the views."""
    urls = (path("users/me", django_say("me")), path("users/<name>", django_say("profile")))

    def middleware(request: HttpRequest) -> Any:
        request.urlconf = urls
        return get_response(request)

    return middleware


def test_django_as_a_whole_can_be_wrapped() -> None:
    """By the middleware for WSGI, which then uses the URLconf."""
    keys = Keys()
    with override_settings(ROOT_URLCONF=tuple(rest_urls()), MIDDLEWARE=[]):
        app = WSGIMiddleware(WSGIHandler(), engine=keys.engine(), permissions=REST_RULES)
        headers = {"Authorization": keys.create(permission="SENDING").headers["Authorization"]}
        client = WSGIClient(app)
        statuses = [
            client.get(each, headers=headers).status_code
            for each in ("/rest/7", "/rest/export", "/rest/export.json")
        ]
    app.close()
    assert statuses == [200, 403, 403]
