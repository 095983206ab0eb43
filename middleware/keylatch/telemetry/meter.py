"""What one engine has seen, in plain numbers: `metrics` hands them out when somebody asks.

The law of this file: counting waits for nobody and asks nobody. A hit costs one step of a counter
that needs no lock; whoever reads it takes the step back into account. No label here can have more
values than this file and `Reason` name: no key, no organisation, no path, and never a token.
"""

import itertools
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Final

from keylatch.model import Allow, Reason, Verdict
from keylatch.telemetry.trail import TRAIL

# Where a decision was made.
L1: Final = "l1"
L2: Final = "l2"
STORE: Final = "store"
ABSENCE: Final = "absence"
STRANGER: Final = "stranger"
HEADER: Final = "header"
NOWHERE: Final = "nowhere"

ALLOW: Final = "allow"

LIMITS: Final = ("hashes", "changes", "keys")
"""Of an organisation, for what its keys change: see `drafts.QuotaExceeded`."""

STAGES: Final = ("parse", L1, L2, STORE, "hash")
STAGE_SECONDS: Final = tuple(
    digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5)
)  # 1 us to 5 s
SETTLE_SECONDS: Final = tuple(
    digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)
)  # 0.1 ms to 50 s

TIMED: Final = 64
"""So many hits are timed each time uses are stored."""
_EACH_READ: Final = 16

_ELSEWHERE: Final = {
    Reason.MISSING: (HEADER,),
    Reason.MALFORMED: (HEADER,),
    Reason.FORGED: (STRANGER,),
    Reason.UNAVAILABLE: (NOWHERE,),
    Reason.BUSY: (NOWHERE,),
}


class Count:
    """A number that goes up, from any thread, without a lock.

    `next(count.steps)` adds one: a single step of C, so no two threads take the same.
    """

    __slots__ = ("_lock", "_looks", "steps")

    def __init__(self) -> None:
        self.steps = itertools.count()
        self._looks = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        """One more."""
        next(self.steps)

    @property
    def value(self) -> int:
        """How many so far. To look is a step as well."""
        with self._lock:
            seen = next(self.steps) - self._looks
            self._looks += 1
        return seen


class Histogram:
    """How many durations were at most so long.

    Args:
        bounds: in seconds, ascending.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float) -> None:
        """One more."""
        with self._lock:
            self._counts[bisect_left(self._bounds, seconds)] += 1
            self._sum += seconds

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Pairs of (bound, how many were at most that), and the sum of all of them in seconds."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        bounds = [f"{bound:g}" for bound in self._bounds] + ["+Inf"]
        return list(zip(bounds, map(float, itertools.accumulate(counts)), strict=True)), total


class Meter:
    """The numbers of one engine. A forked child gets a new one."""

    def __init__(self) -> None:
        self.hits = Count()
        """Allowed by L1: most of what happens."""
        self.steps = self.hits.steps
        self.to_time = 0
        """How many of the hits that come next are timed."""
        self._decisions = {
            (said, tier): Count()
            for said, tiers in _possible()
            for tier in tiers
            if (said, tier) != (ALLOW, L1)
        }
        self._reads = itertools.count()
        self.stages = {name: Histogram(STAGE_SECONDS) for name in STAGES}
        self.settled = Histogram(SETTLE_SECONDS)
        """From the commit of a change until no process decides against it any more."""
        self.late = Count()
        """Keys found to have been accepted after a change that this process could know of."""
        self.restores = Count()
        """How often the store was found to be another than it was."""
        self.limited = {limit: Count() for limit in LIMITS}
        """Changes by keys that were refused, by the limit that was reached."""
        self.span: Callable[[str], AbstractContextManager[None]] | None = None
        """Makes a span around a stage, where somebody wants that."""

    def decided(self, verdict: Verdict, tier: str) -> None:
        """A request was judged, by what was known there. A hit that is let in is counted by a step
        of `hits`."""
        if isinstance(verdict, Allow):
            count = self.hits if tier == L1 else self._decisions[ALLOW, tier]
        else:
            count = self._decisions[verdict.reason.name.lower(), tier]
        count.add()
        trail = TRAIL.get()
        if trail is not None:
            trail.tier = tier

    def decisions(self) -> Iterator[tuple[str, str, int]]:
        """Verdict or reason, tier, and how many."""
        yield ALLOW, L1, self.hits.value
        for (said, tier), count in self._decisions.items():
            yield said, tier, count.value

    def is_turn_to_time_reading(self) -> bool:
        """Whether this header is one of those whose reading is timed: strangers come in floods."""
        return not next(self._reads) % _EACH_READ

    def stage(self, name: str) -> AbstractContextManager[None]:
        """`with meter.stage("store"): …` counts how long the block takes."""
        stage = Stage(name, self.stages[name])
        return stage if self.span is None else _both(self.span(name), stage)

    def reading(self) -> "Stage":
        """The stage that is no part of asking anybody, and so has no span."""
        return Stage("parse", self.stages["parse"])


class Stage:
    """How long a block takes, errors and cancellation included."""

    __slots__ = ("_began", "_histogram", "_name")

    def __init__(self, name: str, histogram: Histogram) -> None:
        self._name = name
        self._histogram = histogram

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        took = time.perf_counter() - self._began
        self._histogram.observe(took)
        trail = TRAIL.get()
        if trail is not None:
            trail.stages.append((self._name, took))


@contextmanager
def _both(outer: AbstractContextManager[None], inner: "Stage") -> Iterator[None]:
    with outer, inner:
        yield


def _possible() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Verdict or reason, and where it can be found: every pair is told from the start, because
    what appears with a 1 has no rate."""
    yield ALLOW, (L1, L2, STORE)
    for reason in Reason:
        known = (L1, L2, STORE, ABSENCE)
        yield reason.name.lower(), _ELSEWHERE.get(reason, known)
