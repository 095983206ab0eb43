"""`/v1/audit`: the audit log of the caller's organisation, newest first."""

from typing import Any, Final

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch.core.decisions import AuditEvent
from keylatch_sidecar.api import parameters
from keylatch_sidecar.api.access import authenticate_manager
from keylatch_sidecar.api.error_responses import errors_in
from keylatch_sidecar.api.pagination import next_link
from keylatch_sidecar.api.schemas import JSON, ResponseBody, iso
from keylatch_sidecar.api.unsent import render_error

DEFAULT_LIMIT: Final = 100
_TIME_FIELDS: Final = ("expiresAt", "graceEndsAt")  # in the log, milliseconds since the epoch


class AuditEntry(ResponseBody):
    """An audit event. In `details`, `metadata` is `{"sha256": …, "bytes": …}` of its JSON text
    without white space."""

    id: int
    at: str
    actor: str
    action: str
    organization_id: str | None
    key_id: str | None
    details: dict[str, Any]


class Audit(HTTPEndpoint):
    """`/v1/audit`"""

    @errors_in(render_error)
    async def get(self, request: Request) -> Response:
        """List the organisation's audit events, newest first, in pages; `?key=` lists those of one
        key."""
        caller, keyring = await authenticate_manager(request)
        limit = parameters.read(request, parameters.LIMIT) or DEFAULT_LIMIT
        before = parameters.read(request, parameters.BEFORE)
        key = request.query_params.get("key")
        events = await keyring.events(
            caller.organization_id,
            limit,
            key_id=None if key is None else parameters.validated_id(key),
            before=before,
            by=caller,
        )
        query = {"limit": str(limit)} | ({} if key is None else {"key": key})
        link = next_link(query | {"before": str(events[-1].id)}) if len(events) == limit else {}
        return JSON([describe(event) for event in events], 200, link)


def describe(event: AuditEvent) -> AuditEntry:
    """An audit event for a response body."""
    return AuditEntry(
        id=event.id,
        at=iso(event.at_ms),
        actor=event.actor,
        action=event.action,
        organization_id=event.organization_id,
        key_id=event.key_id,
        details={name: _display_value(name, value) for name, value in event.details.items()},
    )


def _display_value(name: str, value: Any) -> Any:
    return iso(value) if name in _TIME_FIELDS and value is not None else value
