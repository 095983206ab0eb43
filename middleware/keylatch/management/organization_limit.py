"""A limit on the concurrent work of each organisation (a bulkhead)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from keylatch.errors import QuotaExceeded

_RETRY_AFTER_SECONDS: Final = 1


@dataclass(slots=True)
class _Slots:
    """The work of one organisation.

    Args:
        semaphore: held by the work that runs.
        count: work that runs or waits.
    """

    semaphore: asyncio.Semaphore
    count: int = 0


class OrganizationLimit:
    """Lets each organisation do a few things at a time, and a few more wait.

    It belongs to one event loop.

    Args:
        max_active: running at the same time, for each organisation.
        max_waiting: waiting at the same time, for each organisation.
    """

    def __init__(self, max_active: int, max_waiting: int) -> None:
        self._max_active = max_active
        self._limit = max_active + max_waiting
        self._slots: dict[str, _Slots] = {}

    @asynccontextmanager
    async def slot(self, organization_id: str) -> AsyncIterator[None]:
        """`async with limit.slot("acme"): …` waits until the organisation has a free slot.

        Raises:
            QuotaExceeded: too much work of the organisation waits already.
        """
        slots = self._slots.get(organization_id) or _Slots(asyncio.Semaphore(self._max_active))
        if slots.count >= self._limit:
            raise QuotaExceeded(
                f"The organisation has {self._limit} new secrets under way: wait for some of them",
                _RETRY_AFTER_SECONDS,
                limit="hashes",
            )
        self._slots[organization_id] = slots
        slots.count += 1
        try:
            async with slots.semaphore:
                yield
        finally:
            slots.count -= 1
            if not slots.count:
                del self._slots[organization_id]
