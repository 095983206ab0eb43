"""How much of what all organisations share one of them may use at the same time (a bulkhead)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from keylatch.drafts import QuotaExceeded

_RETRY_AFTER_SECONDS: Final = 1


@dataclass(slots=True)
class _Turns:
    """Of one organisation: who works or waits, and the places for those that work."""

    places: asyncio.Semaphore
    count: int = 0


class OrganizationLimit:
    """Some pieces of work of an organisation at once, some more that wait their turn, and no more.

    It belongs to one event loop.

    Args:
        at_once: under way at the same time, for each organisation.
        waiting: how many more may wait, for each organisation.
    """

    def __init__(self, at_once: int, waiting: int) -> None:
        self._at_once = at_once
        self._most = at_once + waiting
        self._turns: dict[str, _Turns] = {}

    @asynccontextmanager
    async def turn(self, organization_id: str) -> AsyncIterator[None]:
        """`async with limit.turn("acme"): …` waits until it is the organisation's turn.

        Raises:
            QuotaExceeded: too many of the organisation wait already.
        """
        turns = self._turns.get(organization_id) or _Turns(asyncio.Semaphore(self._at_once))
        if turns.count >= self._most:
            raise QuotaExceeded(
                f"The organisation has {self._most} new secrets under way: wait for some of them",
                _RETRY_AFTER_SECONDS,
                limit="hashes",
            )
        self._turns[organization_id] = turns
        turns.count += 1
        try:
            async with turns.places:
                yield
        finally:
            turns.count -= 1
            if not turns.count:
                del self._turns[organization_id]
