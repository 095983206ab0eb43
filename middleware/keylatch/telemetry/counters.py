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

from keylatch.core.decisions import Allow, Decision, Reason
from keylatch.telemetry.request_trace import REQUEST_TRACE

# Where a decision was made.
L1: Final = "l1"
L2: Final = "l2"
STORE: Final = "store"
NEGATIVE_CACHE: Final = "negative_cache"
MAC: Final = "mac"
HEADER: Final = "header"
NONE: Final = "none"

ALLOW: Final = "allow"

LIMITS: Final = ("hashes", "changes", "keys")
"""Of an organisation, for what its keys change: see `drafts.QuotaExceeded`."""

STAGES: Final = ("parse", L1, L2, STORE, "hash")
STAGE_BUCKETS: Final = tuple(
    digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5)
)  # 1 us to 5 s
PROPAGATION_BUCKETS: Final = tuple(
    digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)
)  # 0.1 ms to 50 s

TIMED_HITS: Final = 64
"""So many hits are timed each time uses are stored."""
_PARSE_SAMPLE_INTERVAL: Final = 16

_SOURCES: Final = {
    Reason.MISSING: (HEADER,),
    Reason.MALFORMED: (HEADER,),
    Reason.FORGED: (MAC,),
    Reason.UNAVAILABLE: (NONE,),
    Reason.BUSY: (NONE,),
}


class Counter:
    """A number that goes up, from any thread, without a lock.

    `next(count.steps)` adds one: a single step of C, so no two threads take the same.
    """

    __slots__ = ("_lock", "_reads", "steps")

    def __init__(self) -> None:
        self.steps = itertools.count()
        self._reads = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        """One more."""
        next(self.steps)

    @property
    def value(self) -> int:
        """How many so far. To look is a step as well."""
        with self._lock:
            steps = next(self.steps) - self._reads
            self._reads += 1
        return steps


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


class Counters:
    """The numbers of one engine."""

    def __init__(self) -> None:
        self.span: Callable[[str], AbstractContextManager[None]] | None = None
        """Makes a span around a stage, where somebody wants that."""
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """After a fork: count from 0."""
        self.hits = Counter()
        """Allowed by L1: most of what happens."""
        self.steps = self.hits.steps
        self._decisions = {
            (decision, source): Counter()
            for decision, sources in _possible_decisions()
            for source in sources
            if (decision, source) != (ALLOW, L1)
        }
        self._parses = itertools.count()
        self.stages = {name: Histogram(STAGE_BUCKETS) for name in STAGES}
        self.propagation = Histogram(PROPAGATION_BUCKETS)
        """From the commit of a change until no process decides against it any more."""
        self.accepted_after_revocation = Counter()
        """Keys found to have been accepted after a change that this process could know of."""
        self.restores = Counter()
        """How often the store was found to be another than it was."""
        self.limited = {limit: Counter() for limit in LIMITS}
        """Changes by keys that were refused, by the limit that was reached."""

    def count_decision(self, decision: Decision, source: str) -> None:
        """A request was judged, by what was known there. A hit that is let in is counted by a step
        of `hits`."""
        if isinstance(decision, Allow):
            count = self.hits if source == L1 else self._decisions[ALLOW, source]
        else:
            count = self._decisions[decision.reason.name.lower(), source]
        count.add()
        request_trace = REQUEST_TRACE.get()
        if request_trace is not None:
            request_trace.source = source

    def decisions(self) -> Iterator[tuple[str, str, int]]:
        """Verdict or reason, tier, and how many."""
        yield ALLOW, L1, self.hits.value
        for (decision, source), count in self._decisions.items():
            yield decision, source, count.value

    def is_parse_sampled(self) -> bool:
        """Whether this header is one of those whose reading is timed: strangers come in floods."""
        return not next(self._parses) % _PARSE_SAMPLE_INTERVAL

    def stage(self, name: str) -> AbstractContextManager[None]:
        """`with counters.stage("store"): …` counts how long the block takes."""
        stage = Stage(name, self.stages[name])
        return stage if self.span is None else _nested(self.span(name), stage)

    def parse_stage(self) -> "Stage":
        """The stage that is no part of asking anybody, and so has no span."""
        return Stage("parse", self.stages["parse"])


class Stage:
    """How long a block takes, errors and cancellation included."""

    __slots__ = ("_histogram", "_name", "_started_at")

    def __init__(self, name: str, histogram: Histogram) -> None:
        self._name = name
        self._histogram = histogram

    def __enter__(self) -> None:
        self._started_at = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seconds = time.perf_counter() - self._started_at
        self._histogram.observe(seconds)
        request_trace = REQUEST_TRACE.get()
        if request_trace is not None:
            request_trace.stages.append((self._name, seconds))


@contextmanager
def _nested(outer: AbstractContextManager[None], inner: "Stage") -> Iterator[None]:
    with outer, inner:
        yield


def _possible_decisions() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Verdict or reason, and where it can be found: every pair is told from the start, because
    what appears with a 1 has no rate."""
    yield ALLOW, (L1, L2, STORE)
    for reason in Reason:
        sources = (L1, L2, STORE, NEGATIVE_CACHE)
        yield reason.name.lower(), _SOURCES.get(reason, sources)
