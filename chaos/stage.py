"""All that a run starts: Redis, PostgreSQL, and processes of both sides with their own lines."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import naive
from cluster import PostgresCluster
from hub import Hub
from proxy import Proxy
from services import PostgresService, RedisService

HERE: Final = Path(__file__).parent
SIDES: Final = {"keylatch": "worker.py", "naive": "naive.py"}
_PATIENCE_SECONDS: Final = 20.0
_UNEXPECTED: Final = (
    "a background task failed",
    "Task exception was never",
    "Exception in callback",
    "Fatal Python error",
)


@dataclass
class Slot:
    """Where a process of one side runs; its lines stay when the process is replaced."""

    side: str
    name: str
    store: Proxy
    redis: Proxy
    process: "subprocess.Popen[bytes] | None" = None
    generation: int = 0

    @property
    def process_name(self) -> str:
        """The present process, as the hub calls it."""
        return f"{self.side} {self.name}#{self.generation}"

    def signal(self, number: int) -> None:
        """Send the present process a signal."""
        if self.process is not None:
            self.process.send_signal(number)


class Deployment:
    """The services, and the places of all processes.

    Args:
        folder: a temporary one.
        workers: processes that check, on each side.
        revokers: processes that revoke, on each side.
        lease_seconds: X.
        seed: of what the revokers do.
        nodes: of PostgreSQL.
    """

    def __init__(
        self,
        folder: Path,
        workers: int,
        revokers: int,
        lease_seconds: float,
        seed: int,
        nodes: int = 1,
    ) -> None:
        self.folder = folder
        self.hub = Hub(folder / "hub", int(lease_seconds * 1e9))
        self._lease = lease_seconds
        self._seed = seed
        self._nodes = nodes
        self._counts = {"worker": workers, "revoker": revokers}
        self.slots: list[Slot] = []
        self._forgotten: set[int] = set()

    async def set_up(self) -> None:
        """Start everything; return once every worker is at work.

        Raises:
            ProgramMissing: there is no Redis or no PostgreSQL.
        """
        self.redis = RedisService(self.folder)
        self.cluster = PostgresCluster(self.folder, self._nodes)
        await self.redis.start()
        await self.cluster.make()
        for side in SIDES:
            await self.postgres.create(side)
        async with await self.postgres.connect("naive") as connection:
            await connection.execute(naive.TABLE.encode())
        await self.hub.start()
        for side in SIDES:
            for role, count in self._counts.items():
                for number in range(count):
                    slot = Slot(
                        side, f"{role}-{number}", Proxy(self.postgres.port), Proxy(self.redis.port)
                    )
                    await slot.store.start()
                    await slot.redis.start()
                    self.slots.append(slot)
                    self.start_process(slot)
        for slot in self.slots:
            await self.wait_until_connected(slot)

    async def tear_down(self) -> None:
        """Stop everything that was started, by pid."""
        for slot in self.slots:
            if slot.process is not None:
                slot.signal(signal.SIGKILL)
                slot.process.wait()
            with contextlib.suppress(AttributeError):  # it never started
                await slot.store.stop()
                await slot.redis.stop()
        for pid in self.hub.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # the children of those above
        if hasattr(self, "redis"):
            self.redis.resume()
            self.redis.kill()
        if hasattr(self, "cluster"):
            await self.cluster.remove()

    async def end(self) -> None:
        """Send the end message to all processes, revokers first, and wait until they have."""
        for role in "revoker", "worker":
            leaving = self.slots_of(role)
            for slot in leaving:
                self.hub.send_command(slot.process_name, "end")
            waiting = [asyncio.create_task(self._wait_until_exited(place)) for place in leaving]
            await asyncio.wait(waiting, timeout=_PATIENCE_SECONDS)
            for task in waiting:
                task.cancel()
            if role == "revoker":
                await asyncio.sleep(self._lease + 1)  # what was revoked last is checked too

    async def _wait_until_exited(self, slot: Slot) -> None:
        while slot.process is not None and slot.process.poll() is None:
            await asyncio.sleep(0.02)

    @property
    def postgres(self) -> PostgresService:
        """The primary."""
        return self.cluster.primary

    def lead_to_primary(self, *slots: Slot) -> None:
        """Connections of these slots (none: of all) are reset; new ones go to the primary."""
        for slot in slots or self.slots:
            slot.store.lead_to(self.postgres.port)
            slot.store.reset_connections()

    # Processes

    def slots_of(self, role: str, number: int | None = None) -> list[Slot]:
        """The places of a role on both sides: all of them, or one on each side."""
        if number is None:
            return [place for place in self.slots if place.name.startswith(role)]
        name = f"{role}-{number % self._counts[role]}"
        return [place for place in self.slots if place.name == name]

    def start_process(self, slot: Slot) -> None:
        """Start a process in a place."""
        slot.generation += 1
        role, number = slot.name.split("-")
        arguments = [
            str(HERE / SIDES[slot.side]),
            "check" if role == "worker" else "revoke",
            f"postgresql://postgres@127.0.0.1:{slot.store.port}/{slot.side}",
            f"redis://127.0.0.1:{slot.redis.port}/0",
            *([str(self._lease)] if slot.side == "keylatch" else []),
            self.hub.path,
            f"{slot.name}#{slot.generation}",
            *([str(self._seed + int(number))] if role == "revoker" else []),
        ]
        with (self.folder / f"{slot.side}-{slot.name}.log").open("ab") as log:
            slot.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", *arguments],
                env=_without_settings(),
                stderr=log,
                start_new_session=True,
            )

    async def wait_until_connected(self, slot: Slot) -> None:
        """Return once the process in this place has said hello."""
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while slot.process_name not in self.hub.pids:
                await asyncio.sleep(0.02)

    def kill(self, slot: Slot) -> None:
        """kill -9."""
        if slot.process is not None:
            slot.process.kill()
            slot.process.wait()

    def crashes(self) -> list[str]:
        """Unexpected output of our processes, and processes that ended by themselves."""
        found = [
            f"{log.stem}: {line}"
            for log in sorted(self.folder.glob("keylatch-*.log"))
            for line in log.read_text(errors="replace").splitlines()
            if line.startswith(_UNEXPECTED)
        ]
        for slot in self.slots:
            if slot.process is not None and slot.process.poll() not in (None, 0):
                found.append(f"{slot.process_name}: exit {slot.process.returncode}")
        return found


def _without_settings() -> dict[str, str]:
    """The environment without what would configure keylatch."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KEYLATCH_")}
