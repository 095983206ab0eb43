"""Cross-origin requests: the CORS middleware is outside of keylatch's.

A browser asks first, without the key (Fetch standard, CORS-preflight fetch), and shows a script
only answers that name its origin. So CORS comes first on the way in: it answers the preflight
itself, and signs also what keylatch refuses. Each right order has its broken twin here.

quart-cors is no part of this; Quart takes Starlette's CORSMiddleware around `asgi_app`.
"""

import asyncio
from collections.abc import Callable

import httpx
import litestar
import pytest
import quart
from fastapi import FastAPI
from litestar.config.cors import CORSConfig
from litestar.middleware import DefineMiddleware
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from keylatch.asgi import APIKeyMiddleware
from keylatch.engine import Engine
from tests.support.engines import MakeEngine
from tests.support.servers import serving

ORIGIN = "https://app.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}


def with_cors(app: ASGIApp) -> ASGIApp:
    return CORSMiddleware(
        app, allow_origins=[ORIGIN], allow_methods=["*"], allow_headers=["Authorization"]
    )


async def send(request: Request) -> PlainTextResponse:
    return PlainTextResponse("sent")


# Each builds an app whose CORS is outside of keylatch, or inside where it is no use.


def starlette_app(engine: Engine, cors_is_outside: bool) -> ASGIApp:
    order = [Middleware(with_cors), Middleware(APIKeyMiddleware, engine=engine)]
    return Starlette(
        routes=[Route("/emails", send, methods=["POST"])],
        middleware=order if cors_is_outside else order[::-1],
    )


def fastapi_app(engine: Engine, cors_is_outside: bool) -> ASGIApp:
    app = FastAPI()
    app.add_api_route("/emails", send, methods=["POST"])
    if not cors_is_outside:
        app.add_middleware(with_cors)
    app.add_middleware(APIKeyMiddleware, engine=engine)
    if cors_is_outside:  # what is added last is outermost
        app.add_middleware(with_cors)
    return app


@litestar.post("/emails", status_code=200, media_type="text/plain")
async def litestar_send() -> str:
    return "sent"


CONFIG = CORSConfig(allow_origins=[ORIGIN], allow_headers=["Authorization"])


def litestar_config(engine: Engine, cors_is_outside: bool) -> ASGIApp:
    """`CORSConfig` is outside of Litestar's own middleware, and inside of what wraps the app."""
    if cors_is_outside:
        return litestar.Litestar(  # type: ignore[return-value]
            [litestar_send],
            cors_config=CONFIG,
            middleware=[DefineMiddleware(APIKeyMiddleware, engine=engine)],  # type: ignore[arg-type]
            on_startup=[engine.start],
            on_shutdown=[engine.stop],
        )
    app = litestar.Litestar([litestar_send], cors_config=CONFIG)
    return APIKeyMiddleware(app, engine=engine)  # type: ignore[arg-type]


def litestar_wrapped(engine: Engine, cors_is_outside: bool) -> ASGIApp:
    return wrapped(litestar.Litestar([litestar_send]), engine, cors_is_outside)  # type: ignore[arg-type]


def quart_app(engine: Engine, cors_is_outside: bool) -> ASGIApp:
    app = quart.Quart(__name__)

    @app.post("/emails")
    async def send() -> str:
        return "sent"

    app.asgi_app = wrapped(app.asgi_app, engine, cors_is_outside)  # type: ignore[arg-type, method-assign, assignment]
    return app  # type: ignore[return-value]


def wrapped(app: ASGIApp, engine: Engine, cors_is_outside: bool) -> ASGIApp:
    if cors_is_outside:
        return with_cors(APIKeyMiddleware(app, engine=engine))
    return APIKeyMiddleware(with_cors(app), engine=engine)


@pytest.fixture
def bearer(make_engine: MakeEngine) -> dict[str, str]:
    """The header of a good key."""

    async def create() -> str:
        engine = make_engine()
        created = await (await engine.keyring()).create("default", "of a browser")
        await engine.stop()
        return created.token.reveal()

    return {"Authorization": f"Bearer {asyncio.run(create())}"}


Build = Callable[[Engine, bool], ASGIApp]
every_framework = pytest.mark.parametrize(
    "build", [starlette_app, fastapi_app, litestar_config, litestar_wrapped, quart_app]
)


@pytest.mark.long
@every_framework
def test_cors_outside_of_keylatch(
    make_engine: MakeEngine, bearer: dict[str, str], build: Build
) -> None:
    """Preflights need no key, every answer can be read by the origin, and nothing else opens."""
    with serving(build(make_engine(), True)) as url, httpx.Client(base_url=url) as browser:
        preflight = browser.options("/emails", headers=PREFLIGHT)
        assert preflight.is_success
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()

        refused = browser.post("/emails", headers={"Origin": ORIGIN})
        assert (refused.status_code, refused.json()["error"]) == (401, "unauthorized")
        assert refused.headers["access-control-allow-origin"] == ORIGIN

        sent = browser.post("/emails", headers={"Origin": ORIGIN, **bearer})
        assert (sent.status_code, sent.text) == (200, "sent")
        assert sent.headers["access-control-allow-origin"] == ORIGIN

        other_origin = browser.post("/emails", headers={"Origin": "https://evil.example", **bearer})
        assert "access-control-allow-origin" not in other_origin.headers
        assert browser.options("/emails").status_code == 401


@pytest.mark.long
@every_framework
def test_cors_inside_of_keylatch_is_no_use(
    make_engine: MakeEngine, bearer: dict[str, str], build: Build
) -> None:
    """The broken twin: the preflight carries no key, is refused, and no browser goes on."""
    with serving(build(make_engine(), False)) as url, httpx.Client(base_url=url) as browser:
        for refused in (
            browser.options("/emails", headers=PREFLIGHT),
            browser.post("/emails", headers={"Origin": ORIGIN}),
        ):
            assert (refused.status_code, refused.json()["error"]) == (401, "unauthorized")
            assert "access-control-allow-origin" not in refused.headers
        assert browser.post("/emails", headers=bearer).text == "sent"
