"""What the check adds behind each proxy: keylatch's sidecar ÷ an app that says 200 to everything.

    python benchmarks/proxy_cost.py [--only nginx] [--rounds 7] [--seconds 2] [--json out.json]

Each proxy runs twice with its files from `deploy/`: one asks keylatch's sidecar (an L1 hit), the
other a bare ASGI app that allows whatever comes, served by uvicorn with the sidecar's options. The
public route of both goes to the app behind them without a question: what is beyond that is added by
the check. `wrk` calls them in turn, always with the same key, over one connection for the median
latency and over sixteen for the speed, which is requests a second. Ratios are taken round by round.
It takes about (rounds + 1) x 6 x seconds for each proxy; one that is not installed is left out. It
needs `wrk` (apt-get install wrk).
"""

import argparse
import contextlib
import importlib
import json
import logging
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from starlette.types import Receive, Scope, Send

TESTS = Path(__file__).parent.parent / "tests"
sys.path.append(str(TESTS))

from proxies import SEARCHED, Kind, SidecarProcess, bearing, proxy  # noqa: E402
from servers import eventually, free_port  # noqa: E402
from wire import send as exchanged  # noqa: E402

# What `keylatch serve` tells uvicorn, so that two apps are compared and not two servers.
AS_THE_SIDECAR = ["--ws", "none", "--no-proxy-headers", "--no-server-header", "--no-date-header"]
AS_THE_SIDECAR += ["--timeout-keep-alive", "75", "--no-access-log"]

ALLOW = [
    (b"content-length", b"0"),
    (b"cache-control", b"no-store"),
    (b"x-keylatch-key-id", b"key_000000000000"),
    (b"x-keylatch-key-name", b"bench"),
    (b"x-keylatch-organization-id", b"acme"),
    (b"x-keylatch-permission", b"FULL"),
    (b"x-keylatch-environment", b"live"),
]
HELLO = [(b"content-length", b"2"), (b"content-type", b"text/plain")]

ONE, MANY = 1, 16
"""Connections: nobody waits for anybody; and as many as keep everything busy."""


async def allow(scope: Scope, receive: Receive, send: Send) -> None:
    """The least that can answer a proxy."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": ALLOW})
        await send({"type": "http.response.body", "body": b""})


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """The app behind the proxy."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": HELLO})
        await send({"type": "http.response.body", "body": b"ok"})


@contextlib.contextmanager
def serving(app: str) -> Iterator[int]:
    """One of the apps above in a process of its own; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", f"{Path(__file__).stem}:{app}"]
    command += ["--app-dir", str(Path(__file__).parent), "--port", str(port), *AS_THE_SIDECAR]
    process = subprocess.Popen([*command, "--log-level", "error", "--lifespan", "off"])

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return exchanged(f"http://127.0.0.1:{port}", b"GET /").status == 200
        return False

    try:
        eventually(answers)
        yield port
    finally:
        process.terminate()
        process.wait()


class NotMeasured(Exception):
    """A proxy did not answer as it should; the others may."""


@dataclass(frozen=True)
class Load:
    """What wrk found: the median latency, and how many requests were answered in a second."""

    p50_us: float
    per_second: float


def load(url: str, field: str, connections: int, seconds: int) -> Load:
    """Call for some seconds; nothing but 200s is let pass."""
    command = ["wrk", "--latency", "-t1", f"-c{connections}", f"-d{seconds}s", "-H", field, url]
    said = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, text=True, timeout=seconds + 30
    ).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise NotMeasured(f"not every answer was a 200\n{said}")
    median = re.search(r"50%\s+([\d.]+)(us|ms|s)", said)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    assert median
    assert rate
    unit = {"us": 1, "ms": 1_000, "s": 1_000_000}[median[2]]
    return Load(float(median[1]) * unit, float(rate[1]))


@dataclass(frozen=True)
class Round:
    """One turn: without a question, asked of the bare app, asked of keylatch."""

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
                    figures[name, connections] = load(urls[name], field, connections, seconds)
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
        for file in sorted(TESTS.glob("test_*.py"))
        if "\nKIND = " in file.read_text()
    ]
    unknown = set(only) - {kind.name for kind in kinds}
    if unknown:
        names = ", ".join(kind.name for kind in kinds)
        raise SystemExit(f"error: there is no {' or '.join(sorted(unknown))}\nhint: {names}")
    chosen = [kind for kind in kinds if kind.name in only or not only]
    return [kind for kind in chosen if shutil.which(kind.program, path=SEARCHED)]


def cost(
    kind: Kind, app: int, bare: int, given: argparse.Namespace, done: Callable[[], None]
) -> dict[str, float]:
    """Start both of a proxy, and a sidecar; measure."""
    with tempfile.TemporaryDirectory(prefix="keylatch-sidecar-") as folder:
        sidecar = SidecarProcess(Path(folder), VERIFY_FACTS="forwarded")
        behind = f"http://127.0.0.1:{app}"
        try:
            field = bearing(sidecar.create(name="bench")).decode()
            with (
                proxy(kind, behind, sidecar.port, kind.unlimited) as asking_keylatch,
                proxy(kind, behind, bare, kind.unlimited) as asking_bare,
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
    if shutil.which("wrk") is None:
        raise SystemExit("error: wrk is missing\nhint: apt-get install wrk")
    kinds = installed(given.only)
    logging.getLogger("keylatch").setLevel(logging.ERROR)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    results = {}
    with (
        serving("hello") as app,
        serving("allow") as bare,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        steps = (given.rounds + 1) * 6
        task = progress.add_task("", total=len(kinds) * steps)
        for number, kind in enumerate(kinds):
            progress.update(task, description=kind.name, completed=number * steps)
            try:
                results[kind.name] = cost(kind, app, bare, given, lambda: progress.advance(task))
            except NotMeasured as error:
                console.print(f"error: {kind.name}: {error}")
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
