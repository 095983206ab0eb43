"""The faults: one function for each kind.

Each returns when the fault is over. What falls on a place falls on both sides: on the worker with
keylatch and on its naive twin. Faults of one server or one process wait for each other.
"""

import asyncio
import contextlib
import signal
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Final

import psycopg
from redis.exceptions import RedisError

from judge import Interval
from schedule import Fault
from stage import Deployment, Slot

Apply = Callable[[Deployment, Fault], Awaitable[None]]

_SLOWEST_SECONDS: Final = 0.2
_SLOW_BLOCK_SECONDS: Final = 0.05
_SPLIT_IN_FAULTS: Final = 3


async def redis_paused(deployment: Deployment, fault: Fault) -> None:
    """SIGSTOP, later SIGCONT."""
    deployment.redis.pause()
    try:
        await asyncio.sleep(fault.seconds)
    finally:
        deployment.redis.resume()


async def redis_killed(deployment: Deployment, fault: Fault) -> None:
    """SIGKILL; it comes back empty."""
    deployment.redis.kill()
    await asyncio.sleep(fault.seconds)
    await deployment.redis.start()


async def redis_flushed(deployment: Deployment, fault: Fault) -> None:
    """FLUSHALL."""
    async with deployment.redis.client() as client:
        await client.flushall()


async def redis_restored(deployment: Deployment, fault: Fault) -> None:
    """All values are copied, and put back later, over what was revoked in the meantime."""
    async with deployment.redis.client() as client:
        names = await client.keys("*")
        values = await client.mget(names) if names else []
        await asyncio.sleep(2 * fault.seconds)
        async with client.pipeline(transaction=False) as pipeline:
            pipeline.flushall()
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    pipeline.set(name, value, ex=60)
            await pipeline.execute()


async def redis_connections_killed(deployment: Deployment, fault: Fault) -> None:
    """CLIENT KILL of every subscriber and every other client."""
    async with deployment.redis.client() as client:
        for kind in "pubsub", "normal":
            await client.client_kill_filter(_type=kind)


async def redis_slow(deployment: Deployment, fault: Fault) -> None:
    """Every answer comes up to 0.2 s late, for all clients."""
    delay = _SLOWEST_SECONDS * (fault.target % 100 + 1) / 100
    with ExitStack() as stack:
        for place in deployment.slots:
            stack.enter_context(place.redis.slow(delay))
        await asyncio.sleep(fault.seconds)


async def worker_cut_from_redis(deployment: Deployment, fault: Fault) -> None:
    """Drops what Redis sends to a worker: notices are lost, and the connection stays up."""
    with _apply_all(
        place.redis.blackholing() for place in deployment.slots_of("worker", fault.target)
    ):
        await asyncio.sleep(fault.seconds)


async def revoker_cut_from_redis(deployment: Deployment, fault: Fault) -> None:
    """A revoker's connections to Redis are reset, and so is every new one."""
    with _apply_all(
        place.redis.resetting() for place in deployment.slots_of("revoker", fault.target)
    ):
        await asyncio.sleep(fault.seconds)


async def store_blackholed(deployment: Deployment, fault: Fault) -> None:
    """Between a worker and the store bytes vanish; connections that lost some stay dead."""
    with _apply_all(
        place.store.blackholing() for place in deployment.slots_of("worker", fault.target)
    ):
        await asyncio.sleep(fault.seconds)


async def store_held(deployment: Deployment, fault: Fault) -> None:
    """Between a worker and the store bytes are held, and arrive late."""
    with _apply_all(place.store.held() for place in deployment.slots_of("worker", fault.target)):
        await asyncio.sleep(fault.seconds)


async def store_cut(deployment: Deployment, fault: Fault) -> None:
    """A worker's connections to the store are reset, and so is every new one."""
    with _apply_all(
        place.store.resetting() for place in deployment.slots_of("worker", fault.target)
    ):
        await asyncio.sleep(fault.seconds)


async def store_sessions_terminated(deployment: Deployment, fault: Fault) -> None:
    """pg_terminate_backend of all sessions."""
    await deployment.postgres.terminate_sessions()


async def store_restarted(deployment: Deployment, fault: Fault) -> None:
    """SIGQUIT, as in a crash; then recovery."""
    await deployment.postgres.crash()
    await deployment.postgres.start()
    await deployment.cluster.wait_for_standby()


async def store_failed_over(deployment: Deployment, fault: Fault) -> None:
    """The primary is killed, and its synchronous standby, which has every commit, takes over."""
    cluster = deployment.cluster
    await cluster.primary.crash()
    await asyncio.sleep(fault.seconds)
    await cluster.promote()
    deployment.lead_to_primary()
    await cluster.rebuild_standbys()


async def store_split(deployment: Deployment, fault: Fault) -> None:
    """The synchronous standby takes over while the old primary lives on, with one worker: Patroni
    was killed, and the worker's connections were not."""
    cluster = deployment.cluster
    left_behind = deployment.slots_of("worker", fault.target)
    await cluster.promote()
    deployment.hub.note_split(time.monotonic_ns())
    deployment.lead_to_primary(*(slot for slot in deployment.slots if slot not in left_behind))
    await asyncio.sleep(_SPLIT_IN_FAULTS * fault.seconds)
    deployment.lead_to_primary(*left_behind)
    await cluster.rebuild_standbys()


async def store_lost_commits(deployment: Deployment, fault: Fault) -> None:
    """Replication is asynchronous, and late: the standby that takes over lacks the last commits."""
    cluster = deployment.cluster
    began = time.monotonic_ns()  # from here on a commit may be missing there
    await cluster.stop_waiting()
    await cluster.cut_standby()
    await asyncio.sleep(fault.seconds)
    await cluster.primary.crash()
    await cluster.promote()
    deployment.hub.note_loss(began, time.monotonic_ns())
    deployment.lead_to_primary()
    await cluster.rebuild_standbys()


async def revoker_cut_from_store(deployment: Deployment, fault: Fault) -> None:
    """A revoker's line to the store swallows, or is reset."""
    lines = [place.store for place in deployment.slots_of("revoker", fault.target)]
    swallows = fault.target // 2 % 2
    with _apply_all(line.blackholing() if swallows else line.resetting() for line in lines):
        await asyncio.sleep(fault.seconds)


async def worker_stopped(deployment: Deployment, fault: Fault) -> None:
    """SIGSTOP, later SIGCONT."""
    places = deployment.slots_of("worker", fault.target)
    for place in places:
        place.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.seconds)
    finally:
        for place in places:
            place.signal(signal.SIGCONT)


async def worker_killed(deployment: Deployment, fault: Fault) -> None:
    """SIGKILL; another process takes the place."""
    places = deployment.slots_of("worker", fault.target)
    for place in places:
        deployment.kill(place)
    for place in places:
        deployment.start_process(place)
    for place in places:
        await deployment.wait_until_connected(place)


async def loop_blocked(deployment: Deployment, fault: Fault) -> None:
    """A worker's event loop stands still."""
    await _send_command(deployment, fault, "block")


async def worker_forked(deployment: Deployment, fault: Fault) -> None:
    """A worker forks in the middle of everything; the child checks too, and ends."""
    await _send_command(deployment, fault, "fork")


async def _send_command(deployment: Deployment, fault: Fault, command: str) -> None:
    for place in deployment.slots_of("worker", fault.target):
        deployment.hub.send_command(place.process_name, command, seconds=fault.seconds)
    await asyncio.sleep(fault.seconds + _SLOW_BLOCK_SECONDS)


@contextlib.contextmanager
def _apply_all(faults: "Iterator[contextlib.AbstractContextManager[None]]") -> Iterator[None]:
    with ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault)
        yield


FAULTS: Final[dict[str, tuple[Apply, str, str]]] = {
    "redis paused": (redis_paused, "redis", ""),
    "redis killed, comes back empty": (redis_killed, "redis", ""),
    "redis flushed": (redis_flushed, "redis", ""),
    "redis restored from a backup": (redis_restored, "redis", ""),
    "redis connections killed": (redis_connections_killed, "redis", ""),
    "redis slow": (redis_slow, "", ""),
    "worker cut from redis": (worker_cut_from_redis, "", ""),
    "revoker cut from redis": (revoker_cut_from_redis, "", ""),
    "store connections blackholed": (store_blackholed, "", "worker"),
    "store connections held": (store_held, "", "worker"),
    "store connections reset": (store_cut, "", "worker"),
    "store sessions terminated": (store_sessions_terminated, "store", "all"),
    "store restarted": (store_restarted, "store", "all"),
    "store failed over, nothing lost": (store_failed_over, "store", "all"),
    "store failed over, old primary lives on": (store_split, "store", "all"),
    "store failed over, commits lost": (store_lost_commits, "store", "all"),
    "revoker cut from the store": (revoker_cut_from_store, "", ""),
    "worker stopped": (worker_stopped, "worker", "worker"),
    "worker killed": (worker_killed, "worker", "worker"),
    "event loop blocked": (loop_blocked, "worker", "worker"),
    "worker forked": (worker_forked, "worker", "worker"),
}
"""Kind → the function, whose turns it takes, and whose checks may be 503 for it ("": none)."""


class Faults:
    """Applies a schedule, and knows what was applied.

    Args:
        deployment: to apply it to.
        schedule: what to apply.
    """

    def __init__(self, deployment: Deployment, schedule: list[Fault]) -> None:
        self._deployment = deployment
        self._schedule = schedule
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.applied: list[Interval] = []
        self.failed: list[str] = []
        """Faults that did not go as planned; they count as applied."""

    async def run(self, seconds: float) -> None:
        """Apply each fault when its time has come; return when all are over, and the time is."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in self._schedule:
                await asyncio.sleep(began + fault.at - time.monotonic())
                group.create_task(self._apply(fault))
            await asyncio.sleep(began + seconds - time.monotonic())

    async def _apply(self, fault: Fault) -> None:
        inject, takes_turns_of, silences = FAULTS[fault.kind]
        place = self._place(fault)
        turns = place.name if takes_turns_of == "worker" else takes_turns_of or str(id(fault))
        async with self._turns[turns]:
            start = time.monotonic_ns()
            try:
                await inject(self._deployment, fault)
            except (OSError, TimeoutError, RedisError, psycopg.Error) as error:
                self.failed.append(f"{fault.kind}: {type(error).__name__}: {error}")
            silenced = place.name if silences == "worker" else silences
            self.applied.append(Interval(fault.kind, start, time.monotonic_ns(), silenced))

    def _place(self, fault: Fault) -> Slot:
        return self._deployment.slots_of("worker", fault.target)[0]
