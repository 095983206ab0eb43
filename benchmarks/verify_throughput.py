"""What `/verify` costs: a real `keylatch serve` beside an app that allows every request.

    python benchmarks/verify_throughput.py [--store sqlite|postgresql] [--rounds 7] [--seconds 3]
        [--json out.json]

The bare app is served by the sidecar's own code, with another app in it (`apps.py`), so server and
options are the same. `wrk` (apt-get install wrk) calls bare, one worker and two workers in turn, 64
connections, an L1 hit. Then a generator of its own (`open_loop.py`) asks bare and `/verify` at a
constant rate, half of what one worker just answered, and counts latencies from when a request was
due. Its own lateness is reported as well: it needs a processor of its own.

Two workers and the load generator need three processors. Where there are fewer, requests a second
say how they share, and not how the workers scale: for that, processor time per answer is reported.
Two workers with a processor each would answer 2 x (cost with one ÷ cost with two) as many. It takes
about (rounds + 1) x 5 x seconds.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import Progress

from open_loop import Outcome, in_a_process
from processes import Program, bare, sidecar
from stores import KINDS, auth_header_of, create_store
from targets import Row, Spread, report
from wrk import load, require

CONNECTIONS: Final = 64
BARE, ONE, TWO = "bare", "/verify", "/verify, 2 workers"


@dataclass
class Figures:
    """One for each round.

    Args:
        speed: requests a second.
        cost_us: microseconds of processor time for each.
        processors: how many the server kept busy.
        busiest: the share of the server's time that the busier of its processes took.
        wrk_processors: how many wrk kept busy meanwhile.
    """

    speed: list[float] = field(default_factory=list)
    cost_us: list[float] = field(default_factory=list)
    processors: list[float] = field(default_factory=list)
    busiest: list[float] = field(default_factory=list)
    wrk_processors: list[float] = field(default_factory=list)

    def count(self, server: Program, key: str, seconds: int) -> None:
        """Load a server, and note what it did."""
        before = server.costs()
        counted = load(f"{server.url}/verify", key, connections=CONNECTIONS, seconds=seconds)
        spent = sorted(after - before.get(pid, 0) for pid, after in server.costs().items())
        self.speed.append(counted.per_second)
        self.cost_us.append(sum(spent) / counted.answers * 1e6)
        self.processors.append(sum(spent) / seconds)
        self.busiest.append(spent[-1] / sum(spent))
        self.wrk_processors.append(counted.processor_seconds / seconds)


def measure(
    servers: dict[str, Program], key: str, rounds: int, seconds: int, done: Callable[[], None]
) -> tuple[dict[str, Figures], dict[str, list[Outcome]]]:
    """Let them take turns, in another order every time; the first round warms up."""
    names = list(servers)
    outcomes: dict[str, list[Outcome]] = {BARE: [], ONE: []}
    figures = {name: Figures() for name in names}
    for number in range(-1, rounds):
        for name in names:
            counting = figures[name] if number >= 0 else Figures()
            counting.count(servers[name], key, seconds)
            done()
        for name in (name for name in names if name in outcomes):
            if number >= 0:
                half = figures[ONE].speed[-1] / 2
                half_load = in_a_process(servers[name].url, key, half, seconds, CONNECTIONS)
                outcomes[name].append(half_load)
            done()
        names = [*names[1:], names[0]]
    return figures, outcomes


def rows_of(figures: dict[str, Figures], outcomes: dict[str, list[Outcome]]) -> list[Row]:
    """The rows of the report."""
    none, one, two = (figures[name] for name in (BARE, ONE, TWO))
    half_load = outcomes[ONE]
    ideal = [2 * a / b for a, b in zip(one.cost_us, two.cost_us, strict=True)]

    def milliseconds(values: list[float]) -> Spread:
        return Spread.of(value / 1e3 for value in values)

    return [
        *(Row(name, Spread.of(each.speed), "requests/s") for name, each in figures.items()),
        *(
            Row(name, Spread.of(each.cost_us), "us of a processor")
            for name, each in figures.items()
        ),
        Row("/verify ÷ bare", Spread.ratio(one.speed, none.speed), "", ">=", 0.88),
        Row("the same by processor time", Spread.ratio(none.cost_us, one.cost_us)),
        Row("half load: rate", Spread.of(each.rate for each in half_load), "requests/s"),
        Row("half load: p50", milliseconds([each.latency["p50"] for each in half_load]), "ms"),
        Row(
            "half load: p99",
            milliseconds([each.latency["p99"] for each in half_load]),
            "ms",
            "<",
            1,
        ),
        Row("half load: p99.9", milliseconds([each.latency["p99.9"] for each in half_load]), "ms"),
        Row(
            "half load: p99 of the bare app",
            milliseconds([each.latency["p99"] for each in outcomes[BARE]]),
            "ms",
        ),
        Row(
            "half load: p99 of the generator's own lateness",
            milliseconds([each.lateness["p99"] for each in half_load]),
            "ms",
        ),
        Row("2 workers ÷ 1 worker", Spread.ratio(two.speed, one.speed), "", ">=", 1.7),
        Row("by processor time, with a processor each", Spread.of(ideal)),
        Row("2 workers: processors that they kept busy", Spread.of(two.processors)),
        Row("2 workers: processors that wrk kept busy", Spread.of(two.wrk_processors)),
        Row("2 workers: share of the busier one", Spread.of(two.busiest)),
    ]


def limit_of(two: Figures, processors: int) -> str:
    """Who held two workers up: a sentence."""
    workers = Spread.of(two.processors).median
    wrk = Spread.of(two.wrk_processors).median
    summary = f"two workers kept {workers:.2f} of {processors} processors busy, wrk {wrk:.2f}"
    if workers >= 1.9:
        return f"The load generator was not the limit: {summary}."
    if wrk >= 0.95:
        return f"The load generator was the limit: {summary}."
    return (
        f"The workers were not the limit: {summary}; the rest was waiting, for wrk, for each other,"
        " or for others on this machine. Believe the line by processor time."
    )


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--store", default="sqlite", metavar="|".join(KINDS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    require()
    with (
        create_store(given.store) as store,
        bare() as app,
        sidecar(store) as one,
        sidecar(store, workers=2) as two,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("calling", total=(given.rounds + 1) * 5)
        servers = {BARE: app, ONE: one, TWO: two}
        figures, outcomes = measure(
            servers,
            auth_header_of(store),
            given.rounds,
            given.seconds,
            lambda: progress.advance(task),
        )
    limit = limit_of(figures[TWO], os.cpu_count() or 1)
    title = f"/verify on {given.store.partition(':')[0]}, L1 hit"
    report(title, rows_of(figures, outcomes), given.json, limit=limit)
    Console().print(limit)


if __name__ == "__main__":
    main()
