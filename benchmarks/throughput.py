"""What a key costs an app: requests a second, protected ÷ open.

    python benchmarks/throughput.py [--app starlette|flask] [--store sqlite|postgresql]
        [--rounds 7] [--seconds 3] [--json out.json]

Starlette on uvicorn (uvloop, httptools) and Flask on gunicorn (gthread, four threads): one worker,
16 connections. `wrk` calls the same view with and without the middleware in turn, always with the
same key in the header, so that L1 answers; the ratio is taken round by round. On a machine that
others use, the processor time that the server took for each answer is more reliable; it does not
include waiting. Every app runs on both stores where none is named; PostgreSQL is started here. It
needs `wrk` (apt-get install wrk), and takes (rounds + 1) x 2 x seconds for each app and store.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import Progress

from processes import AS_THE_SIDECAR, running
from stores import KINDS, auth_header_of, create_store
from targets import Row, Spread, report
from wrk import load, require


@dataclass(frozen=True)
class Served:
    """An app and its server.

    Args:
        title: what they are called.
        command: starts them; `{port}` is where they shall listen.
        aim: protected ÷ open, at least.
    """

    title: str
    command: tuple[str, ...]
    aim: float


UVICORN: Final = ("-m", "uvicorn", "apps:on_starlette", "--factory", "--interface", "asgi3")
GUNICORN: Final = ("-m", "gunicorn", "apps:on_flask()", "--worker-class", "gthread")
APPS: Final = {
    "starlette": Served(
        "Starlette on uvicorn",
        (*UVICORN, *AS_THE_SIDECAR, "--loop", "uvloop", "--http", "httptools")
        + ("--port", "{port}", "--lifespan", "on"),
        0.95,
    ),
    "flask": Served(
        "Flask on gunicorn gthread",
        (*GUNICORN, "--workers", "1", "--threads", "4", "--keep-alive", "75")
        + ("--bind", "127.0.0.1:{port}", "--log-level", "error"),
        0.97,
    ),
}


@dataclass
class Figures:
    """One for each round: requests a second, and microseconds of processor time for each."""

    speed: list[float] = field(default_factory=list)
    cost_us: list[float] = field(default_factory=list)


def measure(
    served: Served, store: str, rounds: int, seconds: int, done: Callable[[], None]
) -> tuple[Figures, Figures]:
    """(open, protected), in alternating order."""
    key = auth_header_of(store)
    figures = {"no": Figures(), "on": Figures()}
    with running(served.command, {"KEYLATCH_STORE": store}, path="/v1/me") as server:
        for number in range(-1, rounds):
            for query in ("no", "on") if number % 2 else ("on", "no"):
                before = server.processor_seconds()
                counted = load(f"{server.url}/v1/me?{query}", key, seconds=seconds)
                spent = server.processor_seconds() - before
                done()
                if number >= 0:  # the first round warms up
                    figures[query].speed.append(counted.per_second)
                    figures[query].cost_us.append(spent / counted.answers * 1e6)
    return figures["no"], figures["on"]


def rows_of(name: str, free: Figures, guarded: Figures, aim: float) -> list[Row]:
    """The rows of one app on one store."""
    return [
        Row(f"{name}: open", Spread.of(free.speed), "requests/s"),
        Row(f"{name}: protected", Spread.of(guarded.speed), "requests/s"),
        Row(f"{name}: open", Spread.of(free.cost_us), "us of a processor"),
        Row(f"{name}: protected", Spread.of(guarded.cost_us), "us of a processor"),
        Row(f"{name}: protected ÷ open", Spread.ratio(guarded.speed, free.speed), "", ">=", aim),
        Row(f"{name}: the same by processor time", Spread.ratio(free.cost_us, guarded.cost_us)),
    ]


def main() -> None:
    """Measure each app on each store, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--app", choices=[*APPS], action="append")
    parser.add_argument("--store", action="append", metavar="|".join(KINDS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    require()
    rows = []
    pairs = [(app, store) for app in given.app or APPS for store in given.store or KINDS]
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(pairs) * (given.rounds + 1) * 2)
        for app, kind in pairs:
            served = APPS[app]
            name = f"{served.title}, {kind.partition(':')[0]}"
            progress.update(task, description=name)
            with create_store(kind) as store:
                free, guarded = measure(
                    served, store, given.rounds, given.seconds, lambda: progress.advance(task)
                )
            rows += rows_of(name, free, guarded, served.aim)
    report("What a key costs an app, L1 hit", rows, given.json)


if __name__ == "__main__":
    main()
