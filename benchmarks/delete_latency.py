"""How long a DELETE takes while other processes use the keys, and that none of them is late.

    python benchmarks/delete_latency.py --store postgresql://… [--redis redis://…]
        [--processes 4] [--members 4] [--revokes 300] [--rate 200] [--freeze] [--json results.json]

Every process checks all keys in turn, at an open-loop rate; one more creates and revokes keys, one
after the other, and waits for each. More members than processes are simulated: leases like any
other, each with a connection of its own, but in the same processes and hearing one bell, because
a hundred real ones would measure this machine's processors and not the store. Latencies are from
the call to its return; a check that started after that and was allowed is counted as late. Point
it at a store made for the purpose.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sqlalchemy.dialects import postgresql

from keylatch import statements as sql
from keylatch.engine import Engine
from keylatch.feed import Feed
from keylatch.lease import Lease
from keylatch.model import Allow
from keylatch.settings import Settings
from keylatch.store import Store

_DIALECT = postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]


class LineStore(Store):
    """What a lease asks, over one plain connection."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._url = url
        self._text, self._fixed, _ = sql.POLL.spelled(_DIALECT)

    async def connect(self) -> None:
        """Open the connection."""
        self._line = await psycopg.AsyncConnection.connect(self._url, autocommit=True)

    async def poll(self, member: str, seq: int, seconds: float) -> sql.Poll:
        """See `Store.poll`."""
        values = {**self._fixed, "member": member, "since": seq}
        cursor = await self._line.execute(self._text.encode(), values)
        return sql.read_poll(await cursor.fetchall(), seq)

    async def close(self) -> None:
        """Close the connection."""
        await self._line.close()
        await super().close()


class Simulated:
    """Members that are asked nothing, and hear the bell that the process's engine hears."""

    def __init__(self, engine: Engine, settings: Settings, count: int) -> None:
        assert isinstance(engine._witness, Lease)
        self._settings = settings
        self._stores = [LineStore(settings.store) for _ in range(count)]
        self._leases: list[Lease] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._hear = engine._witness.hear
        engine._witness.hear = self.hear  # type: ignore[method-assign]

    def hear(self) -> None:
        """The bell rang."""
        self._hear()
        for lease in self._leases:
            lease.hear()

    async def start(self) -> None:
        """Join one after the other, so that nobody polls in step."""
        for store in self._stores:
            await store.connect()
            lease = Lease(store, Feed(lambda _: None), self._settings.lease, store.ring)
            await lease.begin()
            self._leases.append(lease)
            self._tasks.append(asyncio.create_task(lease.run()))
            await asyncio.sleep(self._settings.lease / 4 / len(self._stores))

    async def stop(self) -> None:
        """Leave."""
        for task, lease, store in zip(self._tasks, self._leases, self._stores, strict=True):
            task.cancel()
            await lease.end()
            await store.close()


def check_keys(pipe: Connection, store: str, redis: str, rate: float, members: int) -> None:
    """One process: checks what it is told to, until it is told to stop; then reports."""

    async def run() -> dict[str, int]:
        settings = Settings.load(store=store, redis=redis, hasher="sha256")
        engine = Engine(settings)
        simulated = Simulated(engine, settings, members - 1)
        await engine.start()
        await simulated.start()
        tokens: list[tuple[str, bytes]] = []
        last_allowed: dict[str, int] = {}
        due = time.monotonic()
        pipe.send("ready")
        while True:
            while pipe.poll():
                told = pipe.recv()
                if told is None:
                    await simulated.stop()
                    await engine.stop()
                    return last_allowed
                tokens.append(told)
                tokens = tokens[-50:]
            for key_id, value in tokens[-10:]:
                began = time.monotonic_ns()
                if isinstance(await engine.check([value]), Allow):
                    last_allowed[key_id] = began
            due += 10 / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    pipe.send(asyncio.run(run()))


async def measure(
    given: argparse.Namespace, pipes: list[Connection], pids: list[int]
) -> dict[str, Any]:
    """Create, let everybody see it, revoke; again and again."""
    engine = Engine(Settings.load(store=given.store, redis=given.redis, hasher="sha256"))
    await engine.start()
    keyring = await engine.keyring()
    answered: dict[str, int] = {}
    spent: list[float] = []
    polls = await polled(given.store)
    console = Console(stderr=True)
    for number in track(range(given.revokes), "revoking", console=console, transient=True):
        created = await keyring.create("bench", f"key {number}")
        for pipe in pipes:
            pipe.send((created.record.id, b"Bearer " + created.token.reveal().encode()))
        await asyncio.sleep(20 / given.rate)
        if given.freeze:
            os.kill(pids[number % len(pids)], signal.SIGSTOP)
        began = time.perf_counter()
        await keyring.delete("bench", created.record.id)
        spent.append((time.perf_counter() - began) * 1000)
        answered[created.record.id] = time.monotonic_ns()
        if given.freeze:
            os.kill(pids[number % len(pids)], signal.SIGCONT)
    await asyncio.sleep(0.5)
    for pipe in pipes:
        pipe.send(None)
    late = seen = 0
    for pipe in pipes:
        allowed: dict[str, int] = pipe.recv()
        seen += len(allowed)
        late += sum(began > answered[key_id] for key_id, began in allowed.items())
    await engine.stop()
    spent.sort()
    return {
        "processes": given.processes,
        "members": given.members,
        "polls a second and member, idle": round(polls / given.members, 1),
        "revokes": given.revokes,
        "pairs of key and process that were allowed before": seen,
        "allowed after the answer": late,
        "p50 ms": round(spent[len(spent) // 2], 1),
        "p99 ms": round(spent[int(len(spent) * 0.99)], 1),
        "max ms": round(spent[-1], 1),
    }


async def polled(store: str, seconds: float = 5.0) -> float:
    """Polls a second that the store sees while nothing changes, by the grants that it counts."""
    async with await psycopg.AsyncConnection.connect(store, autocommit=True) as line:

        async def grants() -> int:
            cursor = await line.execute("SELECT sum(grants) FROM keylatch_members")
            return int((await cursor.fetchall())[0][0])

        before = await grants()
        await asyncio.sleep(seconds)
        return (await grants() - before) / seconds


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--redis", default="")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--members", type=int, default=0, help="at least as many as processes")
    parser.add_argument("--revokes", type=int, default=300)
    parser.add_argument("--rate", type=float, default=200, help="checks per second and process")
    parser.add_argument(
        "--freeze", action="store_true", help="stop one process during each revoke (SIGSTOP)"
    )
    parser.add_argument("--json", type=Path, help="write the result here as well")
    given = parser.parse_args()
    given.members = max(given.members, given.processes)
    start = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for number in range(given.processes):
        share = len(range(number, given.members, given.processes))
        ours, theirs = start.Pipe()
        process = start.Process(
            target=check_keys,
            args=(theirs, given.store, given.redis, given.rate, share),
            daemon=True,
        )
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    result = asyncio.run(measure(given, pipes, [process.pid or 0 for process in processes]))
    for process in processes:
        process.join(timeout=10)
    table = Table("", "", title="DELETE, while others use the keys", show_header=False)
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
