"""Which server for the sidecar: uvicorn (with httptools, h11, asyncio's loop), or granian.

    python benchmarks/server_choice.py [--rounds 5] [--seconds 2] [--json out.json]

One process each, for a bare app and for the sidecar's (an L1 hit on SQLite): `wrk` (apt-get install
wrk) over 16 connections, with one request at a time on each and with eight (pipelining), in turn.
wrk knows no Unix sockets, so for those a generator of ours asks 1,000 times a second, over TCP as
well, and the server's processor time per answer is reported; it is higher than under full load,
because requests do not come in batches. Memory is the proportional share after the load.

Then what proxies need is tried on each of them, yes or no; how is in `Behaviour`'s docstrings.
It takes about (rounds + 1) x 40 x seconds, and a minute.
"""

import argparse
import contextlib
import json
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tests.support.raw_http import exchange, parse_response

from open_loop import in_a_process
from processes import AS_THE_SIDECAR, FOLDER, Program, free_port, running
from stores import auth_header_of, create_store
from targets import Spread, shown
from wrk import load, require

PIPELINE: Final = FOLDER / "pipeline.lua"
AT_ONCE: Final = 8
QUIET_RATE: Final = 1_000
SHORT_SECONDS, LONG_SECONDS = 2, 75
"""Idle times of connections: one to wait for, and the one that proxies need."""


@dataclass(frozen=True)
class Kind:
    """A server and its options.

    Args:
        name: to read.
        options: beside those that all of its family get.
        is_granian: or uvicorn.
    """

    name: str
    options: tuple[str, ...] = ()
    is_granian: bool = False

    def command(self, app: str, idle_seconds: int | None = None) -> list[str]:
        """Starts it with an app, without saying where.

        Args:
            app: `module:name` of a factory.
            idle_seconds: until it closes a connection; None: as it thinks.
        """
        if self.is_granian:
            idle = ["--http1-header-read-timeout", str((idle_seconds or 0) * 1000)]
            shared = ["-m", "granian", app, "--factory", "--interface", "asgi", "--no-ws"]
            return [*shared, "--no-log", *(idle if idle_seconds else []), *self.options]
        idle = ["--timeout-keep-alive", str(idle_seconds)]
        shared = ["-m", "uvicorn", app, "--factory", *AS_THE_SIDECAR]
        return [*shared, *(idle if idle_seconds else []), *self.options]


KINDS: Final = (
    Kind("uvicorn: uvloop, httptools", ("--loop", "uvloop", "--http", "httptools")),
    Kind(
        "uvicorn as `keylatch serve` runs it",
        ("--loop", "uvloop", "--http", "keylatch_sidecar.http_server.http_methods:AnyMethod"),
    ),
    Kind("uvicorn: uvloop, h11", ("--loop", "uvloop", "--http", "h11")),
    Kind("uvicorn: asyncio, httptools", ("--loop", "asyncio", "--http", "httptools")),
    Kind("granian: uvloop", ("--loop", "uvloop"), is_granian=True),
)
APPS: Final = {"bare": "apps:allowing", "sidecar": "keylatch_sidecar.app:from_environment"}


@contextlib.contextmanager
def serving(
    kind: Kind,
    app: str,
    store: str = "",
    uds: Path | None = None,
    idle_seconds: int | None = None,
) -> Iterator[Program]:
    """A server until the end of the block."""
    where = ["--uds", str(uds)] if uds else ["--port", "{port}"]
    settings = {"KEYLATCH_STORE": store, "KEYLATCH_REDIS": ""} if store else {}
    with running([*kind.command(app, idle_seconds), *where], settings, uds=uds) as program:
        yield program


# Speed


@dataclass
class Figures:
    """One for each round, except memory."""

    speed: list[float] = field(default_factory=list)
    pipelined: list[float] = field(default_factory=list)
    cost_us: list[float] = field(default_factory=list)
    tcp_us: list[float] = field(default_factory=list)
    unix_us: list[float] = field(default_factory=list)
    memory_mib: float = 0.0


class Candidate:
    """A server with an app, on a port and, in another process, on a Unix socket."""

    def __init__(self, tcp: Program, unix: Program, key: str) -> None:
        self._tcp = tcp
        self._unix = unix
        self._key = key
        self.figures = Figures()

    def turn(self, seconds: int) -> Figures:
        """One round."""
        url = f"{self._tcp.url}/verify"
        before = self._tcp.processor_seconds()
        plain = load(url, self._key, seconds=seconds)
        spent = self._tcp.processor_seconds() - before
        pipelined = load(url, self._key, seconds=seconds, script=PIPELINE, arguments=[str(AT_ONCE)])
        return Figures(
            [plain.per_second],
            [pipelined.per_second],
            [spent / plain.answers * 1e6],
            [self._quiet_us(self._tcp, self._tcp.url, seconds)],
            [self._quiet_us(self._unix, str(self._unix.place), seconds)],
            self._tcp.memory_mib(),
        )

    def _quiet_us(self, server: Program, url: str, seconds: int) -> float:
        before = server.processor_seconds()
        outcome = in_a_process(url, self._key, QUIET_RATE, seconds, 16)
        return (server.processor_seconds() - before) / outcome.answers * 1e6

    def record(self, turn: Figures) -> None:
        """Keep a round."""
        ours = self.figures
        for kept, new in (
            (ours.speed, turn.speed),
            (ours.pipelined, turn.pipelined),
            (ours.cost_us, turn.cost_us),
            (ours.tcp_us, turn.tcp_us),
            (ours.unix_us, turn.unix_us),
        ):
            kept += new
        ours.memory_mib = turn.memory_mib


def compare_servers(
    app: str, rounds: int, seconds: int, done: Callable[[], None]
) -> dict[str, Figures]:
    """Let all kinds serve one app, in turn; the first round warms up."""
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        store = stack.enter_context(create_store("sqlite"))
        key = auth_header_of(store)
        contestants = {
            kind.name: Candidate(
                stack.enter_context(serving(kind, APPS[app], store)),
                stack.enter_context(serving(kind, APPS[app], store, Path(folder, str(number)))),
                key,
            )
            for number, kind in enumerate(KINDS)
        }
        for number in range(-1, rounds):
            for contestant in contestants.values():
                turn = contestant.turn(seconds)
                if number >= 0:
                    contestant.record(turn)
                done()
        return {name: contestant.figures for name, contestant in contestants.items()}


# Behaviour


class Behaviour:
    """What proxies need, tried on one kind of server."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self._kind = kind
        self._folder = folder

    def all(self) -> dict[str, bool]:
        """Every check's answer."""
        with serving(self._kind, APPS["bare"]) as server:
            return {
                f"connections may be idle for {LONG_SECONDS} s": self.stays_idle(),
                "no Server, no Date": self.is_silent(server),
                "an upgrade is answered as plain HTTP": self.ignores_upgrades(server),
                "methods that it does not know": self.takes_methods(server),
                "stops when it has answered": self.stops_gracefully(),
                "several listeners": self.listens_twice(),
            }

    def stays_idle(self) -> bool:
        """With an option of 2 s an idle connection ends after 2 s, and with 75 s it does not; or
        nothing ends it."""
        with serving(self._kind, APPS["bare"], idle_seconds=SHORT_SECONDS) as server:
            if self._is_open_after(server, SHORT_SECONDS + 2):
                return True
        try:
            with serving(self._kind, APPS["bare"], idle_seconds=LONG_SECONDS) as server:
                return self._is_open_after(server, SHORT_SECONDS + 2)
        except SystemExit:  # the option does not take that
            return False

    def _is_open_after(self, server: Program, seconds: float) -> bool:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.settimeout(seconds)
            connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            connection.recv(65536)
            try:
                return connection.recv(65536) != b""
            except TimeoutError:
                return True

    def is_silent(self, server: Program) -> bool:
        """An answer has the app's header fields and no others."""
        names = {
            name.lower()
            for name, _ in parse_response(send_request(server, b"GET / HTTP/1.1")).headers
        }
        return not names & {b"server", b"date"}

    def ignores_upgrades(self, server: Program) -> bool:
        """A WebSocket's handshake is a request like any other to the app."""
        fields = [
            b"Upgrade: websocket",
            b"Connection: Upgrade, close",
            b"Sec-WebSocket-Version: 13",
        ]
        fields += [b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
        return b" 200 " in send_request(server, b"GET / HTTP/1.1", *fields)[:20]

    def takes_methods(self, server: Program) -> bool:
        """WebDAV's methods, and an unknown one."""
        return all(
            b" 200 " in send_request(server, method + b" / HTTP/1.1")[:20]
            for method in (b"PROPFIND", b"REPORT", b"BREW")
        )

    def stops_gracefully(self) -> bool:
        """SIGTERM while an answer takes its time: it is given."""
        with serving(self._kind, "apps:answering_slowly") as server:
            said: list[bytes] = []
            caller = threading.Thread(
                target=lambda: said.append(send_request(server, b"GET /slow HTTP/1.1"))
            )
            caller.start()
            time.sleep(0.3)  # it is with the app
            try:
                code = server.terminate(10)
            except subprocess.TimeoutExpired:
                return False
            caller.join(timeout=10)
        return b" 200 " in (said or [b""])[0][:20] and code in (0, -15)

    def listens_twice(self) -> bool:
        """A port and a Unix socket, one process: what the sidecar's own code makes of it."""
        uds = self._folder / "second"
        if self._kind.is_granian:
            command = [*self._kind.command(APPS["bare"]), "--uds", str(uds)]
        else:
            command = [str(FOLDER / "apps.py"), "allow", "--uds", str(uds)]
        port = free_port()
        with contextlib.suppress(SystemExit, AssertionError, OSError):
            server = Program([*command, "--port", str(port)], uds)
            try:
                return b" 200 " in send_request(f"http://127.0.0.1:{port}", b"GET / HTTP/1.1")[:20]
            finally:
                server.close()
        return False


def send_request(server: Program | str, start: bytes, *fields: bytes) -> bytes:
    """Write a request as it is; what comes back."""
    place = server.place if isinstance(server, Program) else server
    closing = () if any(b"Connection" in name for name in fields) else (b"Connection: close",)
    lines = [start, b"Host: test", *fields, *closing, b"", b""]
    with contextlib.suppress(TimeoutError):
        return exchange(place, b"\r\n".join(lines))
    return b""


def speeds_of(app: str, figures: dict[str, Figures]) -> Table:
    """The figures of one app, to read."""
    first = next(iter(figures.values()))
    table = Table(title=f"{app}: one process, medians; in brackets ÷ {KINDS[0].name}")
    table.add_column("")
    for heading in (
        "requests/s",
        f"{AT_ONCE} at once",
        "us of a processor",
        f"at {QUIET_RATE}/s: TCP",
        "Unix",
        "MiB",
    ):
        table.add_column(heading, justify="right")
    for name, each in figures.items():
        cells = []
        for ours, theirs in (
            (each.speed, first.speed),
            (each.pipelined, first.pipelined),
            (each.cost_us, first.cost_us),
            (each.tcp_us, first.tcp_us),
            (each.unix_us, first.unix_us),
        ):
            ratio = Spread.ratio(ours, theirs).median
            cells.append(f"{shown(Spread.of(ours).median)} ({ratio:.2f})")
        table.add_row(name, *cells, shown(each.memory_mib))
    return table


def behaviours_of(behaviours: dict[str, dict[str, bool]]) -> Table:
    """Yes and no, to read."""
    table = Table(title="What proxies need, as tried")
    table.add_column("")
    for name in behaviours:
        table.add_column(name, justify="center")
    for what in next(iter(behaviours.values())):
        cells = (
            "[green]yes[/]" if each[what] else "[bold red]no[/]" for each in behaviours.values()
        )
        table.add_row(what, *cells)
    return table


def main() -> None:
    """Measure, try, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    require()
    console = Console()
    console.width = max(console.width, 130)
    result: dict[str, object] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        steps = len(APPS) * len(KINDS) * (given.rounds + 1) + len(KINDS)
        task = progress.add_task("", total=steps)
        for app in APPS:
            progress.update(task, description=app)
            figures = compare_servers(
                app, given.rounds, given.seconds, lambda: progress.advance(task)
            )
            console.print(speeds_of(app, figures))
            result[app] = {name: vars(each) for name, each in figures.items()}
        behaviours = {}
        for kind in KINDS:
            progress.update(task, description=f"trying {kind.name}")
            with tempfile.TemporaryDirectory() as folder:
                behaviours[kind.name] = Behaviour(kind, Path(folder)).all()
            progress.advance(task)
    console.print(behaviours_of(behaviours))
    if given.json:
        file = {**result, "behaviour": behaviours}
        given.json.write_text(json.dumps(file, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
