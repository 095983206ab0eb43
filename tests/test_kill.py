"""kill -9 amid creates and revokes: what was answered is true after a restart."""

import contextlib
import random
import sqlite3
import subprocess
import sys

import pytest

import worker_writes
from conftest import MakeEngine
from keylatch.model import Allow

Answers = dict[str, str]


def killed_after(store_url: str, lines: int, kind: str = "sound") -> Answers:
    """Let a process write until it has printed so many lines, kill it; the last word per token."""
    process = subprocess.Popen(
        [sys.executable, worker_writes.__file__, store_url, "1000", kind],
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
async def test_what_was_answered_survives_kill_9(store_url: str, make_engine: MakeEngine) -> None:
    """Four rounds on one file, killed anywhere: no answered create or revoke is lost."""
    answers: Answers = {}
    for lines in random.Random(9).sample(range(1, 500), 4):
        answers |= killed_after(store_url, lines)
        assert await lost(make_engine, answers) == []
    assert {"created", "revoked"} <= set(answers.values())
    with contextlib.closing(sqlite3.connect(store_url.removeprefix("sqlite:///"))) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.anyio
async def test_a_twin_that_answers_before_it_commits_is_caught(
    store_url: str, make_engine: MakeEngine
) -> None:
    """The same kill and the same questions find what a hasty process lost."""
    assert await lost(make_engine, killed_after(store_url, 50, "hasty")) != []
