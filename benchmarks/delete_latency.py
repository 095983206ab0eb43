"""How long a DELETE takes while other processes use the keys, and that none of them is late.

    python benchmarks/delete_latency.py --store postgresql://… [--redis redis://…]
        [--processes 4] [--members 4] [--revokes 300] [--rate 200] [--freeze] [--json results.json]

Every process checks all keys in turn, at an open-loop rate; one more creates and revokes keys, one
after the other, and waits for each. More members than processes are simulated: each asks what a
lease asks, when it would, over a connection of its own, but in the same processes, because a
hundred real ones would measure this machine's processors and not the store. Latencies are from
the call to its return; a check that started after that and was allowed is counted as late. Point
it at a store made for the purpose.
"""

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import secrets
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psycopg
from psycopg import pq
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sqlalchemy.dialects import postgresql

from keylatch.core.decisions import Allow
from keylatch.engine import Engine
from keylatch.revocation.lease import Lease
from keylatch.revocation.notices import Notice, Signer
from keylatch.settings import Settings
from keylatch.storage import invalidation_log, leases
from keylatch.storage.store import Invalidation, Position

_DIALECT: Any = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]
_QUERIES = {b"poll": leases.POLL, b"changes": invalidation_log.INVALIDATIONS_SINCE}


class Member:
    """What the store sees of a `Lease`: the same statements at the same times, sent by libpq.

    Python around each of a hundred would take this machine's processors from the store, which in
    life has its own. It verifies notices and keeps their tombstones, but accepts
    nothing by them, so it has no lease to lose.
    """

    def __init__(self, name: str, url: str, seconds: float) -> None:
        self._named: dict[str, Any] = {
            "member": name,
            "since": 0,
            "since_row_id": 0,
        }
        self._pause = seconds / 4
        self._loop = asyncio.get_running_loop()
        self._connection = pq.PGconn.connect(url.encode())
        self._connection.exec_(b"SET synchronous_commit = off")
        for question, statement in _QUERIES.items():
            self._connection.prepare(question, statement.compile_for(_DIALECT)[0].encode())
        self._connection.nonblocking = 1
        self._query_under_way = b""
        self._has_notice = False
        self._seq = self._acknowledged = 0
        self._pending: tuple[Invalidation, ...] = ()
        self._tombstones: dict[str | None, int] = {}
        self._timer = self._loop.call_soon(self._query, b"poll")
        self._loop.add_reader(self._connection.socket, self._read)

    def on_notice(self, notice: Notice | None) -> None:
        """On a notice: acknowledge it where it follows the known sequence number, else poll;
        afterwards if a poll is under way."""
        if notice is not None and notice.since <= self._named["since"] < notice.batch.seq:
            self._pending = tuple(
                line for line in notice.batch.invalidations if line[0] > self._named["since"]
            )
            for row in self._pending:
                self._tombstones[row.key_id] = self._tombstones[row.organization_id] = row.seq
        if self._query_under_way:
            self._has_notice = True
        else:
            self._acknowledge()

    def _acknowledge(self) -> None:
        self._query(b"poll" if self._pending else b"changes")

    def _query(self, question: bytes) -> None:
        self._timer.cancel()
        self._query_under_way, self._has_notice = question, False
        since = Position(self._named["since"], self._named["since_row_id"])
        last = self._pending[-1].position if self._pending else since
        self._named |= {"pending": last.seq, "pending_row_id": last.row_id}
        self._named["pending_count"] = len(self._pending)
        _, fixed, order = _QUERIES[question].compile_for(_DIALECT)
        named = {**fixed, **self._named}
        self._connection.send_query_prepared(
            question, [str(named[name]).encode() for name in order]
        )
        self._connection.flush()

    def _read(self) -> None:
        self._connection.consume_input()
        while not self._connection.is_busy():
            answer = self._connection.get_result()
            if answer is None:
                self._on_result()
                break
            self._seq = int(answer.get_value(0, 0) or b"")
            self._named["since_row_id"] = int(answer.get_value(0, 1) or b"")
            if self._query_under_way == b"poll":
                self._acknowledged = int(answer.get_value(0, answer.nfields - 3) or b"")

    def _on_result(self) -> None:
        self._query_under_way = b""
        self._named["since"] = self._seq
        self._pending = tuple(line for line in self._pending if line[0] > self._seq)
        if self._acknowledged != self._seq:
            self._query(b"poll")
        elif self._has_notice:
            self._acknowledge()
        else:
            self._timer = self._loop.call_later(self._pause, self._query, b"poll")

    def close(self) -> None:
        """Disconnect."""
        self._timer.cancel()
        self._loop.remove_reader(self._connection.socket)
        self._connection.finish()


class MemberGroup:
    """Members beside the process's own, which receive the notices that its engine receives."""

    def __init__(self, engine: Engine, settings: Settings, count: int) -> None:
        assert isinstance(engine._freshness, Lease)
        self._store = engine.store
        self._settings = settings
        self._names = [secrets.token_hex(8) for _ in range(count)]
        self._members: list[Member] = []
        self._on_notice = engine._freshness.on_notice
        engine._freshness.on_notice = self.on_notice  # type: ignore[method-assign]

    def on_notice(self, notice: Notice | None = None) -> None:
        """A notice arrived."""
        self._on_notice(notice)
        if not self._members:
            return
        signed = self._signer.sign(notice)
        for member in self._members:
            member.on_notice(self._signer.verify(signed))  # each verifies the MAC, as it would

    async def start(self) -> None:
        """Join one after the other, so that members do not poll in step."""
        self._signer = Signer((await self._store.open(0)).peppers)
        for name in self._names:
            await self._store.leases.join(name, 0, self._settings.lease)
            self._members.append(Member(name, self._settings.store, self._settings.lease))
            await asyncio.sleep(self._settings.lease / 4 / len(self._names))

    async def stop(self) -> None:
        """Leave."""
        for member in self._members:
            member.close()
        for name in self._names:
            await self._store.leases.leave(name)


def run_checks(pipe: Connection, store: str, redis: str, rate: float, members: int) -> None:
    """One process: checks the tokens that it receives until the stop message; then reports."""

    async def run() -> dict[str, int]:
        settings = Settings.load(store=store, redis=redis, hasher="sha256")
        engine = Engine(settings)
        crowd = MemberGroup(engine, settings, members - 1)
        await engine.start()
        await crowd.start()
        # A full collection walks whatever was imported, for 50 ms and more, and the members of a
        # process bring it about as many times as often as one would; all processes at once.
        gc.freeze()
        tokens: list[tuple[str, bytes]] = []
        last_allowed: dict[str, int] = {}
        due = time.monotonic()
        pipe.send("ready")
        while True:
            while pipe.poll():
                received = pipe.recv()
                if received is None:
                    await crowd.stop()
                    await engine.stop()
                    return last_allowed
                tokens.append(received)
                tokens = tokens[-50:]
            for key_id, value in tokens[-10:]:
                began = time.monotonic_ns()
                if isinstance(await engine.authenticate([value]), Allow):
                    last_allowed[key_id] = began
            due += 10 / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    pipe.send(asyncio.run(run()))


async def measure(
    given: argparse.Namespace, pipes: list[Connection], pids: list[int]
) -> dict[str, Any]:
    """Create a key, let every process cache it, revoke it; repeatedly."""
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
            target=run_checks,
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
