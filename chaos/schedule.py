"""Which fault happens when, to which process and for how long: drawn from a seed before the start.

The law of this file: no I/O, no clock. The same arguments draw the same faults.
"""

import random
from dataclasses import dataclass
from typing import Final

ROUND_SECONDS: Final = 60.0
HEALTHY_SECONDS: Final = 6.0
"""Each round begins with so many seconds without faults, to see how healthy revokes fare."""

SHORTEST_SECONDS: Final = 0.1

WEIGHTS: Final = {
    "redis paused": 8,
    "redis killed, comes back empty": 5,
    "redis flushed": 6,
    "redis restored from a backup": 8,
    "redis connections killed": 8,
    "redis slow": 8,
    "worker cut from redis": 8,
    "revoker cut from redis": 8,
    "store connections blackholed": 8,
    "store connections held": 8,
    "store connections reset": 8,
    "store sessions terminated": 5,
    "store restarted": 2,
    "revoker cut from the store": 4,
    "worker stopped": 10,
    "worker killed": 4,
    "event loop blocked": 8,
    "worker forked": 6,
}
"""Kind → how often, in relation to the others."""

FAILOVERS: Final = {
    "store failed over": 3,
    "store failed over, old primary lives on": 3,
    "store failed over, commits lost": 3,
}
"""The same, of faults that need standbys."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of the schedule.

    Args:
        kind: a key of `WEIGHTS` or `FAILOVERS`.
        at: seconds after the schedule's start.
        seconds: how long it lasts.
        target: a number; the worker or revoker whose place it falls on is hit.
    """

    kind: str
    at: float
    seconds: float
    target: int


def draw(
    seed: int,
    faults: int,
    seconds: float,
    longest_seconds: float,
    only: str = "",
    *,
    has_standby: bool = False,
) -> list[Fault]:
    """So many faults within so many seconds, each kind at least once if there are enough.

    Args:
        seed: of the chance.
        faults: how many.
        seconds: until the last one begins.
        longest_seconds: of one fault.
        only: kinds whose name holds this text.
        has_standby: whether there are failovers among them.
    """
    chance = random.Random(seed)
    kinds_of_all = WEIGHTS | (FAILOVERS if has_standby else {})
    weights = {kind: weight for kind, weight in kinds_of_all.items() if only in kind}
    kinds = list(weights)[:faults]
    kinds += chance.choices(list(weights), list(weights.values()), k=faults - len(kinds))
    chance.shuffle(kinds)
    round_seconds = min(ROUND_SECONDS, seconds)
    healthy_seconds = round_seconds * HEALTHY_SECONDS / ROUND_SECONDS
    times: list[float] = []
    while len(times) < faults:
        at = chance.uniform(0, seconds)
        if at % round_seconds > healthy_seconds:
            times.append(at)
    return [
        Fault(kind, at, chance.uniform(SHORTEST_SECONDS, longest_seconds), chance.randrange(2**16))
        for kind, at in zip(kinds, sorted(times), strict=True)
    ]
