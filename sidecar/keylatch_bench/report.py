"""The results of a run as text and rows, for the terminal and for the HTML report.

The summary comes first, then everything that went wrong, which is never omitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from keylatch_bench.comparison import FASTER, SLOWER, Change
from keylatch_bench.plan import DESCRIPTIONS, FLOOD, L1, SCENARIOS, STORE, Plan
from keylatch_bench.results import MAX, PERCENTILES, Results, label, median, readable
from keylatch_bench.results import percentiles as percentiles_of

HEADINGS = (*map(label, PERCENTILES), MAX)
_GENERATOR_IS_THE_LIMIT = 0.9


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table."""

    scenario: str
    meaning: str
    checks: str
    rate: str
    times: Sequence[str]
    unexpected: str
    missing: str = ""
    """What is missing to measure this scenario; empty: it was measured."""


def bounds(target: object, plan: Plan) -> str:
    """The bounds of a run, printed before it starts."""
    return (
        f"Sends at most {plan.max_requests:,} requests to {target}, {2 * plan.connections} "
        f"concurrently, creates at most {plan.keys} keys (revoked at the end; they expire in "
        f"{plan.key_seconds / 60:.0f} minutes), takes about {plan.expected_seconds:.0f} s and at "
        f"most {plan.max_seconds:.0f} s."
    )


def cost(results: Results) -> str:
    """The cost of a check, as a clause."""
    if L1 not in results.scenarios:
        return "No check was measured"
    times = percentiles_of(results.scenarios[L1].latencies)
    text = f"A check of a cached key takes {readable(times['p50'])} at the median"
    return text if times["p99"] is None else f"{text}, {readable(times['p99'])} at p99"


def revocation(results: Results) -> str:
    """When revocations took effect, as a clause."""
    if not results.revocations:
        return "no key was revoked"
    everywhere = [
        each.everywhere_ns for each in results.revocations if each.everywhere_ns is not None
    ]
    if len(everywhere) < len(results.revocations):
        never = len(results.revocations) - len(everywhere)
        return f"after {never} of {len(results.revocations)} DELETEs a key was still accepted"
    text = f"a revoked key was refused on all connections {readable(median(everywhere))} after the"
    return f"{text} DELETE was sent (maximum of {len(everywhere)}: {readable(max(everywhere))})"


def acceptance_after_delete(results: Results) -> str:
    """Whether the guarantee held, as a clause; empty: no key was revoked."""
    if not results.revocations:
        return ""
    late = results.accepted_after
    if late:
        return f"{late} checks that began after the response to a DELETE were ACCEPTED"
    return "no check that began after the response to a DELETE was accepted"


def capitalize(words: str) -> str:
    """With an initial capital; `str.capitalize` would change the other letters."""
    return words[:1].upper() + words[1:]


def summary(results: Results) -> str:
    """Cost and revocation in one sentence."""
    parts = [cost(results), revocation(results), acceptance_after_delete(results)]
    return "; ".join(part for part in parts if part) + "."


def warnings(results: Results) -> list[str]:
    """What went wrong, or makes the figures unreliable."""
    lines = list(results.notes)
    if results.unexpected:
        lines.append(f"{results.unexpected:,} responses were not as expected: see the table")
    slow = [name for name, scenario in results.scenarios.items() if not scenario.keeps_up]
    if slow:
        lines.append(f"{', '.join(slow)}: the responses did not keep up with --rate")
    if any(scenario.busiest > _GENERATOR_IS_THE_LIMIT for scenario in results.scenarios.values()):
        lines.append("this tool used a whole processor and measured itself too; lower --rate")
    busy, processors = results.machine.get("loadAverage", 0), results.machine.get("processors", 1)
    if busy > processors:
        lines.append(f"this machine was busy: load average {busy} on {processors} processors")
    if results.keys_left:
        left = ", ".join(results.keys_left)
        lines.append(f"could not be revoked: {left} (keylatch keys revoke ID)")
    return lines


def remarks(results: Results) -> list[str]:
    """Notes on the figures."""
    lines = []
    ratio = median(results.flood_ratios)
    if ratio is not None:
        rate = median(results.scenarios[FLOOD].flood_per_second) or 0
        lines.append(
            f"Flood: with {rate:,.0f} forged tokens per second, the p99 of L1 is {ratio:.2f} times "
            "the p99 without them (median of the rounds)."
        )
    most = median(results.saturated)
    if most is not None:
        text = f"At unlimited rate: {most:,.0f} L1 checks per second"
        limit = results.saturated_busy > _GENERATOR_IS_THE_LIMIT
        lines.append(f"{text}; this tool was the limit." if limit else f"{text}.")
    if STORE in results.skipped:
        lines.append("The cold keys have the hash function of the sidecar (KEYLATCH_HASHER).")
    if results.revocations:
        lines.append(
            "Each connection uses the key up to 200 times per second while it is revoked, so the "
            "time of its refusal has a resolution of about 5 ms."
        )
    late = [
        percentiles_of(scenario.lateness)["p50"] or 0 for scenario in results.scenarios.values()
    ]
    if late:
        lines.append(
            "Latencies count from when a request was due, and include the lateness of this tool: "
            f"{readable(max(late))} at the median of its worst scenario."
        )
    return lines


def rows(results: Results) -> list[Row]:
    lines = []
    for name in SCENARIOS:
        if name in results.skipped:
            lines.append(Row(name, DESCRIPTIONS[name], "", "", (), "", results.skipped[name]))
        elif name in results.scenarios:
            scenario = results.scenarios[name]
            times = percentiles_of(scenario.latencies)
            outcomes = (
                scenario.outcomes if not scenario.flood else scenario.outcomes | scenario.flood
            )
            lines.append(
                Row(
                    name,
                    DESCRIPTIONS[name],
                    f"{scenario.checks:,}",
                    f"{scenario.per_second:,.0f}/s",
                    [readable(times[heading]) for heading in HEADINGS],
                    "0"
                    if not scenario.unexpected
                    else f"{scenario.unexpected} of {_format_outcomes(outcomes)}",
                )
            )
    return lines


def _format_outcomes(outcomes: dict[str, int]) -> str:
    return ", ".join(f"{count:,} x {outcome}" for outcome, count in sorted(outcomes.items()))


def print_to(console: Console, results: Results) -> None:
    """Print summary, warnings, table and notes."""
    console.print(summary(results), style="bold")
    for warning in warnings(results):
        console.print(f"warning: {warning}", style="bold red")
    table = Table(box=None, title=str(results.target), title_justify="left")
    table.add_column("scenario", no_wrap=True)
    for heading in ("checks", "rate", *HEADINGS, "wrong"):
        table.add_column(heading, justify="right", no_wrap=heading != "wrong")
    lines = rows(results)
    for row in lines:
        if not row.missing:
            table.add_row(row.scenario, row.checks, row.rate, *row.times, row.unexpected)
    console.print(table)
    for row in lines:
        if row.missing:
            console.print(f"{row.scenario} was not measured: {row.missing}.")
    for remark in remarks(results):
        console.print(remark)


def print_comparison(console: Console, moves: Sequence[Change], differences: Sequence[str]) -> None:
    """Print the comparison with an earlier run."""
    for difference in differences:
        console.print(f"warning: not comparable: {difference}", style="bold yellow")
    table = Table(box=None, title=change_summary(moves), title_justify="left")
    for heading in ("", "before", "after", "after ÷ before", ""):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for move in moves:
        style = {SLOWER: "bold red", FASTER: "bold green"}.get(move.direction, "")
        row = (move.name, move.before, move.after, f"{move.ratio:.2f}", move.direction)
        table.add_row(*row, style=style)
    console.print(table)


def change_summary(moves: Sequence[Change]) -> str:
    """How many figures changed."""
    better, worse = (sum(move.direction == which for move in moves) for which in (FASTER, SLOWER))
    if not better and not worse:
        return f"Of {len(moves)} figures none changed by more than the noise between rounds"
    return f"Of {len(moves)} figures {worse} got worse and {better} better, beyond the noise"
