"""The counters and histograms of one engine; `metrics` exports them.

The law of this file: counting does no I/O. A hit takes one step of a counter that needs no lock; a
read takes a step as well and subtracts it. Label values come from this file and from `Reason`
alone: no key, no organisation, no path, and never a token.
"""

import itertools
import threading
from bisect import bisect_left
from collections.abc import Iterator
from typing import Final, assert_never

from keylatch.core.decisions import Allow, Decision, Reason
from keylatch.telemetry.events import Decided, Event, StageEnded

# The source of a decision.
L1: Final = "l1"
L2: Final = "l2"
STORE: Final = "store"
NEGATIVE_CACHE: Final = "negative_cache"
MAC: Final = "mac"
HEADER: Final = "header"
NONE: Final = "none"

ALLOW: Final = "allow"

LIMITS: Final = ("hashes", "changes", "keys")
"""Limits on changes by an organisation's keys: see `validation.QuotaExceeded`."""

PARSE: Final = "parse"
HASH: Final = "hash"
STAGES: Final = (PARSE, L1, L2, STORE, HASH)
STAGE_BUCKETS: Final = tuple(
    digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5)
)  # 1 us to 5 s
PROPAGATION_BUCKETS: Final = tuple(
    digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)
)  # 0.1 ms to 50 s

TIMED_HITS: Final = 64
"""How many hits are timed after each flush of usage."""
_PARSE_SAMPLE_INTERVAL: Final = 16

_SOURCES: Final = {
    Reason.MISSING: (HEADER,),
    Reason.MALFORMED: (HEADER,),
    Reason.FORGED: (MAC,),
    Reason.UNAVAILABLE: (NONE,),
    Reason.BUSY: (NONE,),
}


class Counter:
    """A number that only increases; any thread may add to it, without a lock.

    `next(counter.steps)` adds one: a single call into C, which no other thread interrupts.
    """

    __slots__ = ("_lock", "_reads", "steps")

    def __init__(self) -> None:
        self.steps = itertools.count()
        self._reads = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        next(self.steps)

    @property
    def value(self) -> int:
        """The number so far; reading takes a step as well."""
        with self._lock:
            steps = next(self.steps) - self._reads
            self._reads += 1
        return steps


class Histogram:
    """Durations, counted in buckets.

    Args:
        bounds: upper bounds of the buckets, in seconds, ascending.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, seconds)] += 1
            self._sum += seconds

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Pairs of (upper bound, cumulative count), and the sum of all durations in seconds."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        bounds = [f"{bound:g}" for bound in self._bounds] + ["+Inf"]
        return list(zip(bounds, map(float, itertools.accumulate(counts)), strict=True)), total


class Counters:
    """The numbers of one engine."""

    def __init__(self) -> None:
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Count from 0."""
        self.hits = Counter()
        """Requests that L1 allowed; a hit counts itself with `next(hit_steps)`."""
        self.hit_steps = self.hits.steps
        self._decisions = {
            (decision, source): Counter()
            for decision, sources in _possible_decisions()
            for source in sources
            if (decision, source) != (ALLOW, L1)
        }
        self._parses = itertools.count()
        self.stages = {name: Histogram(STAGE_BUCKETS) for name in STAGES}
        self.propagation = Histogram(PROPAGATION_BUCKETS)
        """From the commit of a change until every process applies it."""
        self.accepted_after_revocation = Counter()
        """Keys that were accepted after a change that this process could know of."""
        self.restores = Counter()
        """How often the store was found to have lost changes, by a failover or a restore."""
        self.limited = {limit: Counter() for limit in LIMITS}
        """Changes by keys that were refused, by the limit they reached."""

    def on_event(self, event: Event) -> None:
        match event:
            case Decided():
                self._counter_of(event.decision, event.source).add()
            case StageEnded():
                self.stages[event.stage].observe(event.seconds)
            case _:
                assert_never(event)

    def _counter_of(self, decision: Decision, source: str) -> Counter:
        if not isinstance(decision, Allow):
            return self._decisions[decision.reason.name.lower(), source]
        return self.hits if source == L1 else self._decisions[ALLOW, source]

    def decisions(self) -> Iterator[tuple[str, str, int]]:
        """Decision (`allow` or the reason), source, and number."""
        yield ALLOW, L1, self.hits.value
        for (decision, source), count in self._decisions.items():
            yield decision, source, count.value

    def is_parse_sampled(self) -> bool:
        """Whether the parsing of this header is timed: one in 16, because any client can send
        invalid headers at a high rate."""
        return not next(self._parses) % _PARSE_SAMPLE_INTERVAL


def _possible_decisions() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each decision and its possible sources. All pairs are exported from the start with 0: the
    rate of a series that first appears with 1 misses that increase."""
    yield ALLOW, (L1, L2, STORE)
    for reason in Reason:
        sources = (L1, L2, STORE, NEGATIVE_CACHE)
        yield reason.name.lower(), _SOURCES.get(reason, sources)
