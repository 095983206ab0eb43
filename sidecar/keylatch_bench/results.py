"""What a run found: figures, and the JSON that keeps them for a later `--compare`.

Times are nanoseconds. A percentile that the number of checks cannot carry is not given: the p99.9
of 100 checks is their slowest one under another name.
"""

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from hdrh.histogram import HdrHistogram

from keylatch_bench.load_generator import Measurement, Outcome

SCHEMA: Final = "keylatch-bench/1"
PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)
MAX: Final = "max"

_LOWEST_NS: Final = 100
_HIGHEST_NS: Final = 600_000_000_000
_DIGITS: Final = 3


def label(percentile: float) -> str:
    """`p50`, `p99.9`."""
    return f"p{percentile:g}"


def readable(nanoseconds: float | None) -> str:
    """A time with three digits and its unit."""
    if nanoseconds is None:
        return "-"
    for unit, size in (("s", 1e9), ("ms", 1e6)):
        if abs(nanoseconds) >= size:
            return f"{nanoseconds / size:.3g} {unit}"
    return f"{nanoseconds / 1e3:.3g} us"


def histogram(values: Iterable[int]) -> Any:
    """An HDR histogram of times, to three digits."""
    made = HdrHistogram(_LOWEST_NS, _HIGHEST_NS, _DIGITS)
    for value in values:
        made.record_value(min(max(value, _LOWEST_NS), _HIGHEST_NS))
    return made


def percentiles(of: Any) -> dict[str, int | None]:
    """The percentiles that so many values can carry, and the longest."""
    count = of.get_total_count()
    given: dict[str, int | None] = {}
    for percentile in PERCENTILES:
        carries = count * (100 - percentile) / 100 >= 1
        value = int(of.get_value_at_percentile(percentile)) if carries else None
        given[label(percentile)] = value
    given[MAX] = int(of.get_max_value()) if count else None
    return given


@dataclass(frozen=True, slots=True)
class Round:
    """A tier's turn in one round."""

    percentiles: dict[str, int | None]
    per_second: float


@dataclass(slots=True)
class Tier:
    """A tier over all rounds."""

    rate: float
    rounds: list[Round] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    checks: int = 0
    unexpected: int = 0
    keeps_up: bool = True
    """Whether answers came as fast as requests were due."""
    busiest: float = 0.0
    """The largest share of one processor that this process used in a turn."""
    latencies: Any = field(default_factory=lambda: histogram(()))
    lateness: Any = field(default_factory=lambda: histogram(()))

    flood: dict[str, int] = field(default_factory=dict)
    """How the made-up tokens beside it were answered."""
    flood_per_second: list[float] = field(default_factory=list)

    def add(self, measurement: Measurement, flood: Measurement | None = None) -> None:
        """Another round, and what was sent beside it."""
        if flood is not None:
            add_outcomes(self.flood, flood.outcomes)
            self.unexpected += flood.unexpected
            self.flood_per_second.append(len(flood.latencies) / max(flood.seconds, 1e-9))
        latencies = histogram(measurement.latencies)
        answered = len(measurement.latencies) - sum(
            count for outcome, count in measurement.outcomes.items() if isinstance(outcome, str)
        )
        per_second = (
            self.rate if measurement.keeps_up else answered / max(measurement.seconds, 1e-9)
        )
        self.rounds.append(Round(percentiles(latencies), per_second))
        self.keeps_up = self.keeps_up and measurement.keeps_up
        self.latencies.add(latencies)
        self.lateness.add(histogram(measurement.lateness))
        self.checks += len(measurement.latencies)
        self.unexpected += measurement.unexpected
        self.busiest = max(self.busiest, measurement.generator_busy)
        add_outcomes(self.outcomes, measurement.outcomes)

    @property
    def per_second(self) -> float:
        """Answers a second, the median of the rounds."""
        return statistics.median(each.per_second for each in self.rounds)

    def as_json(self) -> dict[str, Any]:
        """For the file."""
        return {
            "checks": self.checks,
            "ratePerSecond": self.rate,
            "answeredPerSecond": round(self.per_second, 1),
            "keepsUp": self.keeps_up,
            "percentilesNs": percentiles(self.latencies),
            "outcomes": self.outcomes,
            "flood": {"outcomes": self.flood, "answeredPerSecond": median(self.flood_per_second)},
            "unexpected": self.unexpected,
            "generator": {
                "busiestShareOfAProcessor": round(self.busiest, 3),
                "latenessNs": percentiles(self.lateness),
            },
            "rounds": [
                {"percentilesNs": each.percentiles, "answeredPerSecond": each.per_second}
                for each in self.rounds
            ],
            "histogram": self.latencies.encode().decode("ascii"),
        }


@dataclass(frozen=True, slots=True)
class Revocation:
    """One key that was used everywhere, and revoked."""

    delete_ns: int
    """From sending the DELETE to its answer."""
    last_accepted_ns: int
    """When the last check that was accepted began, after the answer; negative: before it."""
    everywhere_ns: int | None
    """From sending the DELETE until every connection had been refused; None: some never were."""
    accepted_after: int
    """Checks that began after the answer and were accepted: must be 0."""
    unexpected: int


@dataclass(slots=True)
class Results:
    """A run. Nothing in it is secret."""

    target: str
    settings: dict[str, Any]
    tiers: dict[str, Tier] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """What could not be measured → what to add."""
    saturated: list[float] = field(default_factory=list)
    """L1 checks a second that all lines together can carry, in each round."""
    saturated_busy: float = 0.0
    """The share of one processor that this process used meanwhile: at 1, it was the limit."""
    saturated_unexpected: int = 0
    revocations: list[Revocation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    began_at: str = ""
    version: str = ""
    keys_made: int = 0
    keys_left: list[str] = field(default_factory=list)
    """Ids of keys that could not be taken back."""

    @property
    def flood_ratios(self) -> list[float]:
        """The p99 of L1 during the flood ÷ that of the same round without."""
        idle, flooded = self.tiers.get("L1"), self.tiers.get("flood")
        if idle is None or flooded is None:
            return []
        pairs = zip(flooded.rounds, idle.rounds, strict=False)
        of = label(99)
        return [
            (during.percentiles[of] or 0) / (before.percentiles[of] or 1)
            for during, before in pairs
            if during.percentiles[of] and before.percentiles[of]
        ]

    @property
    def accepted_after(self) -> int:
        """Checks that were accepted after the answer of a DELETE: must be 0."""
        return sum(each.accepted_after for each in self.revocations)

    @property
    def unexpected(self) -> int:
        """Answers that were not what they should have been, missing ones included."""
        return (
            sum(tier.unexpected for tier in self.tiers.values())
            + sum(each.unexpected for each in self.revocations)
            + self.saturated_unexpected
        )

    def add_saturated(self, measurement: Measurement) -> None:
        """Another round without a rate."""
        answered = sum(count for outcome, count in measurement.outcomes.items() if outcome == 200)
        self.saturated.append(answered / max(measurement.seconds, 1e-9))
        self.saturated_busy = max(self.saturated_busy, measurement.generator_busy)
        self.saturated_unexpected += measurement.unexpected

    def as_json(self) -> dict[str, Any]:
        """For the file."""
        return {
            "schema": SCHEMA,
            "keylatch": self.version,
            "beganAt": self.began_at,
            "target": self.target,
            "settings": self.settings,
            "machine": self.machine,
            "tiers": {name: tier.as_json() for name, tier in self.tiers.items()},
            "saturated": {
                "answeredPerSecond": self.saturated,
                "busiestShareOfAProcessor": round(self.saturated_busy, 3),
                "unexpected": self.saturated_unexpected,
            },
            "floodRatios": self.flood_ratios,
            "revocations": [asdict(each) for each in self.revocations],
            "acceptedAfterDelete": self.accepted_after,
            "skipped": self.skipped,
            "notes": self.notes,
            "keys": {"made": self.keys_made, "left": self.keys_left},
        }


def add_outcomes(into: dict[str, int], outcomes: Mapping[Outcome, int]) -> None:
    """Add up how checks ended."""
    for outcome, count in outcomes.items():
        into[str(outcome)] = into.get(str(outcome), 0) + count


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def machine() -> dict[str, Any]:
    """What the figures depend on here; no name of a host."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "loadAverage": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def write(results: Results, path: Path) -> None:
    """The JSON file."""
    path.write_text(json.dumps(results.as_json(), indent=2) + "\n")
