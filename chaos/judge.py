"""Finds broken promises of a side: a pure ledger of revokes, facts and faults.

The law of this file: no I/O, no clock. An acceptance counts by the START of its check, a refusal by
its END, so no doubt is left: what started after the answer must be refused, and what was refused
before the revoke was requested was refused wrongly. Findings are pairs of a key and a process.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

BUCKET_NS: Final = 100_000_000
SECOND_NS: Final = 1_000_000_000
_REPORTED_WITHIN_NS: Final = SECOND_NS  # after its commit, a key is reported to the run


@dataclass(slots=True)
class Revoke:
    """The life of one key's revoke, in nanoseconds of CLOCK_MONOTONIC; 0: not yet."""

    requested: int = 0
    committed: int = 0
    answered: int = 0
    waited: bool = False
    refused: int = 0
    bound_ns: int = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """A fault as it happened. `silences`: whose checks may be 503 for it: a worker, all, none."""

    kind: str
    start: int
    end: int
    affects: str


@dataclass(frozen=True, slots=True)
class Loss:
    """Commits since `start` were lost by the store that has taken over at `end`."""

    start: int
    end: int


@dataclass
class Ledger:
    """What is known of one side.

    Args:
        lease_ns: X.
    """

    lease_ns: int
    revokes: dict[str, Revoke] = field(default_factory=dict)
    accepted: int = 0
    refused: int = 0
    undecided: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(process, bucket of START) → checks without a decision"""
    after_answer: dict[tuple[str, str], int] = field(default_factory=dict)
    """(key, process) → by how many nanoseconds the latest such check was too late"""
    after_bound: dict[tuple[str, str], int] = field(default_factory=dict)
    refused_before: dict[tuple[str, str], int] = field(default_factory=dict)
    created: dict[str, int] = field(default_factory=dict)
    """Key → when its creation was reported."""
    losses: list[Loss] = field(default_factory=list)
    accepted_after_loss: dict[tuple[str, str], int] = field(default_factory=dict)
    """(key, process) → the same where the commit of the revoke was lost, and the check began within
    a lease period and a second of the failover: then the processes have revoked it again"""
    splits: list[int] = field(default_factory=list)
    """When a standby took over beside a primary that lived on."""
    unknown_after_split: dict[tuple[str, str], int] = field(default_factory=dict)
    """(key, process) → when a key of the new primary was refused by a process whose lease of the
    old primary still ran; that primary has never had the key"""
    lost_keys: set[str] = field(default_factory=set)
    """Keys that are not judged, because their creation was lost."""
    observed_pairs: int = 0
    """Pairs in which the process accepted the key before, and refused it after, the revoke."""
    _open: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    @property
    def checks(self) -> int:
        """All of them."""
        return self.accepted + self.refused + sum(self.undecided.values())

    def observe(self, process: str, facts: Iterable[Sequence[Any]]) -> None:
        """Take over the facts of one report."""
        for key, accepted, refused, _, latest_accepted, earliest_refused in facts:
            self.accepted += accepted
            self.refused += refused
            known = self._open.setdefault((key, process), [0, 0])
            known[0] = max(known[0], latest_accepted)
            if earliest_refused:
                known[1] = min(known[1] or earliest_refused, earliest_refused)

    def count_undecided(self, process: str, buckets: Iterable[tuple[int, int]]) -> None:
        """Take over when checks went without a decision."""
        for bucket, checks in buckets:
            self.undecided[process, bucket] += checks

    def close(self, keys: set[str] | None = None) -> None:
        """Judge these keys (None: all), about which few facts will follow; those are judged too,
        by a later call."""
        chosen = [pair for pair in self._open if keys is None or pair[0] in keys]
        for pair in chosen:
            self._evaluate(pair, *self._open.pop(pair))

    def _evaluate(self, pair: tuple[str, str], latest_accepted: int, earliest_refused: int) -> None:
        if self._was_creation_lost(self.created.get(pair[0])):
            self.lost_keys.add(pair[0])
            return
        revoke = self.revokes.get(pair[0], Revoke())
        is_excused = any(
            loss.end <= latest_accepted <= loss.end + self.lease_ns + SECOND_NS
            for loss in self.losses
            if loss.start <= revoke.committed <= loss.end
        )
        if revoke.answered:
            # Without waiting, the receipt says how much longer it may take; with it, nothing.
            late = latest_accepted - revoke.answered - revoke.bound_ns
            _keep_maximum(self.accepted_after_loss if is_excused else self.after_answer, pair, late)
        if revoke.committed and not is_excused:
            late = latest_accepted - revoke.committed - self.lease_ns
            _keep_maximum(self.after_bound, pair, late)
        if earliest_refused and (not revoke.requested or earliest_refused < revoke.requested):
            is_unknown = any(
                split <= self.created.get(pair[0], 0)
                and earliest_refused <= split + self.lease_ns + SECOND_NS
                for split in self.splits
            )
            found = self.unknown_after_split if is_unknown else self.refused_before
            found[pair] = earliest_refused
        if revoke.requested and latest_accepted and earliest_refused > revoke.requested:
            self.observed_pairs += 1

    def _was_creation_lost(self, created: int | None) -> bool:
        return created is not None and any(
            loss.start <= created <= loss.end + _REPORTED_WITHIN_NS for loss in self.losses
        )

    def unexplained(
        self, faults: Sequence[Interval], grace_ns: int
    ) -> dict[tuple[str, str, float], int]:
        """Checks without a decision that no fault of that process explains, up to `grace_ns` after
        its end: (process, last fault before, seconds since its end) → how many."""
        buckets = _buckets(faults, grace_ns)
        all_processes = buckets.get("all", set())
        found = {}
        for (process, bucket), checks in self.undecided.items():
            slot = process.split("/")[0].split("#")[0]
            if bucket not in all_processes and bucket not in buckets.get(slot, set()):
                earlier = [
                    fault
                    for fault in faults
                    if fault.affects in ("all", slot) and fault.end < bucket * BUCKET_NS
                ]
                last = max(earlier, key=lambda fault: fault.end, default=Interval("none", 0, 0, ""))
                since = round((bucket * BUCKET_NS - last.end) / SECOND_NS, 1)
                found[process, last.kind, since] = checks
        return found

    def durations(self, faults: Sequence[Interval], grace_ns: int) -> dict[str, list[float]]:
        """Milliseconds from request to answer, of revokes that waited: far from every fault, and
        near one."""
        found: dict[str, list[float]] = {"healthy": [], "under faults": []}
        troubled = set().union(*_buckets(faults, grace_ns).values())
        for revoke in self.revokes.values():
            if revoke.answered and revoke.waited:
                during = range(revoke.requested // BUCKET_NS, revoke.answered // BUCKET_NS + 1)
                duration = (revoke.answered - revoke.requested) / 1e6
                is_near = not troubled.isdisjoint(during)
                found["under faults" if is_near else "healthy"].append(duration)
        return found


def percentiles(durations: Sequence[float]) -> dict[str, float | None]:
    """p50, p99 and the longest."""
    if len(durations) < 2:
        return {"p50": None, "p99": None, "max": max(durations, default=None)}
    hundredths = statistics.quantiles(durations, n=100, method="inclusive")
    return {"p50": hundredths[49], "p99": hundredths[98], "max": max(durations)}


def _keep_maximum(found: dict[tuple[str, str], int], pair: tuple[str, str], late: int) -> None:
    if late > 0:
        found[pair] = max(found.get(pair, 0), late)


def _buckets(faults: Sequence[Interval], grace_ns: int) -> dict[str, set[int]]:
    """Silenced process → the buckets in which, or shortly after which, a fault was under way."""
    buckets: dict[str, set[int]] = {}
    for fault in faults:
        first, last = fault.start // BUCKET_NS - 1, (fault.end + grace_ns) // BUCKET_NS
        buckets.setdefault(fault.affects, set()).update(range(first, last + 1))
    return buckets
