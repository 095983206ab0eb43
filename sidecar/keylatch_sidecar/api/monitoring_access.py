"""Access to metrics, the OpenAPI document and the components of readiness.

The listeners for metrics and for management are private to the operator, and requests there need no
key. Clients of the app may reach the main listener, so a request there needs a FULL key.
"""

import functools
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from keylatch.errors import KeylatchError
from keylatch_sidecar.api import access, unsent
from keylatch_sidecar.api.errors import Problem, unavailable

METRICS_PATHS: Final = ("/metrics", "/healthz", "/readyz")
"""All paths of the listener for metrics."""

Handler = Callable[[Request], Awaitable[Response]]
ListenerAddress = int | str | None
"""The `server` of an ASGI scope: a port, or the path of a Unix socket. None: no such listener."""


def listener_of(scope: Scope) -> ListenerAddress:
    """The listener that received a request."""
    host, port = scope.get("server") or (None, None)
    return host if port is None else port


def operators_only(handler: Handler) -> Handler:
    """Decorator for an endpoint: refuses a request that `is_operator` would not accept."""

    @functools.wraps(handler)
    async def wrapper(request: Request) -> Response:
        try:
            if not _is_private_listener(request):
                await access.authenticate_manager(request)
        except Problem as problem:
            return unsent.render_error(problem)
        except KeylatchError:
            return unsent.render_error(unavailable())
        return await handler(request)

    return wrapper


async def is_operator(request: Request) -> bool:
    """Whether a response may contain details for operators; False if the key cannot be checked."""
    if _is_private_listener(request):
        return True
    if "authorization" not in request.headers:  # a probe, not a failed authentication
        return False
    try:
        await access.authenticate_manager(request)
    except (Problem, KeylatchError):
        return False
    return True


def _is_private_listener(request: Request) -> bool:
    return listener_of(request.scope) in request.app.state.private_addresses
