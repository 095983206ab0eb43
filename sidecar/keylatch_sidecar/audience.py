"""Who is told about the sidecar itself: its metrics, its document, the parts behind its readiness.

The listeners for metrics and for management are the operator's, and tell without a key. The main
listener may be reached by strangers, so whoever asks there needs a key that may manage.
"""

from typing import Final

from starlette.requests import Request
from starlette.types import Scope

from keylatch.errors import KeylatchError
from keylatch_sidecar.management import access
from keylatch_sidecar.management.problems import Problem

METRICS_PATHS: Final = ("/metrics", "/healthz", "/readyz")
"""What the listener for metrics serves."""

Place = int | str | None
"""A listener as a request's scope names it: its port, or its Unix socket's path. None: none."""


def came_to(scope: Scope) -> Place:
    """The listener that a request came to."""
    host, port = scope.get("server") or (None, None)
    return host if port is None else port


async def admit(request: Request) -> None:
    """Return if the request may be told.

    Raises:
        Problem: its key may not manage, or there is none.
        StoreUnavailable: that cannot be found out now.
    """
    if not _is_private(request):
        await access.manager(request)


async def is_admitted(request: Request) -> bool:
    """The same as a question; what cannot be found out now is a no."""
    if _is_private(request):
        return True
    if "authorization" not in request.headers:  # a probe: no check that failed
        return False
    try:
        await access.manager(request)
    except (Problem, KeylatchError):
        return False
    return True


def _is_private(request: Request) -> bool:
    return came_to(request.scope) in request.app.state.private
