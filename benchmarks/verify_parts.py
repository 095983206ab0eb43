"""Where the time of `/verify` goes inside of the server: uvicorn, driven without sockets.

    python benchmarks/verify_parts.py [--rounds 31] [--requests 5000]

A bare 200, the same with the headers that an allow has to carry, and `/verify` on an L1 hit. What
the kernel does for a request is the same for all and left out, so shares are larger than on the
wire, and wander less.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from typing import Any

import uvicorn
import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from keylatch.core.decisions import ANY_KEY, Allow
from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch_sidecar.app import create_app
from keylatch_sidecar.forward_auth.decision import allow_start
from keylatch_sidecar.http_server.http_methods import AnyMethod
from keylatch_sidecar.settings import ProxySettings

BARE = "a bare 200"
HEADERS = "the same with an allow's headers"
VERIFY = "/verify, L1 hit"

START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-length", b"0")],
}
END: Message = {"type": "http.response.body", "body": b""}


class NullTransport(asyncio.Transport):
    """Takes what is written, and counts the answers."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 50_000), "sockname": ("127.0.0.1", 8_700)})
        self.answers = 0

    def write(self, data: Any) -> None:
        self.answers += bytes(data[:12]) == b"HTTP/1.1 200"

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        pass


def answering(start: Message) -> ASGIApp:
    """An app that says this and no more."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start)
        await send(END)

    return app


async def drive(app: ASGIApp, request: bytes, requests: int) -> float:
    """Microseconds of a processor for a request, one after the other on one connection."""
    config = uvicorn.Config(app, http=AnyMethod, server_header=False, access_log=False)
    config.load()
    protocol, transport = AnyMethod(config, ServerState(), {}), NullTransport()
    protocol.connection_made(transport)
    began = time.thread_time()
    for _ in range(requests):
        protocol.data_received(request)
        await asyncio.sleep(0)  # in which the app answers
    spent = time.thread_time() - began
    protocol.connection_lost(None)
    if transport.answers != requests:
        raise SystemExit(f"error: {transport.answers} of {requests} answers were 200")
    return spent / requests * 1e6


async def measure(rounds: int, requests: int) -> dict[str, list[float]]:
    """Microseconds of each, for every round; they take turns."""
    with tempfile.TemporaryDirectory(prefix="keylatch-bench-") as folder:
        engine = Engine(Settings.load(store=f"sqlite:///{folder}/keys.db", redis=""))
        created = await (await engine.keyring()).create("bench", "bench")
        value = b"Bearer " + created.token.reveal().encode()
        allow = await engine.authenticate([value], ANY_KEY)
        assert isinstance(allow, Allow)
        apps = {
            BARE: answering(START),
            HEADERS: answering(allow_start(allow.principal, 0)),
            VERIFY: create_app(engine, ProxySettings.load()),
        }
        request = b"GET /verify HTTP/1.1\r\nhost: keylatch\r\nauthorization: " + value + b"\r\n\r\n"
        times: dict[str, list[float]] = {name: [] for name in apps}
        console = Console(stderr=True)
        for _ in track(range(rounds), "measuring", console=console, transient=True):
            for name, app in apps.items():
                times[name].append(await drive(app, request, requests))
        await engine.stop()
    return times


def table_of(times: dict[str, list[float]]) -> Table:
    """Medians, and what each adds to the line above it, round by round."""
    table = Table(title=f"A request inside of the server: medians of {len(times[BARE])} rounds")
    for heading in ("", "us", "added us", "bare ÷ this"):
        table.add_column(heading, justify="right" if heading else "left")
    before: list[float] = []
    for name, each in times.items():
        added = statistics.median(b - a for a, b in zip(before, each, strict=True)) if before else 0
        share = statistics.median(a / b for a, b in zip(times[BARE], each, strict=True))
        table.add_row(name, f"{statistics.median(each):.1f}", f"{added:.1f}", f"{share:.2f}")
        before = each
    return table


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--requests", type=int, default=5_000)
    given = parser.parse_args()
    Console().print(table_of(uvloop.run(measure(given.rounds, given.requests))))


if __name__ == "__main__":
    main()
