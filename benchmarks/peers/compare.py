"""What keys cost with keylatch, and with what one would pick instead: protected ÷ open.

    python benchmarks/peers/compare.py [--only drf_knox] [--rounds 7] [--seconds 2]
                                       [--json out.json] [--plot out.png] [--cache FOLDER]
    python benchmarks/peers/compare.py --from out.json --plot out.png

Every peer is installed in a virtual environment of its own (the first time takes some minutes) and
served by one process; `wrk` calls with sixteen connections. It takes about (rounds + 1) x peers x 2
x seconds. It needs `wrk` (apt-get install wrk). README.md beside this file describes the peers.
"""

import argparse
import contextlib
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from catalogue import PEERS, NotMeasured, Peer
from environments import CACHE, installed, python_for
from findings import Finding, as_tables, finding, read, write
from rounds import measure
from serving import Server, serving

ROOT = Path(__file__).parent.parent.parent
CONSOLE = Console(stderr=True)


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL for keylatch to keep keys in; yields its URL, empty where there is none."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin/postgres")):
        yield ""
        return
    sys.path.append(str(ROOT))
    from tests.support.servers import PostgresServer

    server = PostgresServer()
    try:
        yield server.new_database()
    finally:
        server.remove()


def chosen(only: Sequence[str]) -> list[Peer]:
    """The requested peers; all of them by default."""
    unknown = set(only) - {peer.name for peer in PEERS}
    if unknown:
        names = ", ".join(peer.name for peer in PEERS)
        raise SystemExit(f"error: there is no {' or '.join(sorted(unknown))}\nhint: {names}")
    return [peer for peer in PEERS if peer.name in only or not only]


def versions(peer: Peer, python: Path) -> dict[str, str]:
    """Of what its list names; of keylatch's frameworks and servers, where it is keylatch."""
    found = installed(None if peer.is_keylatch else python.parent.parent)
    named = {re.split(r"[^\w-]", each)[0] for each in peer.packages}
    if peer.is_keylatch:
        named = {"starlette", "fastapi", "flask", "django", "djangorestframework"}
        named |= {"uvicorn", "uvloop", "httptools", "gunicorn"}
    return {name: found[name] for name in sorted(found) if name.lower() in named}


def started(
    peers: Sequence[Peer], cache: Path, folder: Path, stack: contextlib.ExitStack
) -> tuple[dict[str, Server], dict[str, dict[str, str]], dict[str, str]]:
    """The servers of all peers, the versions that they run, and who cannot be measured and why."""
    servers, ran, failed = {}, {}, {}
    url = ""
    if any(peer.postgresql for peer in peers):
        url = stack.enter_context(postgresql())
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=CONSOLE, transient=True) as progress:
        task = progress.add_task("", total=len(peers))
        for peer in peers:
            progress.update(task, description=f"installing and starting {peer.name}")
            own = folder / peer.name
            own.mkdir()
            try:
                if peer.postgresql and not url:
                    raise NotMeasured("PostgreSQL is not installed: apt-get install postgresql")
                store = url if peer.postgresql else f"sqlite:///{own}/keys.db"
                python = python_for(peer, cache)
                servers[peer.name] = stack.enter_context(serving(peer, python, own, store))
                ran[peer.name] = versions(peer, python)
            except NotMeasured as error:
                failed[peer.name] = str(error)
            progress.advance(task)
    return servers, ran, failed


def compare(given: argparse.Namespace) -> tuple[list[Finding], dict[str, str]]:
    """Start all, measure all, stop all."""
    peers = chosen(given.only)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keylatch-peers-")))
        servers, ran, failed = started(peers, given.cache, folder, stack)
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, console=CONSOLE, transient=True) as progress:
            task = progress.add_task("calling", total=len(servers) * (given.rounds + 1))

            def done(name: str) -> None:
                progress.update(task, advance=1, description=f"called {name}")

            measured, stumbled = measure(servers, given.rounds, given.seconds, done)
    findings = [
        finding(peer, ran[peer.name], measured[peer.name])
        for peer in peers
        if peer.name in measured
    ]
    return findings, {**failed, **stumbled}


def main() -> None:
    """Measure, print the table, write the JSON, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="PEER")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all rounds here")
    parser.add_argument("--plot", type=Path, help="draw a PNG here")
    parser.add_argument("--cache", type=Path, default=CACHE, help="the peers' environments")
    parser.add_argument(
        "--from", type=Path, dest="earlier", help="an earlier --json, to show again"
    )
    given = parser.parse_args()
    if given.plot:
        from plot import draw  # before the minutes of measuring: matplotlib may be missing
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers are stopped
    if given.earlier:
        findings, failed = read(given.earlier)
    elif shutil.which("wrk") is None:
        raise SystemExit("error: wrk is missing\nhint: apt-get install wrk")
    else:
        findings, failed = compare(given)
    if findings:
        Console().print(as_tables(findings))
    for name, why in failed.items():
        CONSOLE.print(f"error: {name} is not measured: {why}", markup=False, soft_wrap=True)
    if given.json:
        write(given.json, findings, failed, given.seconds)
    if given.plot and findings:
        draw(findings, given.plot)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # all is stopped by now
        raise SystemExit(130) from None
