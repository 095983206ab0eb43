"""Compares two runs: which figures changed by more than the noise between rounds.

The rule can be verified by eye: a figure changed if every round of one run is above every round of
the other and the medians differ by 5 % or more. If both runs were equal, five rounds would be
separated from five others by chance in 1 of 126 comparisons. The rule does not find the cause:
another machine, or other load on it, changes every figure.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keylatch_bench.errors import BenchError
from keylatch_bench.plan import SCENARIOS
from keylatch_bench.results import PERCENTILES, SCHEMA, label, readable

FEWEST_ROUNDS: Final = 4
LEAST_CHANGE: Final = 0.05

FASTER, SLOWER, NOISE, UNKNOWN = "better", "WORSE", "within the noise", "too few rounds to tell"


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of both runs."""

    name: str
    before: str
    after: str
    ratio: float
    """After ÷ before."""
    direction: str


def classify(
    before: Sequence[float], after: Sequence[float], *, less_is_better: bool = True
) -> str:
    """The direction of a change, from the values of the rounds of two runs."""
    if min(len(before), len(after)) < FEWEST_ROUNDS:
        return UNKNOWN
    then, now = statistics.median(before), statistics.median(after)
    if abs(now - then) < LEAST_CHANGE * then:
        return NOISE
    if min(after) > max(before):
        return SLOWER if less_is_better else FASTER
    if max(after) < min(before):
        return FASTER if less_is_better else SLOWER
    return NOISE


def read(path: Path) -> dict[str, Any]:
    """The results of an earlier run.

    Raises:
        BenchError: the file cannot be read, or has another format.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        raise BenchError(
            f"{path} cannot be read as JSON", "give results.json of an earlier run"
        ) from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        wrong = f"{path} was not written by this version of keylatch bench"
        raise BenchError(wrong, f"its schema must be {SCHEMA}")
    return content


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Differences in settings, machine and target, which make a comparison unreliable."""
    found = []
    for part in ("settings", "machine"):
        for name, value in after[part].items():
            earlier = before[part].get(name)
            if name != "loadAverage" and earlier != value:
                found.append(f"{name}: {earlier} then, {value} now")
    if before["target"] != after["target"]:
        found.append(f"target: {before['target']} then, {after['target']} now")
    return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every figure that both runs have, from their JSON."""
    moves = []
    for name in SCENARIOS:
        if name in before["scenarios"] and name in after["scenarios"]:
            then, now = before["scenarios"][name], after["scenarios"][name]
            moves += _scenario_changes(name, then, now)
    then, now = (run["saturated"]["answeredPerSecond"] for run in (before, after))
    if then and now:
        moves.append(_change("L1 checks/s at unlimited rate", then, now, rate=True))
    for name, key in (("DELETE", "delete_ns"), ("refused everywhere", "everywhere_ns")):
        then, now = (
            [each[key] for each in run["revocations"] if each[key] is not None]
            for run in (before, after)
        )
        if then and now:
            moves.append(_change(name, then, now))
    return moves


def _scenario_changes(scenario: str, before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    moves = []
    for percentile in map(label, PERCENTILES):  # the maximum varies too much between runs
        then, now = (
            [
                each["percentilesNs"][percentile]
                for each in run["rounds"]
                if each["percentilesNs"].get(percentile) is not None
            ]
            for run in (before, after)
        )
        if then and now:
            moves.append(_change(f"{scenario} {percentile}", then, now))
    return moves


def _change(name: str, before: list[float], after: list[float], *, rate: bool = False) -> Change:
    then, now = statistics.median(before), statistics.median(after)
    shown = [f"{value:,.0f}/s" if rate else readable(value) for value in (then, now)]
    ratio = now / max(then, 1e-9)
    direction = classify(before, after, less_is_better=not rate)
    return Change(name, shown[0], shown[1], ratio, direction)
