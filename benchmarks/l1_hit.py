"""What an L1 hit costs: a bare app, the same behind Starlette's `AuthenticationMiddleware` with a
plain dict, and the same behind keylatch.

    python benchmarks/l1_hit.py [--rounds 151] [--calls 300] [--json results.json] [--check]

In process, without sockets: each app is driven with stub `receive` and `send`. The variants take
turns within each round, so a machine that slows down slows them all; ratios are taken round by
round, and medians are reported. Only the ratios mean something on another machine.
"""

import argparse
import asyncio
import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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
from keylatch.core.tokens import MacKeys
from keylatch.engine import Engine
from keylatch.settings import Settings

sys.path.append(str(Path(__file__).parent.parent))

from tests.support.servers import PostgresServer

BARE = "bare app"
STARLETTE = "Starlette AuthenticationMiddleware + dict"
SQLITE = "keylatch, L1 hit on SQLite"
POSTGRESQL = "keylatch, L1 hit on PostgreSQL"

RECORDED = {SQLITE: 1.10, POSTGRESQL: 1.10}
"""Added by keylatch ÷ added by Starlette's when that was last looked at (CPython 3.11)."""
MAY_GROW = 1.2
TRIES = 3

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

    headers = scope["headers"]
    began = time.thread_time()  # the processor's: others who preempt us do not count
    for _ in range(calls):
        # Made anew, as a server does: objects that were seen before know their hashes.
        anew = [(b"%b" % name, b"%b" % value) for name, value in headers]
        await app({**scope, "headers": anew}, receive, send)
    spent = time.thread_time() - began
    if set(statuses) != {200} or len(statuses) != calls:
        raise SystemExit(f"error: not every answer was 200: {set(statuses)}")
    return spent / calls * 1e6


def scope_of(token: str) -> dict[str, Any]:
    """A request as servers hand it over."""
    return {
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


@contextlib.asynccontextmanager
async def variants(stores: dict[str, str]) -> AsyncIterator[dict[str, tuple[App, dict[str, Any]]]]:
    """Each app, and the request that it lets pass: without a check, with Starlette's, and with
    keylatch on each of these stores (name → URL)."""
    token = MacKeys([b"a store of their own"]).mint("kl", "live").reveal()
    starlette = Middleware(AuthenticationMiddleware, backend=DictBackend({token: "bench"}))
    made: dict[str, tuple[App, dict[str, Any]]] = {
        BARE: (app_behind(), scope_of(token)),
        STARLETTE: (app_behind(starlette), scope_of(token)),
    }
    async with contextlib.AsyncExitStack() as stack:
        for name, url in stores.items():
            engine = Engine(Settings.load(store=url, redis=""))
            stack.push_async_callback(engine.stop)
            created = await (await engine.keyring()).create("bench", "bench")
            app = app_behind(Middleware(APIKeyMiddleware, engine=engine))
            made[name] = (app, scope_of(created.token.reveal()))
        yield made


@contextlib.contextmanager
def stores() -> Iterator[dict[str, str]]:
    """A SQLite file, and a PostgreSQL of our own where that is installed."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="keylatch-bench-"))
        found = {SQLITE: f"sqlite:///{folder}/keys.db"}
        if sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres")):
            server = PostgresServer()
            stack.callback(server.remove)
            found[POSTGRESQL] = server.new_database()
        yield found


async def measure(rounds: int, calls: int, stores: dict[str, str]) -> dict[str, list[float]]:
    """Microseconds per call of each variant, for every round."""
    async with variants(stores) as apps:
        times: dict[str, list[float]] = {name: [] for name in apps}
        for app, scope in apps.values():
            await drive(app, scope, calls)  # warms caches up; not counted
        for turn in track(range(rounds), "measuring", console=Console(stderr=True), transient=True):
            names = list(apps)
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                times[name].append(await drive(*apps[name], calls))
                await asyncio.sleep(0.001)  # a hit suspends nowhere, and leases need their turn
    return times


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and ratios taken round by round."""
    bare = times[BARE]
    added = {
        name: [b - a for a, b in zip(bare, each, strict=True)]
        for name, each in times.items()
        if name != BARE
    }
    return {
        "python": platform.python_version(),
        "rounds": len(bare),
        "microseconds": {name: round(statistics.median(each), 2) for name, each in times.items()},
        "added_microseconds": {
            name: round(statistics.median(each), 2) for name, each in added.items()
        },
        "bare_over": {
            name: round(statistics.median(a / b for a, b in zip(bare, each, strict=True)), 3)
            for name, each in times.items()
        },
        "added_by_keylatch_over_added_by_starlette": {
            name: round(
                statistics.median(c / b for b, c in zip(added[STARLETTE], each, strict=True)), 2
            )
            for name, each in added.items()
            if name != STARLETTE
        },
    }


def table_of(result: dict[str, Any]) -> Table:
    """The result, to read."""
    table = Table(
        title=f"One request, in process: medians of {result['rounds']} interleaved rounds"
    )
    for heading in ("", "us", "added us", "bare ÷ this"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, spent in result["microseconds"].items():
        added = result["added_microseconds"].get(name, "")
        table.add_row(name, f"{spent}", f"{added}", f"{result['bare_over'][name]:.2f}")
    return table


def grown(ratios: dict[str, float]) -> list[str]:
    """The variants whose hits cost more than recorded, beyond what a noisy machine explains."""
    return [name for name, ratio in ratios.items() if ratio > RECORDED[name] * MAY_GROW]


def main() -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=151)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument(
        "--check", action="store_true", help=f"fail where it has grown by {MAY_GROW - 1:.0%}%"
    )
    given = parser.parse_args()
    console = Console()
    for tries_left in reversed(range(TRIES if given.check else 1)):
        with stores() as found:
            result = summary(asyncio.run(measure(given.rounds, given.calls, found)))
        console.print(table_of(result))
        ratios = result["added_by_keylatch_over_added_by_starlette"]
        for name, ratio in ratios.items():
            text = f"{name}: added ÷ added by Starlette's, round by round: {ratio} (aim: 0.75)"
            console.print(text, soft_wrap=True)
        if not grown(ratios):
            break
        if given.check and not tries_left:  # what has really grown has grown each time
            print("error: a hit costs more than was recorded", file=sys.stderr)
            print("hint: profile it; or record, and say, why it must", file=sys.stderr)
            return 1
    if POSTGRESQL not in found:
        console.print("PostgreSQL is missing: apt-get install postgresql")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        print(f"wrote {given.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
