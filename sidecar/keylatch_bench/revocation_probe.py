"""Uses a key on all connections continuously, revokes it meanwhile, and measures the effect.

It verifies keylatch's guarantee: no check that begins after the response to the DELETE is accepted.
The time of a check is taken before it is sent, and the time of the response after it was received,
so a check is reported as a violation only if it certainly began after the response.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from keylatch_bench.load_generator import Client, Credential, check
from keylatch_bench.results import Revocation

_USES_BEFORE: Final = 5
_USES_AFTER: Final = 5
_PATIENCE_SECONDS: Final = 4.0


@dataclass(slots=True)
class _ClientLog:
    """The outcomes of one client."""

    accepted: list[int] = field(default_factory=list)
    """When each accepted check began."""
    refused_at: int | None = None
    refused: int = 0
    unexpected: int = 0


async def revoke_in_use(
    clients: Sequence[Client],
    credential: Credential,
    delete: Callable[[], Awaitable[None]],
    rate: float,
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Revocation:
    """Use a key with all clients, revoke it, and go on until all clients were refused.

    Args:
        clients: idle ones.
        credential: of the key.
        delete: revokes it, and returns after the response.
        rate: checks per second of all clients together.
        clock: monotonic, in nanoseconds.
        sleep: waits between two checks of a client.
    """
    logs = [_ClientLog() for _ in clients]
    interval = len(clients) / rate
    enough = asyncio.Event()
    users = [
        asyncio.create_task(_use_key(*each, credential, interval, enough, clock, sleep))
        for each in zip(clients, logs, strict=True)
    ]
    try:
        await _wait_until(
            lambda: all(len(each.accepted) >= _USES_BEFORE for each in logs), clock, sleep
        )
        sent = clock()
        await delete()
        answered = clock()
        await _wait_until(lambda: all(each.refused > _USES_AFTER for each in logs), clock, sleep)
        enough.set()
        await asyncio.wait(users, timeout=_PATIENCE_SECONDS)
    finally:
        for user in users:
            user.cancel()
        await asyncio.gather(*users, return_exceptions=True)
    accepted = [began for each in logs for began in each.accepted]
    refused = [each.refused_at for each in logs if each.refused_at is not None]
    return Revocation(
        delete_ns=answered - sent,
        last_accepted_ns=max(accepted, default=sent) - answered,
        everywhere_ns=max(refused) - sent if len(refused) == len(clients) else None,
        accepted_after=sum(began > answered for began in accepted),
        unexpected=sum(each.unexpected for each in logs),
    )


async def _use_key(
    client: Client,
    log: _ClientLog,
    credential: Credential,
    interval: float,
    enough: asyncio.Event,
    clock: Callable[[], int],
    sleep: Callable[[float], Awaitable[None]],
) -> None:
    while not enough.is_set():
        began = clock()
        outcome = await check(client, credential)
        now = clock()
        if outcome == 200:
            log.accepted.append(began)
        elif outcome == 401 and log.accepted:
            log.refused += 1
            log.refused_at = log.refused_at or now
        else:
            log.unexpected += 1
        await sleep(max(0.0, interval - (now - began) / 1e9))


async def _wait_until(
    condition: Callable[[], bool],
    clock: Callable[[], int],
    sleep: Callable[[float], Awaitable[None]],
) -> None:
    """Return when the condition holds, or after `_PATIENCE_SECONDS`."""
    deadline = clock() + int(_PATIENCE_SECONDS * 1e9)
    while not condition() and clock() < deadline:
        await sleep(0.002)
