"""A process that checks keys again and again and reports facts, whatever it is that it checks with.

`worker` and `naive` say with what. Only facts are kept, key by key, since the last report:

    [key, accepted, refused, undecided, latest START of accepted, earliest END of refused]

A report leaves every quarter of a second, so a process that is killed takes little with it. Checks
are not queued behind each other: one that has to wait is left waiting, and the next key is checked.
"""

import asyncio
import gc
import os
import signal
import time
from collections import Counter
from typing import Any, Final, Protocol

from channel import Channel

REFUSED, ACCEPTED, UNDECIDED = range(3)

_PAUSE_SECONDS: Final = 0.02
_REPORT_SECONDS: Final = 0.25
_WAITING_PER_KEY: Final = 2
BUCKET_NS: Final = 100_000_000

Fact = list[int]


class Subject(Protocol):
    """What is under test."""

    async def start(self) -> None:
        """Open what it needs."""

    async def stop(self) -> None:
        """Let it go."""

    def check_cached(self, token: str) -> int | None:
        """The outcome of a check that need not wait; None: it has to."""

    async def check(self, token: str) -> int:
        """The outcome of a check that needs I/O."""

    def after_fork_in_child(self) -> None:
        """This is the child now."""


class Checker:
    """The checks of one process.

    Args:
        subject: checks.
        path: the run's socket file.
        side: `keylatch` or `naive`.
        name: of this process.
    """

    def __init__(self, subject: Subject, path: str, side: str, name: str) -> None:
        self._subject = subject
        self._path = path
        self._hello = {"role": "checker", "side": side, "name": name}
        self._tokens: dict[str, str] = {}
        self._reset()

    def _reset(self) -> None:
        self._facts: dict[str, Fact] = {}
        self._undecided: Counter[int] = Counter()
        self._waiting: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []

    def run(self) -> None:
        """Check until the end message, and fork on a fork message."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(self._begin())
        # The loop stands still while the process forks, as it does in a server that forks.
        while seconds := loop.run_until_complete(self._until_fork()):
            gc.collect()
            if os.fork() == 0:
                try:
                    asyncio.new_event_loop().run_until_complete(self._run_child(seconds))
                finally:
                    os._exit(0)  # the parent's loop and sockets must not be tidied up here
        loop.run_until_complete(self._finish())

    async def _run_child(self, seconds: float) -> None:
        self._reset()
        self._subject.after_fork_in_child()
        self._hello["name"] += f"/{os.getpid()}"
        async with asyncio.timeout(seconds + 20):
            await self._begin()
            await asyncio.sleep(seconds)
            await self._finish()

    async def _begin(self) -> None:
        self._forks: asyncio.Queue[float] = asyncio.Queue()
        self._channel = await Channel.connect(self._path, **self._hello)
        await self._subject.start()
        work = [self._run_commands(), self._sweep(), self._report_loop()]
        self._loops = [asyncio.create_task(each) for each in work]

    async def _until_fork(self) -> float:
        """How long the child shall live; 0: no more forks, the end."""
        return await self._forks.get()

    async def _finish(self) -> None:
        for task in [*self._loops, *self._tasks]:
            task.cancel()
        await asyncio.wait([*self._loops, *self._tasks])
        self._report()
        await self._channel.close()
        await self._subject.stop()

    async def _run_commands(self) -> None:
        while (command := await self._channel.receive()) is not None:
            match command["do"]:
                case "add":
                    self._tokens.update(command["keys"])
                case "drop":
                    self._tokens.pop(command["key"], None)
                case "block":
                    time.sleep(command["seconds"])  # noqa: ASYNC251 - this is the fault
                case "fork":
                    self._forks.put_nowait(command["seconds"])
                case "end":
                    break
        self._forks.put_nowait(0)

    # Checking

    async def _sweep(self) -> None:
        check_cached, now = self._subject.check_cached, time.monotonic_ns
        while True:
            for key, token in list(self._tokens.items()):
                start = now()
                outcome = check_cached(token)
                if outcome is not None:
                    self._record(key, start, now(), outcome)
                elif self._waiting.get(key, 0) < _WAITING_PER_KEY:
                    self._waiting[key] = self._waiting.get(key, 0) + 1
                    task = asyncio.create_task(self._check(key, token, start))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _check(self, key: str, token: str, start: int) -> None:
        try:
            outcome = await self._subject.check(token)
            self._record(key, start, time.monotonic_ns(), outcome)
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]

    def _record(self, key: str, start: int, end: int, outcome: int) -> None:
        fact = self._facts.get(key)
        if fact is None:
            fact = self._facts[key] = [0, 0, 0, 0, 0]
        if outcome == ACCEPTED:
            fact[0] += 1
            if start > fact[3]:
                fact[3] = start
        elif outcome == REFUSED:
            fact[1] += 1
            if not fact[4]:  # they are noted in the order of their ends
                fact[4] = end
        else:
            fact[2] += 1
            self._undecided[start // BUCKET_NS] += 1

    async def _report_loop(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            self._report()

    def _report(self) -> None:
        facts, self._facts = self._facts, {}
        undecided, self._undecided = self._undecided, Counter()
        rows: list[list[Any]] = [[key, *fact] for key, fact in facts.items()]
        self._channel.send(facts=rows, undecided=list(undecided.items()))
