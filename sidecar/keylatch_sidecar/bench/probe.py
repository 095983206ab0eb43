"""The revocation probe: a key is used on all lines without a pause, and revoked meanwhile.

It asks what keylatch promises: no check that begins after the answer of the DELETE is accepted.
A beginning is read from the clock before the check is sent, and the answer of the DELETE after it
was read, so a check counts against keylatch only if it certainly began after it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from keylatch_sidecar.bench.figures import Revocation
from keylatch_sidecar.bench.load import Credential, Line, asked

_USES_BEFORE: Final = 5
_USES_AFTER: Final = 5
_PATIENCE_SECONDS: Final = 4.0


@dataclass(slots=True)
class _Seen:
    """What one line saw."""

    accepted: list[int] = field(default_factory=list)
    """When each accepted check began."""
    refused_at: int | None = None
    refused: int = 0
    unexpected: int = 0


async def revoke_in_use(
    lines: Sequence[Line],
    credential: Credential,
    delete: Callable[[], Awaitable[None]],
    rate: float,
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Revocation:
    """Use a key on all lines at `rate` checks a second, revoke it, and see what happens.

    Args:
        lines: idle ones.
        credential: of the key.
        delete: revokes it, and returns when that is answered.
        rate: of all lines together.
        clock: nanoseconds that never go back.
        sleep: waits between two checks on a line.
    """
    seen = [_Seen() for _ in lines]
    interval = len(lines) / rate
    enough = asyncio.Event()
    users = [
        asyncio.create_task(_use(*each, credential, interval, enough, clock, sleep))
        for each in zip(lines, seen, strict=True)
    ]
    try:
        await _until(lambda: all(len(each.accepted) >= _USES_BEFORE for each in seen), clock, sleep)
        sent = clock()
        await delete()
        answered = clock()
        await _until(lambda: all(each.refused > _USES_AFTER for each in seen), clock, sleep)
        enough.set()
        await asyncio.wait(users, timeout=_PATIENCE_SECONDS)
    finally:
        for user in users:
            user.cancel()
        await asyncio.gather(*users, return_exceptions=True)
    accepted = [began for each in seen for began in each.accepted]
    refused = [each.refused_at for each in seen if each.refused_at is not None]
    return Revocation(
        delete_ns=answered - sent,
        last_accepted_ns=max(accepted, default=sent) - answered,
        everywhere_ns=max(refused) - sent if len(refused) == len(lines) else None,
        accepted_after=sum(began > answered for began in accepted),
        unexpected=sum(each.unexpected for each in seen),
    )


async def _use(
    line: Line,
    seen: _Seen,
    credential: Credential,
    interval: float,
    enough: asyncio.Event,
    clock: Callable[[], int],
    sleep: Callable[[float], Awaitable[None]],
) -> None:
    while not enough.is_set():
        began = clock()
        outcome = await asked(line, credential)
        now = clock()
        if outcome == 200:
            seen.accepted.append(began)
        elif outcome == 401 and seen.accepted:
            seen.refused += 1
            seen.refused_at = seen.refused_at or now
        else:
            seen.unexpected += 1
        await sleep(max(0.0, interval - (now - began) / 1e9))


async def _until(
    is_so: Callable[[], bool], clock: Callable[[], int], sleep: Callable[[float], Awaitable[None]]
) -> None:
    """Return when it is so, or when that takes too long."""
    deadline = clock() + int(_PATIENCE_SECONDS * 1e9)
    while not is_so() and clock() < deadline:
        await sleep(0.002)
