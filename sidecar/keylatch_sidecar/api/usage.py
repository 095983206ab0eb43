"""`/v1/api-keys/{id}/usage`: how often a key was let in and refused, day by day."""

from collections import Counter
from typing import Final

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch.storage.usage import Client, DayUsage, KeyUsage
from keylatch_sidecar.api import days
from keylatch_sidecar.api.access import authenticate_manager, key_id
from keylatch_sidecar.api.dialects import errors_in
from keylatch_sidecar.api.errors import no_such_key
from keylatch_sidecar.api.schemas import JSON, ResponseBody, iso
from keylatch_sidecar.api.unsent import render_error

DEFAULT_DAYS: Final = 30


class UsageTotals(ResponseBody):
    """How often a key was let in, and refused for which reason."""

    allowed: int
    refused: dict[str, int]


class DailyUsage(ResponseBody):
    """The same for one day (UTC)."""

    day: str
    allowed: int
    refused: dict[str, int]


class LastClient(ResponseBody):
    """Where a key was seen last, as far as that is kept: a network and a product's name."""

    address: str | None
    agent: str | None
    seen_at: str


class KeyUsageReport(ResponseBody):
    """The uses of a key. Days without any are left out; the newest comes first."""

    id: str
    last_used: str | None
    total: UsageTotals
    days: list[DailyUsage]
    client: LastClient | None


class OneKeyUsage(HTTPEndpoint):
    """`/v1/api-keys/{id}/usage`"""

    @errors_in(render_error)
    async def get(self, request: Request) -> Response:
        """Tell how often a key was let in and refused on each of the last `?days=` (30)."""
        caller, keyring = await authenticate_manager(request)
        period = days.read_days(request, "days", days.MAX_USAGE_DAYS) or DEFAULT_DAYS
        found = await keyring.usage(caller.organization_id, key_id(request), period, by=caller)
        if found is None:
            raise no_such_key()
        return JSON(describe(found))


def describe(found: KeyUsage) -> KeyUsageReport:
    """The uses of a key, as they are shown to people who may manage it."""
    used_at = found.record.last_used
    total = Counter[str]()
    for each in found.days:
        total.update(each.refused)
    return KeyUsageReport(
        id=found.record.id,
        last_used=None if used_at is None else iso(used_at),
        total=UsageTotals(allowed=sum(each.allowed for each in found.days), refused=dict(total)),
        days=[_day(each) for each in found.days],
        client=None if found.client is None else _client(found.client),
    )


def _day(day: DayUsage) -> DailyUsage:
    return DailyUsage(day=day.date.isoformat(), allowed=day.allowed, refused=dict(day.refused))


def _client(client: Client) -> LastClient:
    return LastClient(address=client.address, agent=client.agent, seen_at=iso(client.seen_at_ms))
