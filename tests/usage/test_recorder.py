"""lastUsed: off the request's path, coalesced, never lost on a graceful stop."""

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from keylatch.caches.local_cache import UsageCounter
from keylatch.errors import StoreUnavailable
from keylatch.storage.usage import UsageBatch
from keylatch.usage.recorder import UsageRecorder

pytestmark = pytest.mark.anyio


class Store:
    """Records what it gets; fails as often as requested."""

    def __init__(self, failures: int = 0) -> None:
        self.writes: list[dict[str, int]] = []
        self.failures = failures

    async def record_last_used(self, uses: Mapping[str, int], batch: UsageBatch) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("down")
        self.writes.append(dict(uses))


class Sleep:
    """A clock for tasks: `pass_time` wakes sleeping tasks."""

    def __init__(self) -> None:
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    async def __call__(self, seconds: float) -> None:
        awake = asyncio.Event()
        self._sleepers.append((seconds, awake))
        await awake.wait()

    async def pass_time(self, seconds: float) -> None:
        due = [sleeper for sleeper in self._sleepers if sleeper[0] <= seconds]
        self._sleepers = [(left - seconds, e) for left, e in self._sleepers if left > seconds]
        for _, awake in due:
            awake.set()
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def running() -> AsyncIterator[tuple[UsageRecorder, Store, Sleep]]:
    """A usage buffer whose task runs, with a clock to move."""
    store, sleep = Store(), Sleep()
    usage = UsageRecorder(store.record_last_used, sleep)
    task = asyncio.create_task(usage.run())
    await sleep.pass_time(0)
    yield usage, store, sleep
    task.cancel()
    await asyncio.wait([task])


async def test_uses_coalesce_to_the_newest_and_show_within_a_second(
    running: tuple[UsageRecorder, Store, Sleep],
) -> None:
    """A thousand uses of a key are one write, half a second after the first."""
    usage, store, sleep = running
    key = UsageCounter("key_a")
    for at in range(1000):
        usage.record(key, at)
    await sleep.pass_time(0)
    assert store.writes == []
    await sleep.pass_time(0.5)
    assert store.writes == [{"key_a": 999}]


async def test_a_busy_process_writes_every_five_seconds(
    running: tuple[UsageRecorder, Store, Sleep],
) -> None:
    """After a flush the next one waits for the interval, however much is noted."""
    usage, store, sleep = running
    key = UsageCounter("key_a")
    usage.record(key, 1)
    await sleep.pass_time(0)
    await sleep.pass_time(0.5)
    usage.record(key, 2)
    await sleep.pass_time(4.9)
    assert len(store.writes) == 1
    await sleep.pass_time(0.2)
    await sleep.pass_time(0.5)
    assert store.writes[1:] == [{"key_a": 2}]


async def test_many_keys_are_written_sooner(running: tuple[UsageRecorder, Store, Sleep]) -> None:
    """A thousand waiting keys do not wait for the interval."""
    usage, store, sleep = running
    usage.record(UsageCounter("key_first"), 1)
    await sleep.pass_time(0)
    await sleep.pass_time(0.5)
    for number in range(1_002):
        usage.record(UsageCounter(f"key_{number}"), 2)
    await sleep.pass_time(0)
    await sleep.pass_time(0.5)
    assert len(store.writes[1]) == 1_002


async def test_what_could_not_be_stored_waits_and_newer_uses_win() -> None:
    """An outage loses nothing, and an older time does not overwrite a newer one."""
    store = Store(failures=1)
    usage = UsageRecorder(store.record_last_used)
    key = UsageCounter("key_a")
    usage.record(key, 1)
    usage.record(UsageCounter("key_b"), 1)
    await usage.flush()
    usage.record(key, 5)
    await usage.flush()
    assert store.writes == [{"key_a": 1, "key_b": 1}, {"key_a": 5}]


async def test_a_use_during_the_flush_is_kept() -> None:
    """A key noted while the write is under way is written by the next one."""
    written: list[dict[str, int]] = []

    async def slow(uses: Mapping[str, int], batch: UsageBatch) -> None:
        if not written:
            usage.record(key, 2)
        written.append(dict(uses))

    usage = UsageRecorder(slow)
    key = UsageCounter("key_a")
    usage.record(key, 1)
    await usage.flush()
    await usage.flush()
    assert written == [{"key_a": 1}, {"key_a": 2}]


async def test_a_cancelled_flush_loses_nothing() -> None:
    """A stop in the middle of a write leaves the uses for the last flush."""
    gate = asyncio.Event()
    written: list[dict[str, int]] = []

    async def slow(uses: Mapping[str, int], batch: UsageBatch) -> None:
        await gate.wait()
        written.append(dict(uses))

    usage = UsageRecorder(slow)
    usage.record(UsageCounter("key_a"), 1)
    flush = asyncio.create_task(usage.flush())
    await asyncio.sleep(0)
    flush.cancel()
    await asyncio.wait([flush])
    gate.set()
    await usage.flush()
    assert written == [{"key_a": 1}]


@pytest.mark.long
async def test_the_buffer_is_bounded() -> None:
    """While the store is down for long, memory does not grow beyond 50,000 keys."""
    store = Store()
    usage = UsageRecorder(store.record_last_used)
    keys = [UsageCounter(f"key_{number}") for number in range(60_000)]
    for key in keys:
        usage.record(key, 1)
    usage.record(keys[0], 2)
    await usage.flush()
    last_used = {key_id: at for uses in store.writes for key_id, at in uses.items()}
    assert len(last_used) == 50_000
    assert last_used["key_0"] == 2


async def test_a_key_that_was_read_anew_still_has_its_newest_use() -> None:
    """A change makes this process read a key again: old and new are one key in the counts."""
    store = Store()
    usage = UsageRecorder(store.record_last_used)
    old, new = UsageCounter("key_a"), UsageCounter("key_a")
    usage.record(new, 7)
    usage.record(old, 3)
    await usage.flush()
    assert store.writes == [{"key_a": 7}]
