"""What an L1 hit costs: a bare app, the same behind Starlette's `AuthenticationMiddleware` with a
plain dict, and the same behind keylatch.

    python benchmarks/l1_hit.py [--rounds 41] [--calls 2000] [--json results.json]

In process, without sockets: each app is driven with stub `receive` and `send`. The variants take
turns within each round, so a machine that slows down slows them all; ratios are taken round by
round, and medians are reported. Only the ratios mean something on another machine.
"""

import argparse
import asyncio
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from starlette.applications import Starlette
from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    AuthenticationError,
    BaseUser,
    SimpleUser,
)
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from keylatch.asgi import APIKeyMiddleware
from keylatch.engine import Engine
from keylatch.settings import Settings

App = Callable[..., Awaitable[None]]
OTHER_HEADERS = [
    (b"host", b"api.example.test"),
    (b"user-agent", b"python-httpx/0.28.1"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"connection", b"keep-alive"),
]


class DictBackend(AuthenticationBackend):
    """What a developer writes in ten lines: no revocation, no lastUsed, no store."""

    def __init__(self, keys: dict[str, str]) -> None:
        self._keys = keys

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        scheme, _, token = conn.headers.get("Authorization", "").partition(" ")
        name = self._keys.get(token) if scheme.lower() == "bearer" else None
        if name is None:
            raise AuthenticationError("Invalid API key")
        return AuthCredentials(["authenticated"]), SimpleUser(name)


async def homepage(request: Request) -> PlainTextResponse:
    """The work that is protected: none."""
    return PlainTextResponse("Hello, world")


def app_behind(*middleware: Middleware) -> Starlette:
    """The same small app behind some middleware."""
    return Starlette(routes=[Route("/", homepage)], middleware=list(middleware))


async def drive(app: App, scope: dict[str, Any], calls: int) -> float:
    """Microseconds for one call, averaged over many."""
    statuses = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    began = time.perf_counter()
    for _ in range(calls):
        await app(dict(scope), receive, send)
    spent = time.perf_counter() - began
    if set(statuses) != {200} or len(statuses) != calls:
        raise SystemExit(f"error: not every answer was 200: {set(statuses)}")
    return spent / calls * 1e6


async def measure(rounds: int, calls: int, folder: str) -> dict[str, list[float]]:
    """Microseconds per call of each variant, for every round."""
    engine = Engine(Settings.load(store=f"sqlite:///{folder}/keys.db", redis=""))
    created = await (await engine.keyring()).create("bench", "bench")
    token = created.token.reveal()
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "raw_path": b"/",
        "root_path": "",
        "query_string": b"",
        "http_version": "1.1",
        "scheme": "http",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
        "headers": [*OTHER_HEADERS, (b"authorization", f"Bearer {token}".encode())],
    }
    backend = DictBackend({token: "bench"})
    apps: dict[str, App] = {
        "bare app": app_behind(),
        "Starlette AuthenticationMiddleware + dict": app_behind(
            Middleware(AuthenticationMiddleware, backend=backend)
        ),
        "keylatch, L1 hit on SQLite": app_behind(Middleware(APIKeyMiddleware, engine=engine)),
    }
    times: dict[str, list[float]] = {name: [] for name in apps}
    for app in apps.values():
        await drive(app, scope, calls)  # warms caches up; not counted
    for turn in track(range(rounds), "measuring", console=Console(stderr=True), transient=True):
        names = list(apps)
        for name in names[turn % 3 :] + names[: turn % 3]:
            times[name].append(await drive(apps[name], scope, calls))
    await engine.stop()
    return times


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and ratios taken round by round."""
    bare, starlette, keylatch = times.values()
    added = [b - a for a, b in zip(bare, starlette, strict=True)]
    ours = [c - a for a, c in zip(bare, keylatch, strict=True)]
    return {
        "python": platform.python_version(),
        "rounds": len(bare),
        "microseconds": {name: round(statistics.median(each), 2) for name, each in times.items()},
        "added_microseconds": {
            name: round(statistics.median(each), 2)
            for name, each in zip(list(times)[1:], (added, ours), strict=True)
        },
        "bare_over": {
            name: round(statistics.median(a / b for a, b in zip(bare, each, strict=True)), 3)
            for name, each in times.items()
        },
        "added_by_keylatch_over_added_by_starlette": round(
            statistics.median(c / b for b, c in zip(added, ours, strict=True)), 2
        ),
    }


def table_of(result: dict[str, Any]) -> Table:
    """The result, to read."""
    table = Table(
        title=f"One request, in process: medians of {result['rounds']} interleaved rounds"
    )
    for heading in ("", "us", "added us", "bare ÷ this"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, spent in result["microseconds"].items():
        added = result["added_microseconds"].get(name, "")
        table.add_row(name, f"{spent}", f"{added}", f"{result['bare_over'][name]:.2f}")
    return table


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the result here as well")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="keylatch-bench-") as folder:
        result = summary(asyncio.run(measure(given.rounds, given.calls, folder)))
    console = Console()
    console.print(table_of(result))
    ratio = result["added_by_keylatch_over_added_by_starlette"]
    console.print(f"added by keylatch ÷ added by Starlette's, round by round: {ratio}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        print(f"wrote {given.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
