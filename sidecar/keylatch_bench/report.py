"""What a run found, in words and rows: the same for the terminal and for the page.

The first sentence is the one that matters. What went wrong comes right after it, and is never
left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from keylatch_bench.comparison import FASTER, SLOWER, Change
from keylatch_bench.plan import DESCRIPTIONS, FLOOD, L1, STORE, TIERS, Plan
from keylatch_bench.results import MAX, PERCENTILES, Results, label, median, readable
from keylatch_bench.results import percentiles as percentiles_of

HEADINGS = (*map(label, PERCENTILES), MAX)
_GENERATOR_IS_THE_LIMIT = 0.9


@dataclass(frozen=True, slots=True)
class Row:
    """A tier, in words."""

    tier: str
    meaning: str
    checks: str
    rate: str
    times: Sequence[str]
    unexpected: str
    missing: str = ""
    """Why there are no figures, and what to add."""


def bounds(target: object, plan: Plan) -> str:
    """What a run will do at most; said before it starts."""
    return (
        f"Asks {target} at most {plan.most_requests:,} times, {2 * plan.connections} at a "
        f"time, makes at most {plan.keys} keys (taken back at the end; they expire in "
        f"{plan.key_seconds / 60:.0f} minutes), takes about {plan.expected_seconds:.0f} s and at "
        f"most {plan.most_seconds:.0f} s."
    )


def cost(results: Results) -> str:
    """What a check costs, in half a sentence."""
    if L1 not in results.tiers:
        return "No check was measured"
    times = percentiles_of(results.tiers[L1].latencies)
    said = f"A check of a known key costs {readable(times['p50'])} at the median"
    return said if times["p99"] is None else f"{said}, {readable(times['p99'])} at p99"


def revocation(results: Results) -> str:
    """When a revoke was true, in half a sentence."""
    if not results.revocations:
        return "no key was revoked"
    everywhere = [
        each.everywhere_ns for each in results.revocations if each.everywhere_ns is not None
    ]
    if len(everywhere) < len(results.revocations):
        never = len(results.revocations) - len(everywhere)
        return f"after {never} of {len(results.revocations)} DELETEs a key was still accepted"
    said = f"a revoked key was refused everywhere {readable(median(everywhere))} after the DELETE"
    return f"{said} was sent (longest of {len(everywhere)}: {readable(max(everywhere))})"


def acceptance_after_delete(results: Results) -> str:
    """Whether the promise was kept; empty where it was not put to the test."""
    if not results.revocations:
        return ""
    late = results.accepted_after
    if late:
        return f"{late} checks that began after the answer of a DELETE were ACCEPTED"
    return "no check that began after the answer of a DELETE was accepted"


def capitalize(words: str) -> str:
    """With a capital at its head."""
    return words[:1].upper() + words[1:]


def summary(results: Results) -> str:
    """The one sentence that matters."""
    parts = [cost(results), revocation(results), acceptance_after_delete(results)]
    return "; ".join(part for part in parts if part) + "."


def warnings(results: Results) -> list[str]:
    """What went wrong, or makes the figures doubtful."""
    told = list(results.notes)
    if results.unexpected:
        told.append(f"{results.unexpected:,} answers were not what they should have been: below")
    slow = [name for name, tier in results.tiers.items() if not tier.keeps_up]
    if slow:
        told.append(f"{', '.join(slow)}: the answers did not keep up with --rate")
    if any(tier.busiest > _GENERATOR_IS_THE_LIMIT for tier in results.tiers.values()):
        told.append("this tool used a whole processor: it measured itself too; lower --rate")
    busy, processors = results.machine.get("loadAverage", 0), results.machine.get("processors", 1)
    if busy > processors:
        told.append(f"this machine was busy: load average {busy} on {processors} processors")
    if results.keys_left:
        left = ", ".join(results.keys_left)
        told.append(f"could not be taken back: {left} (keylatch keys revoke ID)")
    return told


def remarks(results: Results) -> list[str]:
    """What the figures are to be read with."""
    told = []
    ratio = median(results.flood_ratios)
    if ratio is not None:
        rate = median(results.tiers[FLOOD].flood_per_second) or 0
        told.append(
            f"Flood: with {rate:,.0f} made-up tokens a second beside it, the p99 of L1 is "
            f"{ratio:.2f} times what it is without (median of the rounds)."
        )
    most = median(results.saturated)
    if most is not None:
        said = f"At most {most:,.0f} L1 checks a second were carried"
        limit = results.saturated_busy > _GENERATOR_IS_THE_LIMIT
        told.append(f"{said}; this tool was the limit." if limit else f"{said}.")
    if STORE in results.skipped:
        told.append("The cold keys were hashed as the sidecar hashes new ones (KEYLATCH_HASHER).")
    if results.revocations:
        told.append(
            "Each connection uses the key to be revoked up to 200 times a second, so when it is "
            "refused everywhere is known to some 5 ms."
        )
    late = [percentiles_of(tier.lateness)["p50"] or 0 for tier in results.tiers.values()]
    if late:
        told.append(
            f"Latencies count from when a request was due, and hold the lateness of this tool "
            f"itself: {readable(max(late))} at the median of its worst tier."
        )
    return told


def rows(results: Results) -> list[Row]:
    """The table."""
    told = []
    for name in TIERS:
        if name in results.skipped:
            told.append(Row(name, DESCRIPTIONS[name], "", "", (), "", results.skipped[name]))
        elif name in results.tiers:
            tier = results.tiers[name]
            times = percentiles_of(tier.latencies)
            outcomes = tier.outcomes if not tier.flood else tier.outcomes | tier.flood
            told.append(
                Row(
                    name,
                    DESCRIPTIONS[name],
                    f"{tier.checks:,}",
                    f"{tier.per_second:,.0f}/s",
                    [readable(times[heading]) for heading in HEADINGS],
                    "0"
                    if not tier.unexpected
                    else f"{tier.unexpected} of {_format_outcomes(outcomes)}",
                )
            )
    return told


def _format_outcomes(outcomes: dict[str, int]) -> str:
    return ", ".join(f"{count:,} x {outcome}" for outcome, count in sorted(outcomes.items()))


def print_to(console: Console, results: Results) -> None:
    """The finding, what went wrong, the table."""
    console.print(summary(results), style="bold")
    for warning in warnings(results):
        console.print(f"warning: {warning}", style="bold red")
    table = Table(box=None, title=str(results.target), title_justify="left")
    table.add_column("tier", no_wrap=True)
    for heading in ("checks", "rate", *HEADINGS, "wrong"):
        table.add_column(heading, justify="right", no_wrap=heading != "wrong")
    told = rows(results)
    for row in told:
        if not row.missing:
            table.add_row(row.tier, row.checks, row.rate, *row.times, row.unexpected)
    console.print(table)
    for row in told:
        if row.missing:
            console.print(f"{row.tier} was not measured: {row.missing}.")
    for remark in remarks(results):
        console.print(remark)


def print_comparison(console: Console, moves: Sequence[Change], differences: Sequence[str]) -> None:
    """What moved since the run before."""
    for difference in differences:
        console.print(f"warning: not like with like: {difference}", style="bold yellow")
    table = Table(box=None, title=change_summary(moves), title_justify="left")
    for heading in ("", "before", "after", "after ÷ before", ""):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for move in moves:
        style = {SLOWER: "bold red", FASTER: "bold green"}.get(move.direction, "")
        row = (move.name, move.before, move.after, f"{move.ratio:.2f}", move.direction)
        table.add_row(*row, style=style)
    console.print(table)


def change_summary(moves: Sequence[Change]) -> str:
    """How many figures did."""
    better, worse = (sum(move.direction == which for move in moves) for which in (FASTER, SLOWER))
    if not better and not worse:
        return f"Of {len(moves)} figures none moved beyond the noise between rounds"
    return f"Of {len(moves)} figures {worse} got worse and {better} better, beyond the noise"
