"""`/v1/api-keys/{id}/usage`: how often a key was let in and refused, day by day."""

from collections import Counter
from datetime import date
from typing import Final

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch.usage.tally import Client, Day, KeyUsage
from keylatch_sidecar.management import days
from keylatch_sidecar.management.access import key_id, manager
from keylatch_sidecar.management.bodies import JSON, Shape, iso
from keylatch_sidecar.management.problems import no_such_key
from keylatch_sidecar.management.profile import speaking
from keylatch_sidecar.management.unsent import spell

USUAL_DAYS: Final = 30
_EPOCH: Final = date(1970, 1, 1).toordinal()


class Uses(Shape):
    """How often a key was let in, and refused for which reason."""

    allowed: int
    refused: dict[str, int]


class DayOfUse(Shape):
    """The same for one day (UTC)."""

    day: str
    allowed: int
    refused: dict[str, int]


class SeenClient(Shape):
    """Where a key was seen last, as far as that is kept: a network and a product's name."""

    address: str | None
    agent: str | None
    seen_at: str


class UsageOfKey(Shape):
    """The uses of a key. Days without any are left out; the newest comes first."""

    id: str
    last_used: str | None
    total: Uses
    days: list[DayOfUse]
    client: SeenClient | None


class OneKeysUsage(HTTPEndpoint):
    """`/v1/api-keys/{id}/usage`"""

    @speaking(spell)
    async def get(self, request: Request) -> Response:
        """Tell how often a key was let in and refused on each of the last `?days=` (30)."""
        caller, keyring = await manager(request)
        asked = days.asked(request, "days", days.MAX_KEPT) or USUAL_DAYS
        found = await keyring.usage(caller.organization_id, key_id(request), asked, by=caller)
        if found is None:
            raise no_such_key()
        return JSON(describe(found))


def describe(found: KeyUsage) -> UsageOfKey:
    """The uses of a key, as they are shown to people who may manage it."""
    used_at = found.record.last_used
    total = Counter[str]()
    for each in found.days:
        total.update(each.refused)
    return UsageOfKey(
        id=found.record.id,
        last_used=None if used_at is None else iso(used_at),
        total=Uses(allowed=sum(each.allowed for each in found.days), refused=dict(total)),
        days=[_day(each) for each in found.days],
        client=None if found.client is None else _client(found.client),
    )


def _day(day: Day) -> DayOfUse:
    written = date.fromordinal(_EPOCH + day.day).isoformat()
    return DayOfUse(day=written, allowed=day.allowed, refused=dict(day.refused))


def _client(client: Client) -> SeenClient:
    return SeenClient(address=client.address, agent=client.agent, seen_at=iso(client.seen_at))
