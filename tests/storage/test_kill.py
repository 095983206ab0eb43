"""kill -9 amid creates and revokes: what was answered is true after a restart."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile

import pytest
from rich.console import Console
from rich.progress import track

from keylatch.core.decisions import Allow
from keylatch.engine import Engine
from keylatch.storage.store import Store
from tests.support import worker_writes
from tests.support.engines import MakeEngine, Times
from tests.support.servers import PostgresServer

pytestmark = pytest.mark.long

Answers = dict[str, str]
LEASE = 0.2


class Writers:
    """Processes that write to one store, one after the other, each until it is killed."""

    def __init__(self, store_url: str, kind: str = "sound") -> None:
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed at the exit
        self._parent = subprocess.Popen(
            [sys.executable, worker_writes.__file__, store_url, "1000", kind],
            env={**os.environ, "KEYLATCH_LEASE": str(LEASE)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *_: object) -> None:
        with self._parent, self._complaints:
            self._parent.kill()

    def killed_after(self, lines: int) -> Answers:
        """Let one write until it has printed so many lines, kill it; the last word per token."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write("go\n")
        self._parent.stdin.flush()
        _, pid = self._parent.stdout.readline().split()
        printed = []
        for _ in range(lines):
            printed.append(self._parent.stdout.readline())
            if printed[-1] == "ended\n":
                self._complaints.seek(0)
                pytest.fail(f"it ended before it was killed: {self._complaints.read()}")
        os.kill(int(pid), signal.SIGKILL)
        while printed[-1] != "ended\n":  # what it had answered before the kill arrived
            printed.append(self._parent.stdout.readline())
        return {token: word for word, token in (line.split() for line in printed[:-1])}


async def lost(make_engine: MakeEngine, answers: Answers) -> list[str]:
    """What a restarted process says of the keys otherwise than was answered."""
    engine = make_engine()
    await engine.start()
    wrong = []
    for token, word in answers.items():
        decision = await engine.authenticate([b"Bearer " + token.encode()])
        answer = "created" if isinstance(decision, Allow) else decision.reason.name.lower()
        if answer not in ((word,) if word != "revoking" else ("created", "revoked")):
            wrong.append(f"{word}, then {answer}")
    await engine.stop()
    return wrong


@pytest.mark.anyio
@pytest.mark.timeout(7_200)
async def test_what_was_answered_survives_kill_9_on_sqlite(
    store_url: str, make_engine: MakeEngine, times: Times
) -> None:
    """Killed anywhere, again and again, on one file: no answered create or revoke is lost."""
    await kill_again_and_again(store_url, make_engine, times(4, 1_000), times(100, 100_000))
    with contextlib.closing(sqlite3.connect(store_url.removeprefix("sqlite:///"))) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.anyio
@pytest.mark.timeout(7_200)
async def test_what_was_answered_survives_kill_9_on_postgresql(
    postgres: PostgresServer, make_engine: MakeEngine, times: Times
) -> None:
    """The same there; who was killed and held a lease costs one revoke the length of it."""
    url = postgres.new_database()

    def make() -> Engine:
        return make_engine(store=Store(url), lease=LEASE)

    await kill_again_and_again(url, make, times(3, 1_000), times(100, 100_000))


async def kill_again_and_again(
    store_url: str, make_engine: MakeEngine, kills: int, revokes: int
) -> None:
    """So many processes, one after the other, and at least so many answered revokes in all."""
    chosen = random.Random(9)
    revoked = 0
    with Writers(store_url) as writers:
        for _ in track(range(kills), "killing", console=Console(stderr=True)):
            answers = writers.killed_after(chosen.randint(1, 850))
            assert await lost(make_engine, answers) == []
            revoked += sum(word == "revoked" for word in answers.values())
    print(f"{kills:,} kills, {revoked:,} answered revokes")
    assert revoked >= revokes


@pytest.mark.anyio
async def test_a_twin_that_answers_before_it_commits_is_caught(
    store_url: str, make_engine: MakeEngine
) -> None:
    """The same kill and the same checks find what a hasty process lost."""
    with Writers(store_url, "hasty") as writers:
        assert await lost(make_engine, writers.killed_after(50)) != []
