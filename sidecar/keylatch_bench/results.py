"""The results of a run, and their JSON for a later `--compare`.

Times are in nanoseconds. A percentile is omitted if there are too few checks for it: the p99.9 of
100 checks would be their maximum.
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
    """An HDR histogram of times, with three significant digits."""
    result = HdrHistogram(_LOWEST_NS, _HIGHEST_NS, _DIGITS)
    for value in values:
        result.record_value(min(max(value, _LOWEST_NS), _HIGHEST_NS))
    return result


def percentiles(of: Any) -> dict[str, int | None]:
    """The percentiles for which there are enough values (else None), and the maximum."""
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
    """The result of a scenario in one round."""

    percentiles: dict[str, int | None]
    per_second: float


@dataclass(slots=True)
class ScenarioResult:
    """The result of a scenario over all rounds."""

    rate: float
    rounds: list[Round] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    checks: int = 0
    unexpected: int = 0
    keeps_up: bool = True
    """Whether responses were as fast as requests were due."""
    busiest: float = 0.0
    """The largest share of one processor that this process used in a round."""
    latencies: Any = field(default_factory=lambda: histogram(()))
    lateness: Any = field(default_factory=lambda: histogram(()))

    flood: dict[str, int] = field(default_factory=dict)
    """Status → number of responses to the forged tokens of the flood."""
    flood_per_second: list[float] = field(default_factory=list)

    def add(self, measurement: Measurement, flood: Measurement | None = None) -> None:
        """Add a round, and the flood that was sent during it."""
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
        """Responses per second, the median of the rounds."""
        return statistics.median(each.per_second for each in self.rounds)

    def as_json(self) -> dict[str, Any]:
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
    """The revocation of a key that was in use on all connections."""

    delete_ns: int
    """From sending the DELETE to its response."""
    last_accepted_ns: int
    """When the last accepted check began, relative to the response; negative: before it."""
    everywhere_ns: int | None
    """From sending the DELETE until a check on every connection was refused; None: never."""
    accepted_after: int
    """Accepted checks that began after the response: must be 0."""
    unexpected: int


@dataclass(slots=True)
class Results:
    """The results of a run. They contain no secrets."""

    target: str
    settings: dict[str, Any]
    scenarios: dict[str, ScenarioResult] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Scenario that could not be measured → what is missing."""
    saturated: list[float] = field(default_factory=list)
    """L1 checks per second on all connections together at unlimited rate, in each round."""
    saturated_busy: float = 0.0
    """The share of one processor that this process used meanwhile: near 1, it was the limit."""
    saturated_unexpected: int = 0
    revocations: list[Revocation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    began_at: str = ""
    version: str = ""
    keys_created: int = 0
    keys_left: list[str] = field(default_factory=list)
    """Ids of keys that could not be revoked."""

    @property
    def flood_ratios(self) -> list[float]:
        """In each round, the p99 of L1 during the flood ÷ the p99 of L1 without it."""
        idle, flooded = self.scenarios.get("L1"), self.scenarios.get("flood")
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
        """Accepted checks that began after the response to a DELETE: must be 0."""
        return sum(each.accepted_after for each in self.revocations)

    @property
    def unexpected(self) -> int:
        """Responses with an unexpected status, and missing ones."""
        return (
            sum(scenario.unexpected for scenario in self.scenarios.values())
            + sum(each.unexpected for each in self.revocations)
            + self.saturated_unexpected
        )

    def add_saturated(self, measurement: Measurement) -> None:
        """Add a round at unlimited rate."""
        answered = sum(count for outcome, count in measurement.outcomes.items() if outcome == 200)
        self.saturated.append(answered / max(measurement.seconds, 1e-9))
        self.saturated_busy = max(self.saturated_busy, measurement.generator_busy)
        self.saturated_unexpected += measurement.unexpected

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "keylatch": self.version,
            "beganAt": self.began_at,
            "target": self.target,
            "settings": self.settings,
            "machine": self.machine,
            "scenarios": {name: scenario.as_json() for name, scenario in self.scenarios.items()},
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
            "keys": {"created": self.keys_created, "left": self.keys_left},
        }


def add_outcomes(into: dict[str, int], outcomes: Mapping[Outcome, int]) -> None:
    """Add numbers of outcomes to `into`."""
    for outcome, count in outcomes.items():
        into[str(outcome)] = into.get(str(outcome), 0) + count


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def machine() -> dict[str, Any]:
    """The machine, without its host name."""
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
    """Write the JSON file."""
    path.write_text(json.dumps(results.as_json(), indent=2) + "\n")
