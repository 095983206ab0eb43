"""Explore the lease protocol, then its mutants: python proofs/prove.py --help.

Exit code 0 only if no state of the protocol breaks a promise and every mutant is caught.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from ctypes import c_ulonglong
from multiprocessing.sharedctypes import SynchronizedArray
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import failover
import states
from explorer import Explorer, Outcome
from failover import Failover
from models import AnyConfiguration
from states import Configuration
from traces import trace

MUTANTS = {**states.MUTANTS, **failover.MUTANTS}
QUICK: tuple[AnyConfiguration, ...] = (
    Configuration(polls=2),
    Configuration(requests=2, lease=3, shared_cache=True),
    Failover(),
    Failover(revokes="we"),
    Failover(synchronous=True),
    Failover(revokes="we", synchronous=True),
    Failover(revokes="ow", synchronous=True),
    Failover(log="oo"),
    Failover(log="ow"),
)
FULL: tuple[AnyConfiguration, ...] = (
    Configuration(revokes="wo", lease=1, polls=2),
    Configuration(processes=2),
    Configuration(revokes="wo", requests=2, lease=1, shared_cache=True),
    Configuration(revokes="wo", lease=3, shared_cache=True),
    Configuration(revokes="ww", shared_cache=True),
    Configuration(processes=2, lease=1, shared_cache=True),
    Failover(revokes="ow"),
    Failover(revokes="ww"),
    Failover(revokes="ww", log="o"),
    Failover(revokes="ww", synchronous=True),
    Failover(lease=2),
    Failover(lease=2, synchronous=True),
    *QUICK,
)
Counts: TypeAlias = "SynchronizedArray[int]"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    configurations = _chosen(options)
    mutants = {name: mutant(name, 1 if options.quick else 2) for name in MUTANTS}
    spawn = multiprocessing.get_context("spawn")
    counts = spawn.Array(c_ulonglong, len(configurations))
    with ProcessPoolExecutor(
        options.jobs, spawn, _share, (counts,), max_tasks_per_child=None if options.quick else 1
    ) as pool:
        traces = {name: pool.submit(trace, c) for name, c in mutants.items()}
        runs = {
            c: pool.submit(_explore, i, c, options.states) for i, c in enumerate(configurations)
        }
        _watch(console, [*traces.values(), *runs.values()], configurations, counts)
        outcomes = {c: run.result() for c, run in runs.items()}
        console.print(_table(outcomes))
        flawed = [c for c, outcome in outcomes.items() if outcome.violations]
        for c in flawed:
            _print_section(console, f"the protocol, {described(c)}", pool.submit(trace, c).result())
        for number, (name, c) in enumerate(mutants.items(), 1):
            _print_section(
                console, f"mutant {number}, {name} (X = {c.lease})", traces[name].result()
            )
    survivors = [name for name, run in traces.items() if not run.result()]
    console.print(_conclusion(outcomes, survivors))
    return 1 if flawed or survivors else 0


def mutant(name: str, lease: int) -> AnyConfiguration:
    """A small world in which this mutant goes wrong."""
    if name in failover.MUTANTS:
        return _failover_mutant(name, lease)
    revokes = {
        "removed although granted meanwhile": "wo",
        "silence counted from before the poll": "wo",
        "lease without membership": "wo",
        "repeated DELETE without waiting": "ww",
        "notice accepted over a gap": "wo",
    }
    two = name in revokes
    rules = states.MUTANTS[name]
    return Configuration(revokes=revokes.get(name, "w"), warm=two, lease=lease, rules=rules)


def _failover_mutant(name: str, lease: int) -> Failover:
    revokes = {
        "numbers instead of history": "ow",
        "DELETE that changes servers": "ow",
        "look-up without the anchor": "ow",
        "remembered revocation opened before it is read": "ow",
        "answers of two servers": "ow",
        "caches kept on another server": "we",
    }
    synchronous = name in (
        "leases without the synchronous standby",
        "remembered revocation opened before it is read",
    )
    rules = failover.MUTANTS[name]
    return Failover(
        revokes=revokes.get(name, "w"),
        lease=lease,
        synchronous=synchronous,
        warm=True,
        rules=rules,
    )


def described(c: AnyConfiguration) -> str:
    """The configuration in a few words."""
    letters = {"w": "key", "o": "other", "e": "active again"}
    changes = " + ".join(letters[letter] for letter in c.revokes)
    processes = _count(c.processes, "process", "processes")
    if isinstance(c, Failover):
        if c.log:
            changes = " + ".join(letters[letter] for letter in c.log) + " before " + changes
        parts = ["failover", processes, changes, f"X = {c.lease}"]
        return ", ".join(parts + ["synchronous"] * c.synchronous)
    requests = _count(c.requests, "request", "requests")
    parts = [processes, requests, changes, f"X = {c.lease}", _count(c.polls, "poll", "polls")]
    return ", ".join(parts + ["L2"] * c.shared_cache)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Explore every state of the lease protocol.")
    add = parser.add_argument
    add("--quick", action="store_true", help="small worlds only, for CI")
    add("--states", type=int, default=sys.maxsize, help="cut each configuration off here")
    add("--jobs", type=int, default=2, help="configurations explored at once (2)")
    add("--processes", type=int, help="one configuration of your own: how many processes (1)")
    add("--requests", type=int, help="requests under way at once (1)")
    add("--revokes", type=int, help="DELETEs: one of the key, the others of another key (1)")
    add("--lease", type=int, help="X in ticks (2)")
    add("--polls", type=int, help="polls under way at once in each process (1)")
    return parser


def _chosen(options: argparse.Namespace) -> tuple[AnyConfiguration, ...]:
    own = {
        name: getattr(options, name)
        for name in ("processes", "requests", "lease", "polls")
        if getattr(options, name) is not None
    }
    if options.revokes is not None:
        own["revokes"] = "w" + "o" * (options.revokes - 1)
    if own:
        return (Configuration(shared_cache=True, **own),)
    return QUICK if options.quick else FULL


_counts: Counts


def _share(counts: Counts) -> None:
    global _counts
    _counts = counts


def _explore(i: int, c: AnyConfiguration, most: int) -> Outcome:
    def report(states: int) -> None:
        _counts[i] = states

    return Explorer(c).explore(most, report)


def _watch(
    console: Console,
    work: Sequence[Future[Any]],
    configurations: Sequence[AnyConfiguration],
    counts: Counts,
) -> None:
    text = TextColumn("{task.completed:>12,.0f} states  {task.description}")
    with Progress(SpinnerColumn(), text, TimeElapsedColumn(), console=console) as progress:
        tasks = [progress.add_task(described(c), total=None) for c in configurations]
        pending = set(work)
        while pending:
            pending = wait(pending, timeout=0.2).not_done
            for i, task in enumerate(tasks):
                progress.update(task, completed=counts[i])


def _table(outcomes: dict[AnyConfiguration, Outcome]) -> Table:
    table = Table("configuration (its changes: of the key, of another)")
    for heading in ("states", "transitions", "violations", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("explored")
    for c, o in outcomes.items():
        figures = [f"{n:,}" for n in (o.states, o.transitions, o.violations)]
        extent = "all" if o.complete else "cut off"
        table.add_row(described(c), *figures, f"{o.seconds:.0f}", extent)
    return table


def _print_section(console: Console, title: str, lines: list[str]) -> None:
    console.print(f"\n[bold]{title}[/bold]")
    for line in lines or ["survives: no state breaks a promise"]:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _conclusion(outcomes: dict[AnyConfiguration, Outcome], survivors: list[str]) -> str:
    states = sum(outcome.states for outcome in outcomes.values())
    transitions = sum(outcome.transitions for outcome in outcomes.values())
    violations = sum(outcome.violations for outcome in outcomes.values())
    caught = len(MUTANTS) - len(survivors)
    return (
        f"\n{states:,} distinct states, {transitions:,} transitions, {violations:,} violations; "
        f"{caught} of {len(MUTANTS)} mutants caught"
    )


if __name__ == "__main__":
    sys.exit(main())
