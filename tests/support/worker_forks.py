"""A process with a started engine that forks, as servers do that load the app first.

    python worker_forks.py STORE REDIS PARENT_FD CHILD_FD

Parent and child execute commands from sockets of their own: a line of JSON with the name
of a command and its argument, answered by a line of JSON.
"""

import asyncio
import json
import os
import socket
import sys
from typing import Any

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.core.decisions import Allow
from keylatch.engine import Engine
from keylatch.settings import Settings


class Process:
    """One of the two, with an event loop of its own."""

    def __init__(self, engine: Engine, child_fd: int) -> None:
        self._engine = engine
        self._child_fd = child_fd
        self._loop = asyncio.new_event_loop()

    def run_commands(self, fd: int) -> None:
        """Execute commands until the socket is closed."""
        with socket.socket(fileno=fd) as orders, orders.makefile("rw") as lines:
            for line in lines:
                command, argument = json.loads(line)
                answer = self._loop.run_until_complete(getattr(self, command)(argument))
                lines.write(json.dumps(answer) + "\n")
                lines.flush()

    async def create(self, name: str) -> list[str]:
        created = await (await self._engine.keyring()).create("org", name)
        return [created.record.id, created.token.reveal()]

    async def revoke(self, key_id: str) -> None:
        await (await self._engine.keyring()).delete("org", key_id)

    async def check(self, token: str) -> str:
        decision = await self._engine.authenticate([b"Bearer " + token.encode()])
        return "accepted" if isinstance(decision, Allow) else decision.reason.name

    async def was_used(self, key_id: str) -> bool:
        """Whether the store knows of a use."""
        record = await self._engine.store.keys.get("org", key_id)
        return record is not None and record.last_used is not None

    async def allowed(self, key_id: str) -> int:
        """How many accepted requests of the key the store has."""
        found = await self._engine.store.usage.of_key("org", key_id, 0)
        return sum(day.allowed for day in found.days) if found else 0

    async def stop(self, _: Any) -> None:
        await self._engine.stop()

    async def fork(self, _: Any) -> int:
        pid = os.fork()
        if not pid:
            Process(self._engine, -1).run_commands(self._child_fd)
            os._exit(0)
        return pid

    async def fork_amid_writes(self, writes: int) -> int:
        """Fork at a moment when other threads are writing."""
        creates = [asyncio.create_task(self.create("amid")) for _ in range(writes)]
        await asyncio.wait(creates, return_when=asyncio.FIRST_COMPLETED)
        pid = await self.fork(None)
        await asyncio.gather(*creates)
        return pid


if __name__ == "__main__":
    store, redis, parent_fd, child_fd = sys.argv[1:]
    # argon2id, or Redis would never be used.
    engine = Engine(Settings.load(store=store, redis=redis), hasher=Hasher("argon2id", CHEAPEST))
    Process(engine, int(child_fd)).run_commands(int(parent_fd))
