"""Revokes repeatedly, by any given function, from a pool of live keys of constant size.

Each of a few loops makes keys, lets them live for a while, so that every worker has them cached,
revokes the oldest and makes another. A revoke that was refused is repeated until it is answered.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from channel import Channel

T = TypeVar("T")

_LIVE_PER_LOOP: Final = 4
_PAUSE_SECONDS: Final = 0.4  # on average
_RETRY_SECONDS: Final = 0.03
_WAITED: Final = 0.7  # of all revokes; the others are answered right after the commit


class Refused(Exception):
    """Nothing is known to have been done: to be repeated."""


class Gone(Exception):
    """The store has no such key: a failover lost its creation."""


@dataclass(frozen=True, slots=True)
class Revoked:
    """The answer to a revoke: when the commit was known, when it came, and what it promises."""

    committed: int
    answered: int
    bound_ns: int


class RevokerSubject(Protocol):
    """What is under test."""

    async def create(self) -> tuple[str, str]:
        """A new key and its token. May raise `Refused`."""

    async def revoke(self, key: str, wait: bool) -> Revoked:
        """Revoke a key. May raise `Refused` and `Gone`."""


async def revoke_until_ended(
    revoking: RevokerSubject, channel: Channel, chance: random.Random, at_a_time: int
) -> None:
    """Revoke until the end message, or until the peer disconnects.

    Args:
        revoking: revokes.
        channel: to the run.
        chance: when, and whether to wait for the others.
        at_a_time: loops.
    """
    ending = asyncio.Event()
    loops = [
        asyncio.create_task(_revoke_loop(revoking, channel, chance, ending))
        for _ in range(at_a_time)
    ]
    order = await channel.receive()
    assert order is None or order["do"] == "end"
    ending.set()
    await asyncio.gather(*loops)


async def _revoke_loop(
    revoking: RevokerSubject, channel: Channel, chance: random.Random, ending: asyncio.Event
) -> None:
    live: deque[str] = deque()
    while not ending.is_set():
        _, (key, token) = await _retry(revoking.create)
        channel.send(created=key, token=token)
        live.append(key)
        if len(live) < _LIVE_PER_LOOP:
            continue
        await asyncio.sleep(chance.expovariate(1 / _PAUSE_SECONDS))
        await _revoke(revoking, channel, live.popleft(), chance.random() < _WAITED)


async def _revoke(revoking: RevokerSubject, channel: Channel, key: str, wait: bool) -> None:
    requested = time.monotonic_ns()
    channel.send(requested=key, at=requested)
    try:
        refused, revoked = await _retry(lambda: revoking.revoke(key, wait))
    except Gone:
        channel.send(gone=key)
        return
    channel.send(
        answered=key,
        at=revoked.answered,
        committed=revoked.committed,
        bound_ns=revoked.bound_ns,
        waited=wait,
        refused=refused,
    )


async def _retry(operation: Callable[[], Awaitable[T]]) -> tuple[int, T]:
    """The answer, and how often it was refused before."""
    refused = 0
    while True:
        try:
            return refused, await operation()
        except Refused:
            refused += 1
            await asyncio.sleep(_RETRY_SECONDS)
