"""The sidecar on one screen: every route it serves, and what each of them speaks."""

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
from starlette.types import ASGIApp, Receive, Scope, Send

from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch_sidecar import health, leaked, metrics, openapi
from keylatch_sidecar.audience import METRICS_PATHS, Place, came_to
from keylatch_sidecar.followed import followed
from keylatch_sidecar.management import audit, key_usage, rotation, sendook, unsent
from keylatch_sidecar.management.problems import Problem, no_such_key
from keylatch_sidecar.proxies import ext_authz, verify
from keylatch_sidecar.proxies.answers import Proxies
from keylatch_sidecar.proxies.facts import PROFILES
from keylatch_sidecar.settings import ProxySettings

ROUTES = [
    Route("/v1/api-keys", unsent.Keys),
    Route("/v1/api-keys/self", rotation.Self),
    Route("/v1/api-keys/revoke-all", rotation.Everything),
    Route("/v1/api-keys/{id}/rotate", rotation.Rotation),
    Route("/v1/api-keys/{id}/rotate/cancel", rotation.CancelledRotation),
    Route("/v1/api-keys/{id}/rotate/finish", rotation.FinishedRotation),
    Route("/v1/api-keys/{id}/usage", key_usage.OneKeysUsage),
    Route("/v1/api-keys/{id:path}", unsent.OneKey),
    Route("/v1/audit", audit.Audit),
    Route("/v1/api_keys", sendook.Keys),
    Route("/v1/api_keys/{id:path}", sendook.OneKey),
    Route("/leaked", leaked.Leaked),
    Route("/healthz", health.healthz),
    Route("/readyz", health.readyz),
    Route("/metrics", metrics.metrics),
    Route("/openapi.json", openapi.document),
]
_OF_KEYS: Final = ("/v1/api-keys/", "/v1/api_keys/")
_FOR_PROXIES: Final = ("/healthz", "/readyz")
_NOTHING: Final = unsent.spell(Problem(404, "Not Found"))
_GRPC_GRACE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class GRPCListener:
    """Where to listen for gRPC.

    Args:
        address: `127.0.0.1:8703`, or `unix:/run/keylatch/grpc.sock`.
        is_shared: whether several processes do, on one port.
    """

    address: str
    is_shared: bool


def create_app(
    engine: Engine,
    settings: ProxySettings | None = None,
    *,
    admin: Place = None,
    metrics_at: Place = None,
    grpc: GRPCListener | None = None,
    siblings: Path | None = None,
) -> ASGIApp:
    """The sidecar around an engine, which it starts and stops.

    Args:
        engine: judges tokens and manages keys.
        settings: how proxies ask; None: from the environment.
        admin: the port, or the Unix socket's path, where alone keys are managed; None: everywhere.
        metrics_at: where metrics and readiness are told without a key, and nothing else; None:
            nowhere.
        grpc: where proxies ask over gRPC; None: nowhere.
        siblings: where workers that share a port find each other; None: there is one.
    """
    settings = settings or ProxySettings.load()
    engine.store.audit_days = engine.settings.audit_days
    proxies = Proxies(engine, settings.proxy_cache_ttl)
    reports = leaked.Reports(engine)
    page = metrics.Page(engine, siblings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(engine.stop)
            await engine.start()
            stack.push_async_callback(reports.end)
            await stack.enter_async_context(page.shared())
            if grpc is not None:
                from keylatch_sidecar.proxies import grpc_authz  # an extra

                server = await grpc_authz.serve(
                    proxies, engine, grpc.address, is_shared=grpc.is_shared
                )
                stack.push_async_callback(server.stop, _GRPC_GRACE_SECONDS)
            yield

    management = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error, Exception: _unexpected},
    )
    management.state.engine = engine
    management.state.private = {admin, metrics_at} - {None}
    management.state.reports = reports
    management.state.metrics = page
    management.router.redirect_slashes = False  # a redirect means 500 to nginx's auth_request
    verifying = verify.Verify(proxies, PROFILES[settings.verify_facts])
    authorizing = ext_authz.ExtAuthz(proxies, PROFILES[settings.ext_authz_facts])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if metrics_at is not None and came_to(scope) == metrics_at:
            is_served = scope["type"] == "http" and scope["path"] in METRICS_PATHS
            await (management if is_served else _NOTHING)(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == verify.PATH:
            await verifying(scope, receive, send)
        elif scope["type"] == "http" and ext_authz.is_asked(scope["path"]):
            await authorizing(scope, receive, send)
        elif scope["type"] != "http" or _is_served(scope, admin):
            await management(scope, receive, send)
        else:
            await _NOTHING(scope, receive, send)

    if not engine.settings.is_followed:
        return app
    return followed(app, tells=engine.settings.timing == "on")


def _is_served(scope: Scope, admin: Place) -> bool:
    """Whether what is not for proxies may be asked where this request came to."""
    return admin in (None, came_to(scope)) or scope["path"] in _FOR_PROXIES


def from_environment(
    admin: Place = None,
    metrics_at: Place = None,
    grpc: GRPCListener | None = None,
    siblings: Path | None = None,
) -> ASGIApp:
    """What `keylatch serve` runs: settings come from `KEYLATCH_*`; see `create_app`."""
    return create_app(
        Engine(Settings.load()), admin=admin, metrics_at=metrics_at, grpc=grpc, siblings=siblings
    )


async def _http_error(request: Request, error: Exception) -> Response:
    http = cast(HTTPException, error)
    if http.status_code == 404 and request.scope["path"].startswith(_OF_KEYS):
        return _spelled(request, no_such_key())  # an id that even the router takes for none
    return _spelled(request, Problem(http.status_code, http.detail, headers=http.headers))


async def _unexpected(request: Request, error: Exception) -> Response:
    return _spelled(request, Problem(500, "Something went wrong here; it was logged"))


def _spelled(request: Request, problem: Problem) -> Response:
    if request.url.path.startswith("/v1/api_keys"):
        return sendook.spell(problem)
    return unsent.spell(problem)
