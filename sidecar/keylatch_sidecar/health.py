"""`/healthz` and `/readyz`: liveness, readiness, and the health of each component."""

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
    """`ok`, `degraded` (keys are still checked), `unavailable`, or `off` (not configured); since
    when; and the reason, if it is not `ok`."""

    state: Literal["ok", "degraded", "unavailable", "off"]
    since: str | None
    reason: str


class Components(ResponseBody):
    """All components."""

    store: Component
    lease: Component
    redis: Component
    notifier: Component
    hashing: Component
    usage: Component


class Readiness(ResponseBody):
    """`ok`, `unavailable` while keys cannot be checked, or `draining` while the sidecar is about to
    stop; with the components for operators."""

    status: str
    components: Components | None = None


async def healthz(request: Request) -> Response:
    """Liveness: the process answers."""
    return JSON(Liveness(status="ok"))


async def readyz(request: Request) -> Response:
    """Readiness: the store answers and grants a lease, and the sidecar is not about to stop.
    Nothing else counts, because checks need nothing else."""
    engine: Engine = request.app.state.engine
    if request.app.state.drain.has_begun:
        return JSON(await _body(request, "draining"), 503, {"Retry-After": "1"})
    try:
        await engine.ready()
    except KeylatchError:  # the failure is in the log
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
