"""`/v1/audit`: who did what to which key of the organisation, the newest first."""

from typing import Any, Final

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch.model import Deed
from keylatch_sidecar.management.access import checked_id, manager
from keylatch_sidecar.management.bodies import JSON, Shape, iso
from keylatch_sidecar.management.listing import MAX_LIMIT, next_link, number
from keylatch_sidecar.management.profile import speaking
from keylatch_sidecar.management.unsent import spell

USUAL_LIMIT: Final = 100
_TIMES: Final = ("expiresAt", "graceEndsAt")  # milliseconds in the log


class Line(Shape):
    """A line of the audit log. In `details`, `metadata` is `{"sha256": …, "bytes": …}`, of its JSON
    text without blanks."""

    id: int
    at: str
    actor: str
    action: str
    organization_id: str | None
    key_id: str | None
    details: dict[str, Any]


class Audit(HTTPEndpoint):
    """`/v1/audit`"""

    @speaking(spell)
    async def get(self, request: Request) -> Response:
        """The organisation's audit log, the newest first, in pages; `?key=` shows what was done to
        one key."""
        caller, keyring = await manager(request)
        limit = number(request, "limit", MAX_LIMIT) or USUAL_LIMIT
        before = number(request, "before", 2**53)
        key = request.query_params.get("key")
        deeds = await keyring.deeds(
            caller.organization_id,
            limit,
            key_id=None if key is None else checked_id(key),
            before=before,
            by=caller,
        )
        query = {"limit": str(limit)} | ({} if key is None else {"key": key})
        link = next_link(query | {"before": str(deeds[-1].id)}) if len(deeds) == limit else {}
        return JSON([described(deed) for deed in deeds], 200, link)


def described(deed: Deed) -> Line:
    """A line as it is shown."""
    return Line(
        id=deed.id,
        at=iso(deed.at),
        actor=deed.actor,
        action=deed.action,
        organization_id=deed.organization_id,
        key_id=deed.key_id,
        details={name: _shown(name, value) for name, value in deed.details.items()},
    )


def _shown(name: str, value: Any) -> Any:
    return iso(value) if name in _TIMES and value is not None else value
