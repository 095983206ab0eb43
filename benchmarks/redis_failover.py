"""How long Redis is missing after a failover: python benchmarks/redis_failover.py [ROUNDS]

Two processes share values and notices 50 times a second while the primary of a Sentinel deployment,
then the node of a Cluster that holds their names, is killed, and in the next round paused. Each row
has the medians and the maxima, in seconds: from the fault to the promotion of the replica, which is
the time that Sentinel or the Cluster takes; and from the promotion until both processes read each
other's values, and until both receive each other's notices, which is keylatch's own part.
"""

import asyncio
import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import redis

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.caches.test_redis_shapes import Process, processes
from tests.support.redis_servers import ClusterDeployment, SentinelDeployment
from tests.support.servers import RedisServer

from keylatch.caches.redis_client import name_in_redis

PERIOD_SECONDS = 0.02
LIMIT_SECONDS = 60


class Promotion(threading.Thread):
    """Notes when one of the replicas is a primary."""

    def __init__(self, replicas: list[RedisServer]) -> None:
        super().__init__(daemon=True)
        self._replicas = replicas
        self.at = 0.0

    def run(self) -> None:
        while not self.at:
            if any(is_primary(each) for each in self._replicas):
                self.at = time.monotonic()
            time.sleep(0.01)


def is_primary(server: RedisServer) -> bool:
    with contextlib.suppress(redis.RedisError), server.client() as client:
        return bool(client.execute_command("ROLE")[0] == b"master")
    return False


async def share(one: Process, other: Process, number: int) -> bool:
    """Whether one process reads what the other has written."""
    value = b"%d" % number
    return await one.put(value) and await other.get(value)


async def first(condition: Callable[[int], Awaitable[bool]]) -> float:
    """When the condition was first true."""
    async with asyncio.timeout(LIMIT_SECONDS):
        number = 0
        while True:
            number += 1
            if await condition(number):
                return time.monotonic()
            await asyncio.sleep(PERIOD_SECONDS)


async def round_of(shape: str, fault: str, folder: Path) -> tuple[float, float, float]:
    """Seconds from the fault to the promotion, and from it to values and to notices."""
    deployment = (
        SentinelDeployment(folder) if shape == "sentinel" else ClusterDeployment(folder, replicas=1)
    )
    try:
        async with processes(deployment.url) as (one, other):
            await first(lambda number: share(one, other, number))
            await first(lambda _: are_notified(one, other))
            if isinstance(deployment, SentinelDeployment):
                old, servers = deployment.primary(), deployment.servers
            else:
                old, servers = deployment.owner_of(name_in_redis("epoch", "name")), deployment.nodes
            promotion = Promotion([each for each in servers if not is_primary(each)])
            getattr(old, fault)()
            began = time.monotonic()
            promotion.start()
            values, notified = await asyncio.gather(
                # Before the promotion no SET can succeed, so a success is one of the new primary.
                first(lambda number: share(one, other, number)),
                first(lambda _: are_notified(one, other)),
            )
            await asyncio.to_thread(promotion.join)
            return promotion.at - began, values - promotion.at, notified - promotion.at
    finally:
        deployment.kill()


async def are_notified(one: Process, other: Process) -> bool:
    """Whether both receive notices of each other."""
    before = (one.received, other.received)
    for _ in range(3):
        await one.notifier.publish(None)
        await other.notifier.publish(None)
    await asyncio.sleep(PERIOD_SECONDS)
    came = (one.received - before[0], other.received - before[1])
    return min(came) >= 4  # of 6; a new subscription brings one itself


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{'':18}{'promoted':>16}{'then values':>16}{'then notices':>16}")
    for shape in ("sentinel", "cluster"):
        for fault in ("kill", "pause"):
            found = []
            for _ in range(rounds):
                with tempfile.TemporaryDirectory() as folder:
                    found.append(asyncio.run(round_of(shape, fault, Path(folder))))
            cells = [
                f"{statistics.median(each):6.2f} {max(each):6.2f}"
                for each in zip(*found, strict=True)
            ]
            print(f"{shape:10}{fault:8}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
