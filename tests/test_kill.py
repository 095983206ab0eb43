"""kill -9 amid creates and revokes: what was answered is true after a restart."""

import contextlib
import os
import random
import sqlite3
import subprocess
import sys

import pytest

import worker_writes
from conftest import MakeEngine, Times
from keylatch.engine import Engine
from keylatch.model import Allow
from keylatch.store import Store
from servers import PostgresServer

Answers = dict[str, str]
LEASE = 0.2


def killed_after(store_url: str, lines: int, kind: str = "sound") -> Answers:
    """Let a process write until it has printed so many lines, kill it; the last word per token."""
    process = subprocess.Popen(
        [sys.executable, worker_writes.__file__, store_url, "1000", kind],
        env={**os.environ, "KEYLATCH_LEASE": str(LEASE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        printed += process.stdout.readlines()  # what it had answered before the kill arrived
    words = (line.split() for line in printed if line.endswith("\n"))
    return {token: word for word, token in words}


async def lost(make_engine: MakeEngine, answers: Answers) -> list[str]:
    """What a restarted process says of the keys otherwise than was answered."""
    engine = make_engine()
    await engine.start()
    wrong = []
    for token, word in answers.items():
        verdict = await engine.check([b"Bearer " + token.encode()])
        answer = "created" if isinstance(verdict, Allow) else verdict.reason.name.lower()
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
    answers: Answers = {}
    for _ in range(kills):
        answers = killed_after(store_url, chosen.randint(1, 850))
        assert await lost(make_engine, answers) == []
        revoked += sum(word == "revoked" for word in answers.values())
    assert revoked >= revokes


@pytest.mark.anyio
async def test_a_twin_that_answers_before_it_commits_is_caught(
    store_url: str, make_engine: MakeEngine
) -> None:
    """The same kill and the same questions find what a hasty process lost."""
    assert await lost(make_engine, killed_after(store_url, 50, "hasty")) != []
