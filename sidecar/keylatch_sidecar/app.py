"""The sidecar as an ASGI app: all routes on one screen, and which listener serves which of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keylatch.asgi import with_headers
from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch.telemetry.request_trace import tracing_request
from keylatch_sidecar import health, metrics
from keylatch_sidecar.api import audit, leaks, rotation, sendook, unsent, usage
from keylatch_sidecar.api.errors import Problem, no_such_key
from keylatch_sidecar.api.monitoring_access import METRICS_PATHS, ListenerAddress, listener_of
from keylatch_sidecar.drain import Drain
from keylatch_sidecar.forward_auth import ext_authz, verify
from keylatch_sidecar.forward_auth.decision import ForwardAuth
from keylatch_sidecar.forward_auth.original_request import SOURCES
from keylatch_sidecar.openapi import operations
from keylatch_sidecar.settings import ProxySettings

ROUTES = [
    Route("/v1/api-keys", unsent.Keys),
    Route("/v1/api-keys/self", rotation.OwnKey),
    Route("/v1/api-keys/revoke-all", rotation.AllKeys),
    Route("/v1/api-keys/{id}/rotate", rotation.Rotation),
    Route("/v1/api-keys/{id}/rotate/cancel", rotation.CancelledRotation),
    Route("/v1/api-keys/{id}/rotate/finish", rotation.FinishedRotation),
    Route("/v1/api-keys/{id}/usage", usage.OneKeyUsage),
    Route("/v1/api-keys/{id:path}", unsent.OneKey),
    Route("/v1/audit", audit.Audit),
    Route("/v1/api_keys", sendook.Keys),
    Route("/v1/api_keys/{id:path}", sendook.OneKey),
    Route("/leaked", leaks.Leaked),
    Route("/healthz", health.healthz),
    Route("/readyz", health.readyz),
    Route("/metrics", metrics.metrics),
    Route("/openapi.json", operations.document),
]
_KEY_PATHS: Final = ("/v1/api-keys/", "/v1/api_keys/")
_PROBE_PATHS: Final = ("/healthz", "/readyz")
_NOT_FOUND: Final = unsent.render_error(Problem(404, "Not Found"))
_GRPC_GRACE_SECONDS: Final = 2.0
_CLOSE: Final = (b"connection", b"close")


@dataclass(frozen=True, slots=True)
class GRPCListener:
    """A listener for gRPC.

    Args:
        address: `127.0.0.1:8703`, or `unix:/run/keylatch/grpc.sock`.
        is_shared: whether several processes listen on the port.
    """

    address: str
    is_shared: bool


def create_app(
    engine: Engine,
    settings: ProxySettings | None = None,
    *,
    admin_address: ListenerAddress = None,
    metrics_address: ListenerAddress = None,
    grpc: GRPCListener | None = None,
    drain: Drain | None = None,
    worker_directory: Path | None = None,
) -> ASGIApp:
    """The sidecar's app. Its lifespan starts and stops the engine.

    Args:
        engine: checks tokens and manages keys.
        settings: for reverse proxies; None: from the environment.
        admin_address: the only listener that manages keys; None: every listener does.
        metrics_address: the listener that serves metrics and readiness without a key, and nothing
            else; None: no such listener.
        grpc: the listener for gRPC; None: no such listener.
        drain: while it drains, the app is not ready, and asks clients for new connections; None: it
            never drains.
        worker_directory: of the workers that share the listeners; None: there is one worker.
    """
    settings = settings or ProxySettings.load()
    draining = drain or Drain()
    engine.store.audit_days = engine.settings.audit_days
    forward_auth = ForwardAuth(engine, settings.proxy_cache_ttl)
    leak_reports = leaks.ReportQueue(engine)
    metrics_page = metrics.MetricsPage(engine, worker_directory)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(engine.stop)
            await engine.start()
            stack.push_async_callback(leak_reports.close)
            watching = asyncio.create_task(draining.watch(), name="keylatch-drain")
            stack.callback(watching.cancel)
            await stack.enter_async_context(metrics_page.shared_with_workers())
            if grpc is not None:
                from keylatch_sidecar.forward_auth import ext_authz_grpc

                server = await ext_authz_grpc.serve(
                    forward_auth, engine, grpc.address, drain=draining, is_shared=grpc.is_shared
                )
                stack.push_async_callback(server.stop, _GRPC_GRACE_SECONDS)
            yield

    management = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error, Exception: _unexpected},
    )
    management.state.engine = engine
    management.state.private_addresses = {admin_address, metrics_address} - {None}
    management.state.reports = leak_reports
    management.state.metrics = metrics_page
    management.state.drain = draining
    management.router.redirect_slashes = False  # nginx's auth_request turns a redirect into 500
    verify_endpoint = verify.Verify(forward_auth, SOURCES[settings.verify_request])
    ext_authz_endpoint = ext_authz.ExtAuthz(forward_auth, SOURCES[settings.ext_authz_request])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if draining.has_begun:
            send = _closing_connection(send)
        if metrics_address is not None and listener_of(scope) == metrics_address:
            is_served = scope["type"] == "http" and scope["path"] in METRICS_PATHS
            await (management if is_served else _NOT_FOUND)(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == verify.PATH:
            await verify_endpoint(scope, receive, send)
        elif scope["type"] == "http" and ext_authz.matches(scope["path"]):
            await ext_authz_endpoint(scope, receive, send)
        elif scope["type"] != "http" or _is_served_here(scope, admin_address):
            await management(scope, receive, send)
        else:
            await _NOT_FOUND(scope, receive, send)

    if not engine.settings.traces_requests:
        return app
    return trace_requests(app, timing_headers=engine.settings.timing)


def _closing_connection(send: Send) -> Send:
    """Adds `Connection: close` to a response, so that the client's next request is on a new
    connection: where a balancer distributes connections and not requests, to another server."""

    async def send_and_close(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), _CLOSE]}
        await send(message)

    return send_and_close


def trace_requests(app: ASGIApp, *, timing_headers: bool) -> ASGIApp:
    """The app, with a trace for each HTTP request.

    Args:
        app: the sidecar.
        timing_headers: whether responses have the trace's header fields.
    """

    async def traced_app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        with tracing_request(scope["headers"]) as trace:
            await app(scope, receive, with_headers(trace, send) if timing_headers else send)

    return traced_app


def _is_served_here(scope: Scope, admin_address: ListenerAddress) -> bool:
    """Whether the request's listener serves paths that are not for reverse proxies."""
    if admin_address is None or scope["path"] in _PROBE_PATHS:
        return True
    return listener_of(scope) == admin_address


def from_environment(
    admin_address: ListenerAddress = None,
    metrics_address: ListenerAddress = None,
    grpc: GRPCListener | None = None,
    drain: Drain | None = None,
    worker_directory: Path | None = None,
) -> ASGIApp:
    """The app that `keylatch serve` runs: `create_app` with settings from the environment."""
    return create_app(
        Engine(Settings.load()),
        admin_address=admin_address,
        metrics_address=metrics_address,
        grpc=grpc,
        drain=drain,
        worker_directory=worker_directory,
    )


async def _http_error(request: Request, error: Exception) -> Response:
    http = cast(HTTPException, error)
    if http.status_code == 404 and request.scope["path"].startswith(_KEY_PATHS):
        # An id that no route matches, such as an empty one.
        return _render_error(request, no_such_key())
    return _render_error(request, Problem(http.status_code, http.detail, headers=http.headers))


async def _unexpected(request: Request, error: Exception) -> Response:
    return _render_error(request, Problem(500, "Internal error; the sidecar has logged it"))


def _render_error(request: Request, problem: Problem) -> Response:
    if request.url.path.startswith("/v1/api_keys"):
        return sendook.render_error(problem)
    return unsent.render_error(problem)
