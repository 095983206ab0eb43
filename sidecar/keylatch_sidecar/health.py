"""Is it up, could it check a key now, and which part of it is not as it should be?"""

from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from keylatch.engine import Engine
from keylatch.errors import KeylatchError
from keylatch.telemetry import condition
from keylatch_sidecar.audience import is_admitted
from keylatch_sidecar.management.bodies import JSON, Shape, iso


class Health(Shape):
    """`ok`."""

    status: str


class Part(Shape):
    """How a part is: `ok`, `degraded` (keys are still decided on), `unavailable`, or `off` (there
    is none); since when; and what is the matter, if anything is."""

    state: Literal["ok", "degraded", "unavailable", "off"]
    since: str | None
    reason: str


class Parts(Shape):
    """What a check may need."""

    store: Part
    lease: Part
    redis: Part
    hashing: Part
    usage: Part


class Readiness(Shape):
    """`ok`, or `unavailable` while keys could not be checked; and each part, where the caller may
    know that."""

    status: str
    parts: Parts | None = None


async def healthz(request: Request) -> Response:
    """Live: the process answers."""
    return JSON(Health(status="ok"))


async def readyz(request: Request) -> Response:
    """Ready: the store answers too. Nothing else counts, because nothing else is needed."""
    engine: Engine = request.app.state.engine
    try:
        await engine.ready()
    except KeylatchError:  # the store's condition is in the log
        return JSON(await _told(request, "unavailable"), 503, {"Retry-After": "1"})
    return JSON(await _told(request, "ok"))


async def _told(request: Request, status: str) -> Shape:
    if not await is_admitted(request):
        return Health(status=status)
    engine: Engine = request.app.state.engine
    parts = {part.name: _shape(part) for part in engine.parts()}
    return Readiness(status=status, parts=Parts(**parts))


def _shape(part: condition.Part) -> Part:
    since = None if part.since is None else iso(int(part.since * 1000))
    return Part(state=part.state, since=since, reason=part.words)
