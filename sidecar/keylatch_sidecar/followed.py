"""The sidecar with a trail for each request: an id in the log, and headers that tell times."""

from starlette.types import ASGIApp, Receive, Scope, Send

from keylatch.asgi import with_headers
from keylatch.telemetry.request_trace import tracing_request


def trace_requests(app: ASGIApp, *, timing_headers: bool) -> ASGIApp:
    """The app, whose requests leave a trail.

    Args:
        app: answers.
        timing_headers: whether the answers say how long the check took, and who knew.
    """

    async def traced_app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        with tracing_request(scope["headers"]) as trace:
            await app(scope, receive, with_headers(trace, send) if timing_headers else send)

    return traced_app
