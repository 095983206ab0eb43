"""Two runs side by side: what moved, and whether the noise between rounds explains it.

The rule is one that can be checked by eye: a figure moved if every round of one run lies beyond
every round of the other, and the medians differ by a twentieth or more. Were both runs alike, five
rounds against five would fall apart so by chance once in 126 times. It says nothing about what
changed between the two days: another machine, or another load on it, moves everything.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keylatch_bench.connection import Unusable
from keylatch_bench.plan import TIERS
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
    """What is to be said of a figure that came out so in the rounds of two runs."""
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
    """What an earlier run wrote.

    Raises:
        Unusable: it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        raise Unusable(f"{path} cannot be read as JSON", "results.json of an earlier run") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        wrong = f"{path} was not written by this version of keylatch bench"
        raise Unusable(wrong, f"its schema must be {SCHEMA}")
    return content


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Why the two may not be compared like with like."""
    told = []
    for part in ("settings", "machine"):
        for name, value in after[part].items():
            earlier = before[part].get(name)
            if name != "loadAverage" and earlier != value:
                told.append(f"{name}: {earlier} then, {value} now")
    if before["target"] != after["target"]:
        told.append(f"target: {before['target']} then, {after['target']} now")
    return told


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every figure that both runs have, as their JSON tells them."""
    moves = []
    for tier in TIERS:
        if tier in before["tiers"] and tier in after["tiers"]:
            moves += _tier_changes(tier, before["tiers"][tier], after["tiers"][tier])
    then, now = (run["saturated"]["answeredPerSecond"] for run in (before, after))
    if then and now:
        moves.append(_change("L1 checks a second, at most", then, now, rate=True))
    for name, key in (("DELETE", "delete_ns"), ("refused everywhere", "everywhere_ns")):
        then, now = (
            [each[key] for each in run["revocations"] if each[key] is not None]
            for run in (before, after)
        )
        if then and now:
            moves.append(_change(name, then, now))
    return moves


def _tier_changes(tier: str, before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    moves = []
    for percentile in map(label, PERCENTILES):  # the longest one says little of two runs
        then, now = (
            [
                each["percentilesNs"][percentile]
                for each in run["rounds"]
                if each["percentilesNs"].get(percentile) is not None
            ]
            for run in (before, after)
        )
        if then and now:
            moves.append(_change(f"{tier} {percentile}", then, now))
    return moves


def _change(name: str, before: list[float], after: list[float], *, rate: bool = False) -> Change:
    then, now = statistics.median(before), statistics.median(after)
    shown = [f"{value:,.0f}/s" if rate else readable(value) for value in (then, now)]
    ratio = now / max(then, 1e-9)
    said = classify(before, after, less_is_better=not rate)
    return Change(name, shown[0], shown[1], ratio, said)
