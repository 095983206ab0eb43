"""The sidecar with a trail for each request: an id in the log, and headers that tell times."""

from starlette.types import ASGIApp, Receive, Scope, Send

from keylatch.asgi import telling
from keylatch.telemetry.trail import following


def followed(app: ASGIApp, *, tells: bool) -> ASGIApp:
    """The app, whose requests leave a trail.

    Args:
        app: answers.
        tells: whether the answers say how long the check took, and who knew.
    """

    async def follow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        with following(scope["headers"]) as trail:
            await app(scope, receive, telling(trail, send) if tells else send)

    return follow
