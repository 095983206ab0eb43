"""`/v1/api-keys/{id}/usage`: how often a key was allowed and refused, by day."""

from collections import Counter
from typing import Final

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch.storage.usage import Client, DayUsage, KeyUsage
from keylatch_sidecar.api import parameters
from keylatch_sidecar.api.access import authenticate_manager
from keylatch_sidecar.api.error_responses import errors_in
from keylatch_sidecar.api.errors import found
from keylatch_sidecar.api.schemas import JSON, ResponseBody, iso
from keylatch_sidecar.api.unsent import render_error

DEFAULT_DAYS: Final = 30


class UsageTotals(ResponseBody):
    """How often a key was allowed, and how often it was refused for each reason."""

    allowed: int
    refused: dict[str, int]


class DailyUsage(ResponseBody):
    """The same for one day (UTC)."""

    day: str
    allowed: int
    refused: dict[str, int]


class LastClient(ResponseBody):
    """The client that used a key last, as far as it is stored: its network and the product in its
    `User-Agent`."""

    address: str | None
    agent: str | None
    seen_at: str


class KeyUsageReport(ResponseBody):
    """The uses of a key, newest day first, without the days that have none."""

    id: str
    last_used: str | None
    total: UsageTotals
    days: list[DailyUsage]
    client: LastClient | None


class OneKeyUsage(HTTPEndpoint):
    """`/v1/api-keys/{id}/usage`"""

    @errors_in(render_error)
    async def get(self, request: Request) -> Response:
        """Show how often a key was allowed and refused on each of the last `?days=` (30)."""
        caller, keyring = await authenticate_manager(request)
        days = parameters.read(request, parameters.USAGE_DAYS) or DEFAULT_DAYS
        key = parameters.key_id(request)
        usage = await keyring.usage(caller.organization_id, key, days, by=caller)
        return JSON(describe(found(usage)))


def describe(usage: KeyUsage) -> KeyUsageReport:
    """The uses of a key for a response body."""
    used_at = usage.record.last_used
    refused = Counter[str]()
    for day in usage.days:
        refused.update(day.refused)
    return KeyUsageReport(
        id=usage.record.id,
        last_used=None if used_at is None else iso(used_at),
        total=UsageTotals(allowed=sum(day.allowed for day in usage.days), refused=dict(refused)),
        days=[_day(day) for day in usage.days],
        client=None if usage.client is None else _client(usage.client),
    )


def _day(day: DayUsage) -> DailyUsage:
    return DailyUsage(day=day.date.isoformat(), allowed=day.allowed, refused=dict(day.refused))


def _client(client: Client) -> LastClient:
    return LastClient(address=client.address, agent=client.agent, seen_at=iso(client.seen_at_ms))
