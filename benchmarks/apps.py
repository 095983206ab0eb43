"""Apps that benchmarks serve: the least that can answer, and the same view open and protected.

    python benchmarks/apps.py allow [--port 8700] [--uds PATH] [--grpc-port 8703] [--workers 2]

serves one of them as `keylatch serve` serves the sidecar: the very same code with another app, so
that two apps are compared and not two servers.
"""

import argparse
import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from keylatch_sidecar import server
from keylatch_sidecar.app import GRPCListener
from keylatch_sidecar.drain import Drain

FOLDER: Final = Path(__file__).parent

ALLOW: Final = [
    (b"content-length", b"0"),
    (b"cache-control", b"no-store"),
    (b"x-keylatch-key-id", b"key_000000000000"),
    (b"x-keylatch-key-name", b"bench"),
    (b"x-keylatch-organization-id", b"acme"),
    (b"x-keylatch-permission", b"FULL"),
    (b"x-keylatch-environment", b"live"),
]
HELLO: Final = [(b"content-length", b"2"), (b"content-type", b"text/plain")]


async def allow(scope: Scope, receive: Receive, send: Send) -> None:
    """The least that can answer a proxy: the headers of an allow, without a check."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": ALLOW})
        await send({"type": "http.response.body", "body": b""})
    elif scope["type"] == "lifespan":
        for word in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{word}.complete"})


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """The app behind a proxy."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": HELLO})
        await send({"type": "http.response.body", "body": b"ok"})


async def me(request: Request) -> JSONResponse:
    """As small as views are."""
    return JSONResponse({"status": "ok"})


def on_starlette() -> Any:
    """`/v1/me` on Starlette, protected where the query is `on`.

    A plain function chooses, so that both go through as many coroutines as they would alone.
    """
    from keylatch.asgi import APIKeyMiddleware

    open_app = Starlette(routes=[Route("/v1/me", me)])
    protected: ASGIApp = APIKeyMiddleware(open_app)

    def app(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        is_open = scope["type"] == "http" and scope["query_string"] != b"on"
        return (open_app if is_open else protected)(scope, receive, send)

    return app


def on_flask() -> Any:
    """`/v1/me` on Flask, protected where the query is `on`."""
    from flask import Flask

    from keylatch.wsgi import APIKeyMiddleware

    flask = Flask(__name__)
    flask.get("/v1/me")(lambda: {"status": "ok"})
    protected = APIKeyMiddleware(flask.wsgi_app)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        chosen = protected if environ["QUERY_STRING"] == "on" else flask.wsgi_app
        return chosen(environ, start_response)

    return app


def allowing(
    admin_address: int | str | None = None,
    metrics_address: int | str | None = None,
    grpc: GRPCListener | None = None,
    drain: Drain | None = None,
    worker_directory: Path | None = None,
) -> ASGIApp:
    """`allow` in the place of the sidecar's app; see `keylatch_sidecar.app.from_environment`."""
    return allow if grpc is None else over_grpc_as_well(grpc.address)


def over_grpc_as_well(address: str) -> ASGIApp:
    """`allow`, and the same answer to every check over gRPC."""
    import grpc.aio

    from keylatch_sidecar.forward_auth.ext_authz_grpc import SERVICE
    from keylatch_sidecar.forward_auth.protobuf import allow as allowed

    answer = allowed(ALLOW[2:], [b"authorization"])

    async def check(message: bytes, context: object) -> bytes:
        return answer

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            server = grpc.aio.server()
            methods: dict[str, Any] = {"Check": grpc.unary_unary_rpc_method_handler(check)}
            handler = grpc.method_handlers_generic_handler(SERVICE, methods)
            server.add_generic_rpc_handlers([handler])
            server.add_insecure_port(address)
            await server.start()
        await allow(scope, receive, send)

    return app


def answering_slowly() -> ASGIApp:
    """`allow`, which takes a second for `/slow`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/slow":
            await asyncio.sleep(1)
        await allow(scope, receive, send)

    return app


def main() -> None:
    """Serve as `keylatch serve` does."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("app", choices=["allow"])
    parser.add_argument("--port", type=int)
    parser.add_argument("--uds", type=Path)
    parser.add_argument("--grpc-port", type=int)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    import apps  # workers look the app up by its module's name, and this one is `__main__`

    server.from_environment = apps.allowing  # type: ignore[attr-defined]
    ports = [server.Listener("127.0.0.1", given.port)] if given.port else []
    sockets = [server.Listener("127.0.0.1", 0, given.uds)] if given.uds else []
    first, second = [*ports, *sockets, None][:2]
    assert first is not None, "--port or --uds"
    grpc = server.Listener.optional("127.0.0.1", given.grpc_port, None)
    server.run(first, second, grpc, given.workers)


if __name__ == "__main__":
    main()
