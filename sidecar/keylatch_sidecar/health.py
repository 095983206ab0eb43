"""Is it up, and could it check a key now?"""

import logging

from starlette.requests import Request
from starlette.responses import Response

from keylatch.errors import KeylatchError
from keylatch_sidecar.bodies import JSON, Shape

log = logging.getLogger("keylatch")


class Health(Shape):
    """`ok`, or `unavailable` while the store does not answer."""

    status: str


async def healthz(request: Request) -> Response:
    """Live: the process answers."""
    return JSON(Health(status="ok"))


async def readyz(request: Request) -> Response:
    """Ready: the store answers too. Redis does not count, because nothing needs it."""
    try:
        await request.app.state.engine.ready()
    except KeylatchError as error:
        log.warning("not ready: %s", error.message)
        return JSON(Health(status="unavailable"), 503, {"Retry-After": "1"})
    return JSON(Health(status="ok"))
