"""Who may read about the sidecar itself: its metrics, its document, the parts of its readiness.

The listeners for metrics and for management are the operator's and need no key. Clients of the app
may reach the main listener, so a request there needs a key that may manage.
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
"""What the listener for metrics serves."""

Handler = Callable[[Request], Awaitable[Response]]
ListenerAddress = int | str | None
"""A listener as a request's scope names it: its port, or its Unix socket's path. None: none."""


def listener_of(scope: Scope) -> ListenerAddress:
    """The listener that a request came to."""
    host, port = scope.get("server") or (None, None)
    return host if port is None else port


def operators_only(handler: Handler) -> Handler:
    """Decorates an endpoint that is for operators alone: others are refused."""

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
    """Whether an endpoint that is for all may tell what is for operators; what cannot be found out
    now is a no."""
    if _is_private_listener(request):
        return True
    if "authorization" not in request.headers:  # a probe: no check that failed
        return False
    try:
        await access.authenticate_manager(request)
    except (Problem, KeylatchError):
        return False
    return True


def _is_private_listener(request: Request) -> bool:
    return listener_of(request.scope) in request.app.state.private_addresses
