"""G1, with real processes: what SQLite has committed as revoked, no process accepts any more."""

import asyncio
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from keylatch.engine import Engine
from keylatch.errors import StoreUnavailable
from keylatch.management.keyring import Keyring
from keylatch.settings import Settings
from tests.support import worker_checks
from tests.support.engines import Times
from tests.support.worker_checks import ACCEPTED, REFUSED

pytestmark = pytest.mark.long

PROCESSES = 4
Moments = dict[int, int]


@dataclass
class Findings:
    """What the judge says of all checks of one process."""

    accepted_after: list[int] = field(default_factory=list)
    refused_before: list[int] = field(default_factory=list)
    checks: int = 0
    undecided: int = 0
    seen_accepted: set[int] = field(default_factory=set)
    seen_refused: set[int] = field(default_factory=set)


def judge(checks: "array[int]", requested: Moments, answered: Moments) -> Findings:
    """An acceptance counts by the request's start, a refusal by its end: no doubt is left."""
    found = Findings()
    numbers = iter(checks)
    for key, start, end, outcome in zip(numbers, numbers, numbers, numbers, strict=True):
        found.checks += 1
        if outcome == ACCEPTED:
            if start > answered[key]:
                found.accepted_after.append(key)
            elif end < requested[key]:
                found.seen_accepted.add(key)
        elif outcome == REFUSED:
            if end < requested[key]:
                found.refused_before.append(key)
            elif start > answered[key]:
                found.seen_refused.add(key)
        else:
            found.undecided += 1
    return found


class Checkers:
    """Processes that check the same keys again and again."""

    def __init__(self, store: str, variant: str, folder: Path, tokens: list[str]) -> None:
        self._logs = [folder / f"{number}.log" for number in range(PROCESSES)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, worker_checks.__file__, store, log, variant],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for log in self._logs
        ]
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n".join(tokens))
            process.stdin.close()

    def wait_until_ready(self) -> None:
        """Return once every process has accepted every key."""
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

    def finish(self) -> "list[array[int]]":
        """Stop the processes after one more look at every key, and return their logs."""
        for process in self.processes:
            process.terminate()
        logs = []
        for process, log in zip(self.processes, self._logs, strict=True):
            assert process.wait() == 0
            logs.append(array("q", log.read_bytes()))
        return logs

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


async def delete(keyring: Keyring, key_id: str) -> None:
    """Revoke a key, again where a frozen process holds the lock of the store: that is a 503."""
    while True:
        with suppress(StoreUnavailable):
            await keyring.delete("org", key_id)
            return


async def revoke_under_load(
    store: str,
    variant: str,
    folder: Path,
    keys: int,
    meanwhile: Callable[[int, Checkers], None] = lambda number, checkers: None,
) -> list[Findings]:
    """Revoke so many keys while four processes check them; what the judge says of each process."""
    engine = Engine(Settings.load(store=store, redis="", hasher="sha256"))
    await engine.start()
    keyring = await engine.keyring()
    created = await asyncio.gather(*(keyring.create("org", f"key {n}") for n in range(keys)))
    requested, answered = {}, {}
    with ExitStack() as stack:
        checkers = Checkers(store, variant, folder, [key.token.reveal() for key in created])
        stack.callback(checkers.kill)
        await asyncio.to_thread(checkers.wait_until_ready)
        for number, key in enumerate(created):
            meanwhile(number, checkers)
            requested[number] = time.monotonic_ns()
            await delete(keyring, key.record.id)
            answered[number] = time.monotonic_ns()
        logs = await asyncio.to_thread(checkers.finish)
    await engine.stop()
    return [judge(log, requested, answered) for log in logs]


@pytest.mark.anyio
@pytest.mark.timeout(3_600)
async def test_no_process_accepts_a_key_after_its_delete_was_answered(
    store_url: str, tmp_path: Path, times: Times
) -> None:
    """1,000 revokes, four processes checking, one of them frozen for a while: none slips by."""

    def freeze_one(number: int, checkers: Checkers) -> None:
        if number == 300:
            frozen = checkers.processes[0]
            frozen.send_signal(signal.SIGSTOP)
            # By time and not by number: it may hold the lock that the next revoke waits for.
            asyncio.get_running_loop().call_later(1, frozen.send_signal, signal.SIGCONT)

    every_key = set(range(1_000))
    rounds = checks = 0
    while rounds < times(1, 10) or checks < times(1, 10_000_000):
        rounds += 1
        for found in await revoke_under_load(store_url, "sound", tmp_path, 1_000, freeze_one):
            assert found.accepted_after == []
            assert found.refused_before == []
            assert found.undecided == 0
            assert found.seen_accepted == every_key
            assert found.seen_refused == every_key
            checks += found.checks
    print(f"{rounds},000 revokes, {checks:,} checks")


@pytest.mark.anyio
@pytest.mark.parametrize("variant", ["always-fresh", "never-invalidated"])
async def test_the_judge_catches_a_broken_twin(
    store_url: str, tmp_path: Path, variant: str
) -> None:
    """Without reading the sequence number, or without the tombstones, every process is caught."""
    for found in await revoke_under_load(store_url, variant, tmp_path, 20):
        assert found.accepted_after != []
        assert found.refused_before == []
