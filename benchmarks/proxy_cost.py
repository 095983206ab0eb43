"""What the check adds behind each proxy: keylatch's sidecar ÷ an app that says 200 to everything.

    python benchmarks/proxy_cost.py [--only nginx] [--rounds 7] [--seconds 2] [--json out.json]

Each proxy runs twice with its files from `deploy/`: one asks keylatch's sidecar (an L1 hit), the
other a bare app that allows whatever comes, served by the sidecar's own code, over HTTP or gRPC.
The public route of both goes to the app behind them without a check: what is beyond that is
added by the check. `wrk` calls them in turn, always with the same key, over one connection for the
median latency and over sixteen for the speed, which is requests a second. Ratios are taken round by
round. It takes about (rounds + 1) x 6 x seconds for each proxy; one that is not installed is left
out. It needs `wrk` (apt-get install wrk).
"""

import argparse
import importlib
import json
import logging
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tests.support.proxies import SEARCHED, Kind, SidecarProcess, auth_header, running_proxy
from tests.support.raw_http import send as exchanged

from processes import (  # finds the tests' modules, below
    AS_THE_SIDECAR,
    TESTS,
    Program,
    bare,
    free_port,
    running,
)
from wrk import Load, NotMeasured, load, require

ONE, MANY = 1, 16
"""Connections: one without contention, and as many as keep every process busy."""


def serving(app: str) -> AbstractContextManager[Program]:
    """One of `apps` in a process of its own."""
    command = ["-m", "uvicorn", f"apps:{app}", "--port", "{port}", *AS_THE_SIDECAR]
    return running([*command, "--lifespan", "off"])


@dataclass(frozen=True)
class Round:
    """One turn: without a check, checked by the bare app, checked by keylatch."""

    open: Load
    bare: Load
    keylatch: Load
    busy_bare: Load
    busy_keylatch: Load

    @property
    def bare_adds_us(self) -> float:
        return self.bare.p50_us - self.open.p50_us

    @property
    def keylatch_adds_us(self) -> float:
        return self.keylatch.p50_us - self.open.p50_us


def measure(
    urls: dict[str, str], field: str, rounds: int, seconds: int, done: Callable[[], None]
) -> list[Round]:
    """Let the three take turns, in another order every time."""
    turns = []
    names = list(urls)
    for _ in range(rounds + 1):
        names = [*names[1:], names[0]]
        figures: dict[tuple[str, int], Load] = {}
        for connections in (ONE, MANY):
            for name in names:
                try:
                    figures[name, connections] = load(
                        urls[name], field, connections=connections, seconds=seconds
                    )
                except NotMeasured as error:
                    raise NotMeasured(f"{name}, {connections} at once: {error}") from None
                done()
        turns.append(
            Round(
                open=figures["open", ONE],
                bare=figures["bare", ONE],
                keylatch=figures["keylatch", ONE],
                busy_bare=figures["bare", MANY],
                busy_keylatch=figures["keylatch", MANY],
            )
        )
    return turns[1:]  # the first one warms up


def summary(rounds: Sequence[Round]) -> dict[str, float]:
    """Medians of the rounds: microseconds, and keylatch ÷ bare."""
    # On a busy machine a check can seem to take no time: then the ratio shows that by its size.
    added = [each.keylatch_adds_us / max(1, each.bare_adds_us) for each in rounds]
    speed = [each.busy_keylatch.per_second / each.busy_bare.per_second for each in rounds]
    return {
        "no check": round(statistics.median(each.open.p50_us for each in rounds)),
        "bare adds": round(statistics.median(each.bare_adds_us for each in rounds)),
        "keylatch adds": round(statistics.median(each.keylatch_adds_us for each in rounds)),
        "ratio": round(statistics.median(added), 2),
        "from": round(min(added), 2),
        "to": round(max(added), 2),
        "speed": round(statistics.median(speed), 2),
    }


def installed(only: Sequence[str]) -> list[Kind]:
    """The proxies that have tests and a program on this machine."""
    kinds = [
        importlib.import_module(file.stem).KIND
        for file in sorted((TESTS / "reverse_proxies").glob("test_*.py"))
        if "\nKIND = " in file.read_text()
    ]
    unknown = set(only) - {kind.name for kind in kinds}
    if unknown:
        names = ", ".join(kind.name for kind in kinds)
        raise SystemExit(f"error: there is no {' or '.join(sorted(unknown))}\nhint: {names}")
    chosen = [kind for kind in kinds if kind.name in only or not only]
    return [kind for kind in chosen if shutil.which(kind.program, path=SEARCHED)]


def cost(
    kind: Kind, app: Program, bare: int, given: argparse.Namespace, done: Callable[[], None]
) -> dict[str, float]:
    """Start both of a proxy, and a sidecar; measure. `bare` is the other port to ask."""
    with tempfile.TemporaryDirectory(prefix="keylatch-sidecar-") as folder:
        sidecar = kind.sidecar(Path(folder), VERIFY_REQUEST="forwarded")
        try:
            field = auth_header(sidecar.create(name="bench")).decode()
            with (
                running_proxy(kind, app.url, sidecar.port, kind.unlimited) as asking_keylatch,
                running_proxy(kind, app.url, bare, kind.unlimited) as asking_bare,
            ):
                if exchanged(asking_keylatch.url, b"GET /v1/me").status != 401:
                    raise NotMeasured("without a key it should say 401")
                urls = {
                    "open": f"{asking_bare.url}/healthz",
                    "bare": f"{asking_bare.url}/v1/me",
                    "keylatch": f"{asking_keylatch.url}/v1/me",
                }
                return summary(measure(urls, field, given.rounds, given.seconds, done))
        finally:
            sidecar.close()


def main() -> None:
    """Measure every proxy, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="PROXY")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    require()
    kinds = installed(given.only)
    logging.getLogger("keylatch").setLevel(logging.ERROR)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    results = {}
    grpc_port = free_port()
    with (
        serving("hello") as app,
        bare(grpc_port=grpc_port) as other,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        steps = (given.rounds + 1) * 6
        task = progress.add_task("", total=len(kinds) * steps)
        for number, kind in enumerate(kinds):
            name, target_port = kind.name, other.port
            if kind.sidecar is not SidecarProcess:
                name, target_port = f"{kind.name} over gRPC", grpc_port
            progress.update(task, description=name, completed=number * steps)
            try:
                results[name] = cost(kind, app, target_port, given, lambda: progress.advance(task))
            except NotMeasured as error:
                console.print(f"error: {name}: {error}")
    title = "What the check adds (p50, us), keylatch ÷ bare 200; the aim behind nginx: 1.3"
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for name in next(iter(results.values()), ()):
        table.add_column(name, justify="right")
    for name, result in results.items():
        table.add_row(name, *(f"{value:g}" for value in result.values()))
    if results:
        Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    if len(results) < len(kinds):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
