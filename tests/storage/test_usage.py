"""Counts of uses: exact, added once, off the request's path, bounded; they re-activate no key."""

import asyncio
import itertools
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, update

from keylatch.caches.local_cache import UsageCounter
from keylatch.core.decisions import (
    Allow,
    DeferredDeny,
    Deny,
    KeyRecord,
    Reason,
    Requirement,
    principal_of,
)
from keylatch.core.timestamps import datetime_of
from keylatch.core.tokens import MacKeys
from keylatch.engine import Engine
from keylatch.errors import StoreUnavailable
from keylatch.management.keyring import Created
from keylatch.storage import usage as tallies
from keylatch.storage.schema import keys
from keylatch.storage.store import Store, database_of
from keylatch.storage.usage import (
    ALLOWED,
    DAY_MS,
    RETENTION_DAYS,
    Client,
    CountKey,
    DayUsage,
    KeyUsage,
    UsageBatch,
)
from keylatch.usage.buffer import CAPACITY
from keylatch.usage.recorder import UsageRecorder
from tests.revocation.test_fork import forking
from tests.storage.test_store import NOW, record
from tests.support import worker_wsgi
from tests.support.clock import Clock
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer
from tests.support.stores import StoreTests
from tests.test_engine import bearer, with_other_secret
from tests.test_metrics import decided
from tests.test_wsgi import Protected, protected, served

pytestmark = pytest.mark.anyio
TODAY = NOW // DAY_MS
REVOKED = Reason.REVOKED.name
__all__ = ["protected"]  # a fixture


def batch(number: int, counts: Mapping[CountKey, int], by: str = "one", **more: Any) -> UsageBatch:
    return UsageBatch(by, number, TODAY, counts, **more)


async def days(store: Store, key_id: str = "key_a") -> list[DayUsage]:
    found = await store.usage.of_key("acme", key_id, TODAY - RETENTION_DAYS)
    assert found is not None
    return found.days


Write = Callable[[Mapping[str, int], UsageBatch], Awaitable[None]]


async def use_after_a_revoke(store: Store, write: Write) -> tuple[KeyRecord, int]:
    """A key is used, revoked, and only then is its use written; what the store says of it."""
    await store.keys.add(record(), "hashed")
    gone = {"active": False, "deleted_at": NOW + 5}
    changed = await store.keys.change("acme", "key_a", NOW + 5, gone)
    assert changed is not None
    await write({"key_a": NOW + 1}, batch(1, {("key_a", TODAY, ALLOWED): 1}))
    found = await store.keys.get("acme", "key_a")
    assert found is not None
    return found, (await store.invalidations.since(0)).seq - changed[1]


class TallyContract(StoreTests):
    """What both databases promise."""

    async def test_usage_batches_add_up(self, store: Store) -> None:
        """Those of several processes, by day and outcome; the newest day comes first."""
        await store.keys.add(record(), "hashed")
        await store.usage.record(
            {}, batch(1, {("key_a", TODAY, ALLOWED): 7, ("key_a", TODAY, REVOKED): 2})
        )
        await store.usage.record({}, batch(2, {("key_a", TODAY, ALLOWED): 3}))
        await store.usage.record({}, batch(1, {("key_a", TODAY - 1, ALLOWED): 5}, by="another"))
        await store.usage.record({}, batch(2, {("key_a", TODAY, ALLOWED): 4}, by="another"))
        assert await days(store) == [
            DayUsage(TODAY, 14, {REVOKED: 2}),
            DayUsage(TODAY - 1, 5, {}),
        ]
        assert await store.usage.of_key("acme", "key_a", TODAY) == KeyUsage(
            record(), [DayUsage(TODAY, 14, {REVOKED: 2})], None
        )

    async def test_another_organisations_key_is_an_unknown_key(self, store: Store) -> None:
        """Its usage is not shown to another organisation."""
        await store.keys.add(record(), "hashed")
        assert await store.usage.of_key("rival", "key_a", 0) is None
        assert await store.usage.of_key("acme", "key_b", 0) is None

    async def test_a_usage_batch_that_is_sent_again_is_added_once(self, store: Store) -> None:
        """Also if two processes send it at the same time, because the first seems dead."""
        await store.keys.add(record(), "hashed")
        one = batch(1, {("key_a", TODAY, ALLOWED): 7})
        await asyncio.gather(*(store.usage.record({"key_a": NOW}, one) for _ in range(8)))
        await store.usage.record({}, batch(2, {("key_a", TODAY, ALLOWED): 1}))
        await store.usage.record({"key_a": NOW + 1}, one)
        assert await days(store) == [DayUsage(TODAY, 8, {})]
        assert (await store.keys.list("acme"))[0].last_used == NOW

    async def test_the_twin_that_does_not_ask_for_the_number_adds_it_twice(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The test above would notice."""
        monkeypatch.setattr(tallies, "_advance_sequence", lambda connection, batch: True)
        with pytest.raises(AssertionError):
            await self.test_a_usage_batch_that_is_sent_again_is_added_once(store)

    async def test_an_answer_that_got_lost_is_no_use_twice(self, store: Store) -> None:
        """The commit succeeded and its answer was lost: the same batch is sent again, while others
        wait."""
        await store.keys.add(record(), "hashed")
        answers = iter([False, False, True])

        async def deaf(uses: Mapping[str, int], batch: UsageBatch) -> None:
            await store.usage.record(uses, batch)
            if not next(answers, True):
                raise StoreUnavailable("the answer was lost")

        usage, key = UsageRecorder(deaf, now_ms=lambda: NOW), UsageCounter("key_a")
        for count in (7, 3, 5):
            for _ in range(count):
                usage.record(key, NOW)
            await usage.flush()
        assert await days(store) == [DayUsage(TODAY, 15, {})]

    async def test_a_use_reactivates_no_key(self, store: Store) -> None:
        """A use that is written after the revoke changes when the key was last used, its counts,
        and nothing else; it writes no invalidation."""
        found, changes = await use_after_a_revoke(store, store.usage.record)
        assert (found.active, found.deleted_at, changes) == (False, NOW + 5, 0)
        assert (found.last_used, await days(store)) == (NOW + 1, [DayUsage(TODAY, 1, {})])

    async def test_the_twin_that_saves_the_cached_row_back_is_caught(
        self, store: Store, url: str
    ) -> None:
        """What others have shipped: `row.last_used = now; row.save()`."""

        def save(connection: Connection) -> None:
            cached = asdict(record(last_used=NOW + 1))
            values = {name: value for name, value in cached.items() if name in keys.c}
            connection.execute(update(keys).where(keys.c.id == "key_a").values(values))

        async def save_back(uses: Mapping[str, int], batch: UsageBatch) -> None:
            await store._database.write(save)

        found, _ = await use_after_a_revoke(store, save_back)
        assert (found.active, found.deleted_at) == (True, None)

    async def test_processes_do_not_wait_for_each_other_in_circles(self, store: Store) -> None:
        """Each has seen the same keys in an order of its own: no deadlock, and no use is lost."""
        names = [f"key_{n:02}" for n in range(40)]
        await store.keys.add_many([(record(name), "hashed") for name in names])

        async def one(number: int) -> None:
            mixed = random.Random(number).sample(names, len(names))
            counts = {(name, TODAY, ALLOWED): number for name in mixed}
            seen = {name: Client(None, str(number), NOW + number) for name in mixed}
            uses = dict.fromkeys(mixed, NOW + number)
            await store.usage.record(uses, batch(1, counts, f"process {number}", clients=seen))

        await asyncio.gather(*(one(number) for number in range(1, 13)))
        for name in names:
            found = await store.usage.of_key("acme", name, TODAY)
            assert found is not None
            assert found.days == [DayUsage(TODAY, sum(range(1, 13)), {})]
            assert found.client == Client(None, "12", NOW + 12)
            assert found.record.last_used == NOW + 12

    async def test_what_is_old_goes(self, store: Store, url: str) -> None:
        """Counts after 400 days, clients after 90; the rest stays, in every process."""
        await store.keys.add_many([(record(name), "hashed") for name in ("key_a", "key_b")])
        on = {("key_a", TODAY - age, ALLOWED): 1 for age in (0, 1, 399, 400, 401, 500)}
        seen = {
            "key_a": Client("192.0.2.0/24", "curl", NOW - 91 * DAY_MS),
            "key_b": Client("192.0.2.0/24", "curl", NOW - 89 * DAY_MS),
        }
        for number in range(3):
            await store.usage.record(
                {}, UsageBatch(f"gone {number}", 1, TODAY - 8, on if not number else {})
            )
        await store.usage.record({}, batch(1, {}, clients=seen))
        await asyncio.gather(store.run_maintenance(NOW), store.run_maintenance(NOW))
        found = await store.usage.of_key("acme", "key_a", 0)
        other = await store.usage.of_key("acme", "key_b", 0)
        assert found is not None
        assert other is not None
        assert [each.day for each in found.days] == [TODAY - age for age in (0, 1, 399, 400)]
        assert (found.client, other.client) == (None, seen["key_b"])
        left = await store._database.read(
            lambda connection: connection.exec_driver_sql(
                "SELECT outcome FROM keylatch_usage WHERE key_id = ''"
            ).all()
        )
        assert [row[0] for row in left] == ["one"]

    async def test_unused_keys_are_found(self, store: Store) -> None:
        """By when they were last used, and those that never were by when they were made; a page
        at a time."""
        ages = {"key_new": (0, None), "key_never": (40, None), "key_old": (90, 31)}
        ages |= {"key_used": (90, 29), "key_gone": (90, None), "key_older": (90, 60)}
        for name, (made, used) in ages.items():
            last_used = None if used is None else NOW - used * DAY_MS
            made_at = NOW - made * DAY_MS
            await store.keys.add(record(name, created_at=made_at, last_used=last_used), "hashed")
        await store.keys.change("acme", "key_gone", NOW, {"deleted_at": NOW})
        since = NOW - 30 * DAY_MS
        pages = [page async for page in store.keys.pages("acme", unused_since=since)]
        assert [each.id for each in pages[0].records] == ["key_older", "key_old", "key_never"]
        first = await store.keys.page("acme", 2, unused_since=since)
        rest = await store.keys.page("acme", 2, after=first.next_cursor, unused_since=since)
        assert [each.id for page in (first, rest) for each in page.records] == [
            *("key_older", "key_old", "key_never")
        ]


class TestMemory(TallyContract):
    @pytest.fixture
    def url(self) -> str:
        return "sqlite://"


class TestSQLite(TallyContract):
    @pytest.fixture
    def url(self, store_url: str) -> str:
        return store_url


class TestPostgreSQL(TallyContract):
    @pytest.fixture
    def url(self, postgres: PostgresServer) -> str:
        return postgres.new_database()


class RecordingStore:
    """A store that adds up what it gets."""

    def __init__(self) -> None:
        self.counts = Counter[CountKey]()
        self.writes = 0
        self.largest = 0
        self.is_down = False

    async def record_last_used(self, last_used: Mapping[str, int], batch: UsageBatch) -> None:
        if self.is_down:
            raise StoreUnavailable("down")
        self.writes += 1
        self.largest = max(self.largest, len(last_used), len(batch.counts))
        self.counts.update(batch.counts)


# Coverage stretches the time between two bytecodes: a thread may sleep through two flushes between
# its read of a counter and its step. Outside of tests, flushes are a second apart or more.
@pytest.mark.no_cover
async def test_no_use_is_lost_between_eight_threads_and_a_flush() -> None:
    """Threads share keys and are interrupted all the time; the loop flushes as fast as it can."""
    recording, shared = (
        RecordingStore(),
        [UsageCounter("key_a"), UsageCounter("key_b"), UsageCounter("key_a")],
    )
    usage = UsageRecorder(recording.record_last_used, now_ms=lambda: NOW)

    def hit() -> None:
        for turn in range(20_000):
            usage.record(shared[turn % 3], NOW)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            hitting = [asyncio.wrap_future(threads.submit(hit)) for _ in range(8)]
            while not all(each.done() for each in hitting):
                await usage.flush()
                await asyncio.sleep(0)
            await asyncio.gather(*hitting)
    finally:
        sys.setswitchinterval(interval)
    await usage.flush()
    assert sum(recording.counts.values()) == 160_000
    assert recording.counts["key_b", TODAY, ALLOWED] == 8 * 6_667


async def test_a_thread_that_was_stopped_while_a_flush_went_by_still_counts() -> None:
    """It had taken the key's counter and not yet ticked it: the next flush finds that."""
    recording, key = RecordingStore(), UsageCounter("key_a")
    usage = UsageRecorder(recording.record_last_used, now_ms=lambda: NOW)
    usage.record(key, NOW)
    counter = key.steps
    assert counter is not None
    await usage.flush()
    next(counter)  # what `record` does when the thread goes on
    usage.record(key, NOW)
    await usage.flush()
    await usage.flush()
    assert recording.counts == {("key_a", TODAY, ALLOWED): 3}


async def test_a_key_that_left_the_cache_keeps_its_uses() -> None:
    """Entries come and go; what they counted waits on its own."""
    recording = RecordingStore()
    usage = UsageRecorder(recording.record_last_used, now_ms=lambda: NOW)
    for _ in range(50):
        usage.record(UsageCounter("key_a"), NOW)
    await usage.flush()
    assert recording.counts == {("key_a", TODAY, ALLOWED): 50}


async def test_a_use_belongs_to_the_day_of_its_flush_and_an_outage_moves_none() -> None:
    """What was taken before midnight and could not be stored stays on its day."""
    recording, clock, key = RecordingStore(), Clock(), UsageCounter("key_a")
    clock.seconds = (TODAY + 1) * 86_400 - 1
    usage = UsageRecorder(recording.record_last_used, now_ms=lambda: int(clock() * 1000))
    recording.is_down = True
    usage.record(key, NOW)
    await usage.flush()
    clock.tick(1)
    usage.record(key, NOW)
    recording.is_down = False
    await usage.flush()
    assert recording.counts == {("key_a", TODAY, ALLOWED): 1, ("key_a", TODAY + 1, ALLOWED): 1}


async def test_a_flood_of_refusals_is_one_write() -> None:
    """However many: one row for a key and a reason."""
    recording = RecordingStore()
    usage = UsageRecorder(recording.record_last_used, now_ms=lambda: NOW)
    for _ in range(100_000):
        usage.record_refusal("key_a", Reason.REVOKED)
    assert recording.writes == 0
    await usage.flush()
    assert (recording.counts, recording.writes) == ({("key_a", TODAY, REVOKED): 100_000}, 1)


@pytest.mark.long
async def test_a_flood_is_bounded_and_says_what_it_lost(caplog: pytest.LogCaptureFixture) -> None:
    """So many keys that there is no place for all: those that have one are counted on, the rest
    are counted as dropped, and no transaction is long."""
    recording = RecordingStore()
    usage = UsageRecorder(recording.record_last_used, now_ms=lambda: NOW)
    for number in range(CAPACITY + 10):
        usage.record_refusal(f"key_{number}", Reason.EXPIRED)
    usage.record_refusal("key_0", Reason.EXPIRED)
    recording.is_down = True
    await usage.flush()
    for number in range(CAPACITY + 10):
        usage.record_refusal(f"key_{number}", Reason.REVOKED)
    await usage.flush()
    recording.is_down = False
    await usage.flush()
    assert sum(recording.counts.values()) + usage.dropped == 2 * (CAPACITY + 10) + 1
    assert CAPACITY <= len(recording.counts) <= 2 * CAPACITY
    assert recording.counts["key_0", TODAY, "EXPIRED"] == 2
    assert recording.largest <= 2_000
    assert f"dropped {10} uses from the usage counts" in caplog.text


async def create(engine: Engine, **values: Any) -> Created:
    return await (await engine.keyring()).create("acme", "ci", **values)


@pytest.fixture
async def other(make_engine: MakeEngine) -> AsyncIterator[Engine]:
    """Another process's engine on the same store."""
    other = make_engine()
    await other.start()
    yield other
    await other.stop()


async def uses_of(engine: Engine, key: Created) -> tuple[int, Mapping[str, int]]:
    found = await (await engine.keyring()).usage("acme", key.record.id)
    assert found is not None
    return (found.days[0].allowed, found.days[0].refused) if found.days else (0, {})


async def test_every_refusal_of_a_known_key_counts_by_its_reason(
    engine: Engine, other: Engine, make_engine: MakeEngine, clock: Clock
) -> None:
    """From cache and store alike; accepted requests count once each, also the first."""
    keyring = await other.keyring()
    small = await create(other, permission="SENDING")
    for _ in range(3):
        assert isinstance(await engine.authenticate(bearer(small.token)), Allow)
    full = Requirement(frozenset({"FULL"}))
    assert await engine.authenticate(bearer(small.token), full) == Deny(
        Reason.INSUFFICIENT_SCOPE, "FULL"
    )
    wrong = await with_other_secret(other.store, small.token)
    for _ in range(2):
        assert await engine.authenticate(bearer(wrong)) == Deny(Reason.WRONG_SECRET)

    ending = await create(other, expires_at=datetime_of(int(clock() * 1000) + 5_000))
    assert isinstance(await engine.authenticate(bearer(ending.token)), Allow)
    gone, disabled = await create(other), await create(other)
    assert isinstance(await engine.authenticate(bearer(gone.token)), Allow)
    await keyring.delete("acme", gone.record.id)
    await keyring.change("acme", disabled.record.id, active=False)
    clock.tick(6)
    for key, reason in ((ending, Reason.EXPIRED), (gone, Reason.REVOKED)):
        for _ in range(4):
            assert await engine.authenticate(bearer(key.token)) == Deny(reason)
    assert await engine.authenticate(bearer(disabled.token)) == Deny(Reason.DISABLED)
    test = await create(other, environment="test")
    live = make_engine(environment="live")
    assert await live.authenticate(bearer(test.token)) == Deny(Reason.WRONG_ENVIRONMENT)
    await live.stop()
    await keyring.set_organization_active("acme", False)
    assert await engine.authenticate(bearer(test.token)) == Deny(Reason.ORGANIZATION_DISABLED)
    await engine.stop()

    assert await uses_of(other, small) == (3, {"INSUFFICIENT_SCOPE": 1, "WRONG_SECRET": 2})
    assert await uses_of(other, ending) == (1, {"EXPIRED": 4})
    assert await uses_of(other, gone) == (1, {"REVOKED": 4})
    assert await uses_of(other, disabled) == (0, {"DISABLED": 1})
    refused = {"WRONG_ENVIRONMENT": 1, "ORGANIZATION_DISABLED": 1}
    assert await uses_of(other, test) == (0, refused)


async def test_what_is_unsettled_does_not_count_until_it_is(engine: Engine, other: Engine) -> None:
    """Where a later rule may suffice, a valid key is neither allowed nor denied."""
    small = await create(other, permission="SENDING")
    so_far = Requirement(frozenset({"FULL"}), is_final=False)
    for sufficient, is_cold in (("SENDING", True), ("SENDING", False), ("READING", False)):
        before = decided(engine)
        decision = await engine.authenticate(bearer(small.token), so_far)
        assert isinstance(decision, DeferredDeny)
        assert decided(engine) == before
        settled = decision.decide(Requirement(frozenset({"FULL", sufficient}), sufficient))
        tier = "store" if is_cold else "l1"
        if sufficient == "SENDING":
            assert settled == Allow(principal_of(small.record))
            assert decided(engine) == {**before, f"allow {tier}": 1}
        else:
            assert settled == Deny(Reason.INSUFFICIENT_SCOPE, "READING")
            assert decided(engine) == {**before, f"insufficient_scope {tier}": 1}
    for value in (b"Bearer x", b"Bearer a, Bearer b"):  # others are refused as ever
        assert not isinstance(await engine.authenticate([value], so_far), DeferredDeny)
    await engine.stop()
    assert await uses_of(other, small) == (2, {"INSUFFICIENT_SCOPE": 1})


async def test_each_of_many_who_wait_for_one_look_up_counts(engine: Engine, other: Engine) -> None:
    """A key that became cold is looked up once for all, and each of them has used it."""
    key = await create(other)
    decisions = await asyncio.gather(*(engine.authenticate(bearer(key.token)) for _ in range(50)))
    assert all(isinstance(decision, Allow) for decision in decisions)
    await engine.stop()
    assert await uses_of(other, key) == (50, {})


async def test_both_secrets_of_a_key_count_for_it(engine: Engine, other: Engine) -> None:
    """While a rotation's grace runs; and after it, the previous one counts as refused."""
    key = await create(other)
    assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
    keyring = await other.keyring()
    rotated = await keyring.rotate("acme", key.record.id, grace=timedelta(seconds=60))
    assert rotated is not None
    for _ in range(3):
        for token in (key.token, rotated.token):
            assert isinstance(await engine.authenticate(bearer(token)), Allow)
    await keyring.finish_rotation("acme", key.record.id)
    assert await engine.authenticate(bearer(key.token)) == Deny(Reason.WRONG_SECRET)
    assert isinstance(await engine.authenticate(bearer(rotated.token)), Allow)
    await engine.stop()
    assert await uses_of(other, key) == (8, {"WRONG_SECRET": 1})


async def test_forged_tokens_write_nothing(engine: Engine, other: Engine) -> None:
    """A token that this store did not mint is counted for no key, also one with the id of a key, in
    cache or not; nor does a minted one of no key."""
    key = await create(other)
    assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
    forged = MacKeys([b"s" * 32]).mint("kl", "live")
    secrets = await other.store.open(0)
    unknown = MacKeys(secrets.mac_keys).mint("kl", "live")
    claims = key.token.reveal()[:-9] + "AAAAAAAAA"
    for token in (bearer(forged), bearer(unknown), [f"Bearer {claims}".encode()]):
        for _ in range(3):
            assert isinstance(await engine.authenticate(token), Deny)
    await engine.stop()
    assert await uses_of(other, key) == (1, {})
    database = database_of(other.settings.store)
    rows = await database.read(
        lambda connection: connection.exec_driver_sql("SELECT key_id FROM keylatch_usage").all()
    )
    await database.close()
    assert {row[0] for row in rows} == {"", key.record.id}


async def test_what_is_kept_open_is_no_use(engine: Engine, other: Engine) -> None:
    """A connection's key is looked at again when it changes; no request was sent."""
    key = await create(other)
    assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
    with engine.revocation_event(bearer(key.token)) as ended:
        await (await other.keyring()).change("acme", key.record.id, name="new")
        assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
        await (await other.keyring()).delete("acme", key.record.id)
        await asyncio.wait_for(ended.wait(), 20)
    await engine.stop()
    assert await uses_of(other, key) == (2, {})


@pytest.mark.long
def test_a_child_counts_from_zero(store_url: str) -> None:
    """A use is counted by the process that saw it, once."""
    with forking(store_url) as (parent, child):
        key_id, key = parent("create", "key")
        for _ in range(3):
            assert parent("check", key) == "accepted"
        parent("fork")
        for _ in range(2):
            assert child("check", key) == "accepted"
        child("stop")
        assert parent("allowed", key_id) == 2
        parent("stop")
        assert parent("allowed", key_id) == 5


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [("--workers", "2"), ("--workers", "2", "--worker-class", "gthread", "--threads", "8")],
    ids=["sync", "gthread"],
)
def test_counts_are_exact_after_sigterm(
    protected: Protected, store_url: str, options: tuple[str, ...]
) -> None:
    """Two processes, and eight callers at once: every answer that was given has been counted."""
    good, gone = protected.create(), protected.create()
    small = protected.create(permission="SENDING")
    protected.revoke(gone)
    answers = Counter[tuple[str, int]]()
    turns = itertools.cycle([good, gone, good, small])
    chosen = [next(turns) for _ in range(320)]
    with served(store_url, *options) as (port, process), ThreadPoolExecutor(8) as threads:

        def request(key: Created) -> tuple[str, int]:
            bearing = f"Bearer {key.token.reveal()}"
            return key.record.id, worker_wsgi.status_of(int(port), "/", bearing)

        answers.update(threads.map(request, chosen))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    ids = [key.record.id for key in (good, gone, small)]
    assert answers == {(ids[0], 200): 160, (ids[1], 401): 80, (ids[2], 403): 80}
    with asyncio.Runner() as runner:
        store = Store(store_url)
        found = [runner.run(store.usage.of_key("default", key_id, 0)) for key_id in ids]
        runner.run(store.close())
    counted = [(each.days[0].allowed, each.days[0].refused) for each in found if each]
    assert counted == [(160, {}), (0, {"REVOKED": 80}), (0, {"INSUFFICIENT_SCOPE": 80})]
