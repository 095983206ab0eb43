"""Processes to be killed: each creates and revokes keys, and says so after each answer.

    python worker_writes.py STORE WRITES sound|hasty

For every line of its input it forks one, which saves the second that imports take. That prints
`pid PID`, then `created TOKEN` and `revoked TOKEN` after the answer, and `revoking TOKEN` before
the call, from when on the outcome is unknown; two of three keys are revoked. When it has ended, the
parent prints `ended`.
"""

import asyncio
import os
import sys
from collections.abc import Mapping
from typing import Any

from keylatch.core.decisions import KeyRecord
from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch.storage.authorization import OPERATOR, Actor
from keylatch.storage.store import Store


class HastyStore(Store):
    """A broken twin: answers at once and writes a moment later."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._add, self._change = self.keys.add, self.keys.change
        self.keys.add = self.add  # type: ignore[method-assign]
        self.keys.change = self.change  # type: ignore[method-assign]

    async def add(
        self, record: KeyRecord, hashed: str, *, by: Actor = OPERATOR
    ) -> tuple[KeyRecord, int]:
        self._in_a_moment(self._add(record, hashed))
        return record, 0

    async def change(
        self,
        organization_id: str,
        key_id: str,
        now_ms: int,
        values: Mapping[str, Any],
        *,
        by: Actor = OPERATOR,
    ) -> None:
        self._in_a_moment(self._change(organization_id, key_id, now_ms, values))

    def _in_a_moment(self, work: Any) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.2, lambda: tasks.append(loop.create_task(work)))


tasks: list[asyncio.Task[Any]] = []


def say(*words: str) -> None:
    """A line in one system call: `print` takes several, and would be killed between them."""
    os.write(sys.stdout.fileno(), " ".join(words).encode() + b"\n")


async def write(engine: Engine, writes: int) -> None:
    """Create and revoke for four clients at a time, as a server does."""
    await engine.start()
    keyring = await engine.keyring()
    numbers = iter(range(writes))

    async def client() -> None:
        for number in numbers:
            created = await keyring.create("org", f"key {number}")
            say("created", created.token.reveal())
            if number % 3:
                say("revoking", created.token.reveal())
                await keyring.delete("org", created.record.id)
                say("revoked", created.token.reveal())

    await asyncio.gather(*(client() for _ in range(4)))
    await engine.stop()


def main(store: str, writes: int, kind: str) -> None:
    """One of them."""
    say("pid", str(os.getpid()))
    engine = Engine(Settings.load(store=store, redis="", hasher="sha256"))
    if kind == "hasty":
        engine.store = HastyStore(store)
    asyncio.run(write(engine, writes))


if __name__ == "__main__":
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
            os._exit(0)
        os.waitpid(child, 0)
        say("ended")
