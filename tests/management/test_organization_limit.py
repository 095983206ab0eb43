"""An organisation's share of a common resource: some run, some wait, others are refused."""

import asyncio

import pytest

from keylatch.errors import QuotaExceeded
from keylatch.management.organization_limit import OrganizationLimit

pytestmark = pytest.mark.anyio


class Work:
    """Pieces of work that are held until they are released."""

    def __init__(self, limit: OrganizationLimit) -> None:
        self.limit = limit
        self.gate = asyncio.Event()
        self.begun: list[str] = []

    async def one(self, organization_id: str) -> None:
        async with self.limit.slot(organization_id):
            self.begun.append(organization_id)
            await self.gate.wait()

    async def many(self, organization_id: str, count: int) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(self.one(organization_id)) for _ in range(count)]
        await asyncio.sleep(0)
        return tasks


def refusals(tasks: list[asyncio.Task[None]]) -> list[QuotaExceeded]:
    errors = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    return [error for error in errors if isinstance(error, QuotaExceeded)]


async def test_an_organisation_has_its_share_and_no_more() -> None:
    """Of 30, four work, sixteen wait, and ten are refused with a retry after one second."""
    work = Work(OrganizationLimit(4, 16))
    tasks = await work.many("acme", 30)
    errors = refusals(tasks)
    assert (len(work.begun), len(errors)) == (4, 10)
    assert {(error.retry_after_seconds, error.limit) for error in errors} == {(1, "hashes")}
    work.gate.set()
    await asyncio.wait(tasks)
    assert len(work.begun) == 20


async def test_others_do_not_wait_for_it() -> None:
    """Each organisation has a share of its own."""
    work = Work(OrganizationLimit(1, 0))
    tasks = await work.many("acme", 5) + await work.many("rival", 1)
    assert (work.begun, len(refusals(tasks))) == (["acme", "rival"], 4)
    work.gate.set()
    await asyncio.wait(tasks)


async def test_there_is_room_again_and_nothing_is_kept() -> None:
    """After work that ended, failed or was cancelled while it worked or waited."""
    work = Work(OrganizationLimit(1, 1))
    for _ in range(3):
        for task in await work.many("acme", 2):
            task.cancel()
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(OSError, match="full"):
        async with work.limit.slot("acme"):
            raise OSError("full")
    assert work.limit._slots == {}
    work.gate.set()
    await work.one("acme")
