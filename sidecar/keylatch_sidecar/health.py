"""Is it up, could it check a key now, and which component of it is not as it should be?"""

from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from keylatch.engine import Engine
from keylatch.errors import KeylatchError
from keylatch.telemetry import health
from keylatch_sidecar.api.monitoring_access import is_operator
from keylatch_sidecar.api.schemas import JSON, ResponseBody, iso


class Liveness(ResponseBody):
    """`ok`."""

    status: str


class Component(ResponseBody):
    """`ok`, `degraded` (keys are still decided on), `unavailable`, or `off` (there
    is none); since when; and what is the matter, if anything is."""

    state: Literal["ok", "degraded", "unavailable", "off"]
    since: str | None
    reason: str


class Components(ResponseBody):
    """What a check may need."""

    store: Component
    lease: Component
    redis: Component
    hashing: Component
    usage: Component


class Readiness(ResponseBody):
    """`ok`, or `unavailable` while no key can be checked; and each component, where the caller may
    know that."""

    status: str
    components: Components | None = None


async def healthz(request: Request) -> Response:
    """Live: the process answers."""
    return JSON(Liveness(status="ok"))


async def readyz(request: Request) -> Response:
    """Ready: the store answers too. Nothing else counts, because nothing else is needed."""
    engine: Engine = request.app.state.engine
    try:
        await engine.ready()
    except KeylatchError:  # the store's condition is in the log
        return JSON(await _body(request, "unavailable"), 503, {"Retry-After": "1"})
    return JSON(await _body(request, "ok"))


async def _body(request: Request, status: str) -> ResponseBody:
    if not await is_operator(request):
        return Liveness(status=status)
    engine: Engine = request.app.state.engine
    components = {component.name: _component(component) for component in engine.components()}
    return Readiness(status=status, components=Components(**components))


def _component(component: health.ComponentHealth) -> Component:
    since = None if component.since is None else iso(int(component.since * 1000))
    return Component(state=component.state, since=since, reason=component.reason)
