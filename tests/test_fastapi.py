"""keylatch.fastapi: the key as a dependency, the permission at the route, the scheme in OpenAPI."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import product
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Security, WebSocket
from fastapi.security import SecurityScopes
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Host, Mount, Route, compile_path
from starlette.staticfiles import StaticFiles
from starlette.types import Message
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from keylatch import ConfigurationError, Engine, Principal
from keylatch.core.decisions import Deny, Reason
from keylatch.core.policy import Policy
from keylatch.errors import Refused
from keylatch.fastapi import APIKey, APIKeyMiddleware, permissions_of
from keylatch.management.keyring import Created
from tests.support.engines import MakeEngine
from tests.support.raw_http import Header, RawResponse, asgi_request, http_scope
from tests.support.servers import error_without_package, serving

api_key = APIKey()
Key = Annotated[Principal, Security(api_key)]
Sender = Annotated[Principal, Security(api_key, scopes=["SENDING"])]
Both = Annotated[Principal, Security(api_key, scopes=["SENDING", "READING"])]


async def name_of(key: Key) -> str:
    return key.key_name


async def send(key: Sender, id: str = "") -> str:  # noqa: A002
    return key.key_name


async def both(key: Both) -> str:
    return key.key_name


async def anyone() -> str:
    return "anyone"


def sample() -> FastAPI:
    """An app with a route of each sort, not yet protected."""
    app = FastAPI(title="Sample")
    app.add_api_route("/healthz", anyone)
    app.add_api_route("/v1/me", name_of)
    app.add_api_route("/v1/emails", send, methods=["POST"])
    app.add_api_route("/v1/emails/{id}", send)
    app.add_api_route("/v1/both", both)
    return app


RULES = {"SENDING": ["POST /v1/emails", "GET /v1/emails/{id}"]}


def protected(app: FastAPI, engine: Engine, **arguments: Any) -> FastAPI:
    app.add_middleware(APIKeyMiddleware, engine=engine, **arguments)
    return app


@pytest.fixture
async def engine(make_engine: MakeEngine) -> AsyncIterator[Engine]:
    """A started engine whose keys can also be READING."""
    engine = make_engine(permissions="FULL,SENDING,READING")
    await engine.start()
    yield engine
    await engine.stop()


async def create(engine: Engine, permission: str = "FULL") -> Created:
    return await (await engine.keyring()).create(
        "default", f"my {permission}", permission=permission
    )


def auth_header(key: Created) -> list[Header]:
    return [(b"authorization", b"Bearer " + key.token.reveal().encode())]


# The dependency


@pytest.mark.anyio
async def test_the_route_is_handed_the_principal(engine: Engine) -> None:
    """What the middleware found out is what `Security(api_key)` returns."""
    seen: list[Principal] = []

    async def route(key: Key) -> None:
        seen.append(key)

    app = FastAPI()
    app.add_api_route("/", route)
    key = await create(engine)
    assert (await asgi_request(protected(app, engine), "/", auth_header(key))).status == 200
    assert seen == [Principal(key.record.id, "my FULL", "default", "FULL", "live")]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("permission", "path", "status"),
    [
        *(("FULL", path, 200) for path in ("/v1/me", "/v1/emails/7", "/v1/both")),
        ("SENDING", "/v1/me", 200),
        ("SENDING", "/v1/emails/7", 200),
        ("SENDING", "/v1/both", 403),
        ("READING", "/v1/me", 200),
        ("READING", "/v1/emails/7", 403),
        ("READING", "/v1/both", 403),
    ],
)
async def test_scopes_are_enforced_at_the_route(
    engine: Engine, permission: str, path: str, status: int
) -> None:
    """Although the middleware's rules allow every key: every scope named must be held."""
    paths = ["GET /v1/me", "GET /v1/emails/{id}", "GET /v1/both"]
    app = protected(sample(), engine, permissions={"SENDING": paths, "READING": paths})
    key = await create(engine, permission)
    assert (await asgi_request(app, path, auth_header(key))).status == status


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_refusal_is_the_middlewares(engine: Engine, method: str) -> None:
    """Status, headers and body are those that the same rule in the middleware gives, A3."""
    open_to_all = {"READING": ["GET /v1/emails/{id}"]}
    headers = auth_header(await create(engine, "READING"))
    answers: list[RawResponse] = []
    for rules in (RULES, open_to_all):
        app = sample()
        app.add_api_route("/v1/emails/{id}", send, methods=["HEAD"])
        protected(app, engine, permissions=rules)
        answers.append(await asgi_request(app, "/v1/emails/7", headers, method=method))
    by_middleware, by_dependency = answers
    assert by_dependency == by_middleware
    assert by_dependency.status == 403
    challenge = b'Bearer realm="keylatch", error="insufficient_scope", scope="SENDING"'
    assert dict(by_dependency.headers)[b"www-authenticate"] == challenge


@pytest.mark.anyio
async def test_a_public_path_has_no_principal_to_hand_over(engine: Engine) -> None:
    """A route that wants a key, on a path that needs none, is refused as without a key, A0."""
    app = protected(sample(), engine, public=["/v1/me"])
    good = await asgi_request(app, "/v1/me", auth_header(await create(engine)))
    assert good == await asgi_request(app, "/v1/me") == await asgi_request(app, "/v1/both")
    assert (good.status, json.loads(good.body)["error"]) == (401, "unauthorized")


@pytest.mark.anyio
@pytest.mark.parametrize("user", [{}, {"user": None}, {"user": "another library's"}])
async def test_without_the_middleware_it_says_what_to_add(user: dict[str, Any]) -> None:
    """A mistake of the developer's, no answer to the client."""
    with pytest.raises(RuntimeError, match=r"add_middleware\(keylatch\.asgi\.APIKeyMiddleware"):
        await asgi_request(sample(), "/v1/me", **user)


@pytest.mark.anyio
async def test_it_can_be_overridden_in_an_apps_own_tests() -> None:
    """As every dependency, through `app.dependency_overrides`."""
    app = sample()
    tester = Principal("key_1", "tester", "default", "FULL", "live")
    app.dependency_overrides[api_key] = lambda: tester
    assert json.loads((await asgi_request(app, "/v1/me")).body) == "tester"


@pytest.mark.anyio
async def test_sub_dependencies_inherit_scopes(engine: Engine) -> None:
    """The scopes of `Security(account, …)` reach the `api_key` that `account` depends on."""
    required: list[list[str]] = []

    async def account(
        key: Annotated[Principal, Depends(api_key)], security_scopes: SecurityScopes
    ) -> str:
        required.append(security_scopes.scopes)
        return key.key_name

    async def route(account: Annotated[str, Security(account, scopes=["SENDING"])]) -> str:
        return account

    app = FastAPI()
    app.add_api_route("/deep", route)
    assert permissions_of(app) == {"SENDING": ["GET /deep"]}
    assert app.openapi()["paths"]["/deep"]["get"]["security"] == [{"APIKey": ["SENDING"]}]
    both = {"SENDING": ["GET /deep"], "READING": ["GET /deep"]}
    protected(app, engine, permissions=both)
    for permission, status in (("SENDING", 200), ("READING", 403)):
        key = await create(engine, permission)
        assert (await asgi_request(app, "/deep", auth_header(key))).status == status
    assert required == [["SENDING"]]


@pytest.mark.anyio
async def test_dependencies_that_began_are_ended_by_a_refusal(engine: Engine) -> None:
    """One with `yield` gets its clean-up, as after any exception."""
    events: list[str] = []

    async def session() -> Any:
        events.append("opened")
        try:
            yield
        finally:
            events.append("closed")

    app = FastAPI(dependencies=[Depends(session)])
    app.add_api_route("/v1/emails", send)
    protected(app, engine, permissions={"READING": ["GET /v1/emails"]})
    key = await create(engine, "READING")
    assert (await asgi_request(app, "/v1/emails", auth_header(key))).status == 403
    assert events == ["opened", "closed"]


@pytest.mark.anyio
async def test_a_refusal_behind_a_function_middleware(engine: Engine) -> None:
    """`@app.middleware("http")` runs the app in another task; the refusal comes out all the same,
    and an app's own handler for all errors has no say."""
    app = sample()
    app.add_exception_handler(Exception, lambda request, error: PlainTextResponse("oh", 500))

    @app.middleware("http")
    async def timed(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    protected(app, engine, permissions={"READING": ["GET /v1/both"]})
    answer = await asgi_request(app, "/v1/both", auth_header(await create(engine, "READING")))
    assert (answer.status, json.loads(answer.body)["error"]) == (403, "insufficient_scope")


@pytest.mark.anyio
async def test_refused_after_the_answer_began_is_an_error(engine: Engine) -> None:
    """Nothing is answered twice: the server gets the app's exception."""

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await Response("begun")(scope, receive, send)
        raise Refused(Deny(Reason.MISSING))

    started: list[Message] = []

    async def server(message: Message) -> None:
        if message["type"] == "http.response.start":
            if started:
                raise RuntimeError("the response has already started")
            started.append(message)

    app = APIKeyMiddleware(late, engine=engine, public=["/"])
    with pytest.raises(RuntimeError, match="already started"):
        await app(http_scope("/"), None, server)  # type: ignore[arg-type]
    assert [message["status"] for message in started] == [200]


def test_websockets(make_engine: MakeEngine) -> None:
    """The dependency works before a WebSocket is accepted; its refusal fails the handshake."""
    app = FastAPI()

    @app.websocket("/chat")
    async def chat(websocket: WebSocket, key: Sender) -> None:
        await websocket.accept()
        await websocket.send_text(key.key_name)
        await websocket.close()

    assert permissions_of(app) == {"SENDING": ["GET /chat"]}
    operator, engine = (make_engine(permissions="FULL,SENDING,READING") for _ in range(2))

    async def keys() -> list[Created]:
        try:
            return [await create(operator, permission) for permission in ("SENDING", "READING")]
        finally:
            await operator.stop()

    sender, reader = asyncio.run(keys())
    rules = {"SENDING": ["GET /chat"], "READING": ["GET /chat"]}
    with serving(protected(app, engine, permissions=rules)) as url:
        place = url.replace("http", "ws") + "/chat"
        fields = {"Authorization": f"Bearer {sender.token.reveal()}"}
        with connect(place, additional_headers=fields, proxy=None) as socket:
            assert socket.recv() == "my SENDING"
        fields = {"Authorization": f"Bearer {reader.token.reveal()}"}
        with pytest.raises(InvalidStatus) as refused:
            connect(place, additional_headers=fields, proxy=None)
    response = refused.value.response
    assert response.status_code == 403
    assert json.loads(response.body or b"")["error"] == "insufficient_scope"


# OpenAPI


@pytest.mark.anyio
async def test_openapi_shows_scheme_and_permissions(engine: Engine) -> None:
    """A valid OpenAPI 3.1 document: HTTP bearer, and for each route the permission it needs."""
    app = protected(sample(), engine, public=["/openapi.json"])
    document = json.loads((await asgi_request(app, "/openapi.json")).body)
    OpenAPIV31SpecValidator(document).validate()
    assert document["components"]["securitySchemes"] == {
        "APIKey": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "API key",
            "description": "An API key, sent as `Authorization: Bearer <key>`.",
        }
    }
    needed = {
        f"{method.upper()} {path}": operation.get("security")
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert needed == {
        "GET /healthz": None,
        "GET /v1/me": [{"APIKey": []}],
        "POST /v1/emails": [{"APIKey": ["SENDING"]}],
        "GET /v1/emails/{id}": [{"APIKey": ["SENDING"]}],
        "GET /v1/both": [{"APIKey": ["SENDING", "READING"]}],
    }


def test_the_scheme_can_be_described_in_ones_own_words() -> None:
    """Name, description and format are arguments."""
    mine = APIKey(scheme_name="Acme", description="From **Settings → Keys**.", bearer_format="acme")
    app = FastAPI(dependencies=[Security(mine)])
    app.add_api_route("/", anyone)
    document = app.openapi()
    scheme = document["components"]["securitySchemes"]["Acme"]
    assert (scheme["description"], scheme["bearerFormat"]) == ("From **Settings → Keys**.", "acme")
    assert document["paths"]["/"]["get"]["security"] == [{"Acme": []}]


@pytest.mark.anyio
async def test_swagger_ui_is_served_where_it_is_public(engine: Engine) -> None:
    """With the document, whose scheme makes its Authorize button; otherwise it needs FULL."""
    app = protected(sample(), engine, public=["/docs", "/openapi.json"])
    page = await asgi_request(app, "/docs")
    assert page.status == 200
    assert b"url: '/openapi.json'" in page.body
    assert (await asgi_request(app, "/redoc")).status == 401


# The rules


def test_rules_are_read_from_the_routes() -> None:
    """One permission: its rule. None, or several: for FULL, and so no rule."""
    assert permissions_of(sample()) == RULES


def test_routes_added_later_count_until_the_middleware_is_built() -> None:
    """So `add_middleware` may stand at the top of the file, as it does everywhere."""
    app = FastAPI()
    rules = permissions_of(app)
    assert not rules
    app.add_api_route("/v1/emails", send, methods=["POST", "PUT"])
    assert dict(rules) == {"SENDING": ["POST /v1/emails", "PUT /v1/emails"]}


@pytest.mark.anyio
async def test_the_middleware_takes_them(engine: Engine) -> None:
    """A route's declaration is all that there is to write."""
    app = FastAPI()
    protected(app, engine, permissions=permissions_of(app))
    app.add_api_route("/v1/emails/{id}", send)
    app.add_api_route("/v1/me", name_of)
    headers = auth_header(await create(engine, "SENDING"))
    for path, status in (("/v1/emails/7", 200), ("/v1/emails/7/8", 403), ("/v1/me", 403)):
        assert (await asgi_request(app, path, headers)).status == status
    assert (await asgi_request(app, "/v1/me", auth_header(await create(engine)))).status == 200


def test_routers_and_mounted_apps() -> None:
    """With prefixes of routers in routers, and of apps in apps; parameters wherever they are."""

    async def chat(websocket: WebSocket, key: Sender) -> None: ...

    inner = APIRouter(prefix="/inner")
    inner.add_api_route("/{id:int}", send)
    inner.add_api_websocket_route("/chat", chat)
    inner.mount("/old", Starlette(routes=[Route("/x", lambda request: Response())]))
    outer = APIRouter(prefix="/outer")
    outer.include_router(inner, prefix="/more")
    sub = FastAPI()
    sub.include_router(inner)
    sub.add_api_route("/", send, methods=["DELETE"])
    app = FastAPI()
    app.include_router(outer, prefix="/v1")
    app.mount("/{tenant}/sub", sub)
    app.mount("/files/static", StaticFiles(directory="tests"))
    rules = permissions_of(app)
    assert rules == {
        "SENDING": [
            "GET /v1/outer/more/inner/{id:int}",
            "GET /v1/outer/more/inner/chat",
            "GET /{tenant}/sub/inner/{id:int}",
            "GET /{tenant}/sub/inner/chat",
            "DELETE /{tenant}/sub/",
        ]
    }
    Policy(permissions=rules)


def test_scopes_of_routers_and_apps_add_up() -> None:
    """The requirements of app, router, inclusion and route are combined."""
    app = FastAPI(dependencies=[Security(api_key)])
    router = APIRouter(dependencies=[Security(api_key, scopes=["SENDING"])])
    router.add_api_route("/one", name_of)
    router.add_api_route("/same", send)
    router.add_api_route("/two", both)
    app.include_router(router, prefix="/a")
    reading = [Security(api_key, scopes=["READING"])]
    app.include_router(router, prefix="/b", dependencies=reading)
    app.add_api_route("/read", anyone, dependencies=reading)
    assert permissions_of(app) == {
        "SENDING": ["GET /a/one", "GET /a/same"],
        "READING": ["GET /read"],
    }


def test_what_is_for_full_only() -> None:
    """HEAD and OPTIONS, a scope FULL, and scopes of another security scheme."""

    async def of_another_scheme(scopes: SecurityScopes) -> str:
        return scopes.scope_str

    app = FastAPI()
    app.add_api_route("/a", send, methods=["HEAD", "OPTIONS"])
    app.add_api_route("/b", anyone, dependencies=[Security(api_key, scopes=["FULL"])])
    app.add_api_route("/c", anyone, dependencies=[Security(of_another_scheme, scopes=["SENDING"])])
    app.add_route("/d", lambda request: Response())
    assert permissions_of(app) == {}


@pytest.mark.parametrize(
    ("closed", "opened"),
    [
        ("/v1/emails/stats", "/v1/emails/{id}"),
        ("/v1/emails/{name}", "/v1/emails/{id}"),
        ("/v1/emails/{id:int}", "/v1/emails/{id}"),
        ("/v1/emails/7", "/v1/emails/{id:int}"),
        ("/{a}/x", "/y/{b}"),
        ("/files/list", "/{path:path}"),
        ("/files/{path:path}", "/files/{id}"),
        ("/v1/emails", "/v1/emails"),
        ("/v1/emails/x.json", "/v1/emails/{id}.json"),
    ],
)
def test_a_rule_that_allows_a_route_for_full_stops_the_start(closed: str, opened: str) -> None:
    """Rules know no order of routes; a route that would be allowed by mistake fails the start."""
    app = FastAPI()
    app.add_api_route(closed, name_of)
    app.add_api_route(opened, send)
    with pytest.raises(ConfigurationError, match=r'scopes=\["FULL"\]') as caught:
        Policy(permissions=permissions_of(app))
    expected = f"GET {closed} requires FULL, but GET {opened} of SENDING opens it"
    assert [wrong for wrong, _ in caught.value.mistakes] == [expected]


SEGMENTS = ["a", "7", "{?}", "{?:int}", "{?:path}", "{?}.a", "a{?}"]
TEMPLATES = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3).map(
    lambda segments: [each.replace("?", f"p{at}") for at, each in enumerate(segments)]
)
PATHS = ["/" + "/".join(path) for n in range(5) for path in product(["a", "7", "7.a"], repeat=n)]


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(closed=TEMPLATES, opened=TEMPLATES)
def test_no_route_for_full_is_allowed_implicitly(closed: list[str], opened: list[str]) -> None:
    """Whenever some path matches both, whatever the two look like, the start fails."""
    app = FastAPI()
    for endpoint, segments in ((name_of, closed), (send, opened)):
        app.add_api_route("".join(f"/{each}" for each in segments), endpoint)
    patterns = [
        compile_path(route.path)[0] for route in app.routes[-2:] if isinstance(route, Route)
    ]
    if any(all(pattern.match(path) for pattern in patterns) for path in PATHS):
        with pytest.raises(ConfigurationError):
            list(permissions_of(app))


@pytest.mark.anyio
async def test_scopes_full_closes_such_a_route(engine: Engine) -> None:
    """The hint helps: the rule still opens the path, and the dependency closes the route."""
    app = FastAPI()
    full = [Security(api_key, scopes=["FULL"])]
    app.add_api_route("/v1/emails/stats", anyone, dependencies=full)
    app.add_api_route("/v1/emails/{id}", send)
    protected(app, engine, permissions=permissions_of(app))
    sender = auth_header(await create(engine, "SENDING"))
    assert (await asgi_request(app, "/v1/emails/7", sender)).status == 200
    refused = await asgi_request(app, "/v1/emails/stats", sender)
    assert refused == await asgi_request(app, "/v1/elsewhere", sender)
    assert refused.status == 403
    assert (
        await asgi_request(app, "/v1/emails/stats", auth_header(await create(engine)))
    ).status == 200


@pytest.mark.parametrize(
    ("closed", "opened"),
    [
        ("/v1/emails/stats", "/v1/emails/{id:int}"),
        ("/v1/emails", "/v1/emails/{id}"),
        ("/v1/emails/{id}/stats", "/v1/emails/{id}/{part:uuid}"),
        ("/v1/emails/x.xml", "/v1/emails/{id}.json"),
    ],
)
def test_neighbours_do_not_stop_the_start(closed: str, opened: str) -> None:
    """Where no path matches both there is nothing to tell."""
    app = FastAPI()
    app.add_api_route(closed, name_of)
    app.add_api_route(opened, send)
    assert list(permissions_of(app)) == ["SENDING"]


def test_what_comes_later_or_says_so_itself_does_not_stop_the_start() -> None:
    """The router never gets to the former, and the dependency runs in the latter."""
    app = FastAPI()
    app.add_api_route("/{page}", both)
    app.add_api_route("/{page}", name_of, methods=["POST"])
    app.add_api_route("/{page}", send)
    app.add_api_route("/{page}", name_of)
    app.add_route("/{page}", lambda request: Response())
    app.mount("/", StaticFiles(directory="tests"))
    assert list(permissions_of(app)) == ["SENDING"]


def test_routes_that_only_the_router_distinguishes_stop_the_start() -> None:
    """A rule for GET is also one for HEAD, for WebSockets and for every host, in any order."""

    async def chat(websocket: WebSocket) -> None: ...

    app = FastAPI()
    app.add_api_route("/x", send)
    app.add_api_route("/x", name_of, methods=["HEAD"])
    app.add_api_websocket_route("/x", chat)
    app.router.routes.append(Host("admin", FastAPI(routes=[Route("/x", Response())])))
    app.router.routes.append(Mount("/later", StaticFiles(directory="tests")))
    with pytest.raises(ConfigurationError) as caught:
        list(permissions_of(app))
    refused_routes = [wrong.split(" requires")[0] for wrong, _ in caught.value.mistakes]
    assert refused_routes == ["HEAD /x", "GET /x", "* /x"]


def test_a_mounted_app_without_routes_is_for_full() -> None:
    """Whatever lies below its path; so a rule that reaches there stops the start."""
    app = FastAPI()
    app.mount("/static", StaticFiles(directory="tests"))
    app.add_api_route("/v1/{id}", send)
    assert list(permissions_of(app)) == ["SENDING"]
    app.add_api_route("/{tenant}/emails", send, methods=["POST"])
    with pytest.raises(ConfigurationError, match=r"^\* /static/{path:path} requires FULL"):
        list(permissions_of(app))


# Its package


@pytest.mark.long
def test_without_fastapi_the_import_says_what_is_missing() -> None:
    """keylatch itself does not need it."""
    expected = "ImportError: keylatch.fastapi needs the package fastapi: pip install"
    said = error_without_package("fastapi", "import keylatch.asgi, keylatch.fastapi")
    assert said.startswith(expected)
