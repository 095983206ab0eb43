"""What this process caches, and when a cached entry may be used."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import ResponseError

from keylatch.caches.local_cache import Entry, LocalCache, NegativeEntry
from keylatch.caches.redis_client import CircuitBreaker
from keylatch.caches.single_flight import SingleFlight
from keylatch.core.decisions import Allow, Deny, KeyRecord, Reason
from keylatch.engine import Engine
from keylatch.revocation.invalidations import Break, Invalidations
from keylatch.revocation.sequence import SequenceFreshness
from keylatch.storage.invalidation_log import LogState
from keylatch.storage.store import Invalidation, InvalidationBatch, Position
from tests.support.clock import Clock
from tests.support.engines import Times

RECORD = KeyRecord("key_a", "acme", "ci", "FULL", "live", "kl_...abcd", True, True, 0, 0)
ENTRY = Entry(b"key_a", RECORD, 1)
NEGATIVE_ENTRY = NegativeEntry(Reason.UNKNOWN, "key_a", "", 1)


def entry(key_id: str) -> Entry:
    return Entry(key_id.encode(), replace(RECORD, id=key_id), 1)


def test_a_spray_of_bad_tokens_evicts_no_good_key() -> None:
    """Absences have a bounded map of their own."""
    cache = LocalCache(size=10)
    cache.add(ENTRY)
    for number in range(10_000):
        cache.add_negative(b"%d" % number, NegativeEntry(Reason.UNKNOWN, f"bad {number}", "", 1))
    assert cache.by_secret_id("key_a") is ENTRY
    assert (
        sum(cache.negative_entry(b"%d" % number) is not None for number in range(10_000)) == 4_096
    )


def test_an_absence_is_forgotten_after_ten_seconds() -> None:
    """A negative entry refuses no token for longer, whatever else goes wrong."""
    clock = Clock()
    cache = LocalCache(timer=clock)
    cache.add_negative(b"token", NEGATIVE_ENTRY)
    clock.tick(9.9)
    assert cache.negative_entry(b"token") is NEGATIVE_ENTRY
    clock.tick(0.2)
    assert cache.negative_entry(b"token") is None


def test_the_least_recently_used_key_goes_first() -> None:
    """The bound holds, and a key in use stays."""
    cache = LocalCache(size=2)
    cache.add(used := entry("a"))
    cache.add(entry("b"))
    used.used_at = 1.0
    cache.add(entry("c"))
    assert [cache.by_secret_id(name) is not None for name in "abc"] == [True, False, True]


def test_a_full_cache_of_keys_in_use_still_takes_new_ones() -> None:
    """It lets one go after a few looks, and not after looking at all of them."""
    cache = LocalCache(size=100)
    for number in range(100):
        cache.add(used := entry(str(number)))
        used.used_at = 1.0
    cache.add(ENTRY)
    left = [known for number in range(100) if (known := cache.by_secret_id(str(number)))]
    assert (len(left), cache.by_secret_id("key_a")) == (99, ENTRY)
    assert 0 < sum(known.considered_at for known in left) < 20


def test_a_key_is_found_by_its_fingerprint_as_long_as_it_is_kept() -> None:
    """Whatever drops an entry drops it from both indexes: else one would grow without bound."""
    cache = LocalCache(size=3)
    for number in range(10):
        cache.add(entry(str(number)))
    kept = [number for number in range(10) if cache.by_fingerprint(b"%d" % number)]
    assert kept == [7, 8, 9]
    cache.add_negative(b"8", NegativeEntry(Reason.REVOKED, "8", "acme", 2))
    assert cache.by_fingerprint(b"8") is cache.by_secret_id("8") is None
    cache.clear()
    assert cache.by_fingerprint(b"9") is cache.by_secret_id("9") is None


def test_a_key_that_changes_again_and_again_takes_one_place() -> None:
    """Its earlier entries are gone, from memory as well, and evict no other entry."""
    cache = LocalCache(size=10)
    cache.add(ENTRY)
    for _ in range(1_000):
        cache.add(changing := entry("changing"))
    assert (cache.by_secret_id("key_a"), cache.by_secret_id("changing")) == (ENTRY, changing)
    assert len(cache._entries._queue) <= 20


class Log:
    """A store's sequence number and log; `blind` makes it unreadable."""

    def __init__(self) -> None:
        self.mark: Callable[[], bytes] | None = None
        self.queries = 0
        self.seq = 1
        self.epoch = "first"
        self.row_ids = itertools.count(1)
        self.rows: list[Invalidation] = []
        self.pruned = 0
        self.blind = False
        self.questions = 0
        self.gate: asyncio.Event | None = None
        self.invalidations = self

    def commit(self, key_id: str | None = None, organization_id: str | None = None) -> int:
        self.seq += 1
        row_id = next(self.row_ids)
        self.rows.append(Invalidation(self.seq, key_id, organization_id, row_id, "delete"))
        return self.seq

    def lose(self, count: int) -> None:
        """The last rows are lost; their sequence numbers are given out again."""
        del self.rows[max(0, len(self.rows) - count) :]
        self.seq = self.rows[-1].seq if self.rows else 1

    def row_id_at(self, seq: int) -> int:
        return next((row.row_id for row in self.rows if row.seq == seq), 0)

    def data_version(self) -> bytes | None:
        return None if self.mark is None else self.mark()

    def position_nowait(self) -> Position | None:
        self.queries += 1
        return None if self.blind else Position(self.seq, self.row_id_at(self.seq))

    def since_nowait(self, since: int) -> InvalidationBatch:
        changed = tuple(row for row in self.rows if row[0] > since)
        is_complete = since >= self.pruned and len(changed) <= 1_000
        return InvalidationBatch(
            self.seq,
            self.epoch,
            is_complete,
            changed if is_complete else (),
            row_id=self.row_id_at(self.seq),
            since_row_id=self.row_id_at(since),
        )

    async def since(self, since: int) -> InvalidationBatch:
        self.questions += 1
        batch = self.since_nowait(since)
        if self.gate is not None:
            await self.gate.wait()
        return batch


def watch(
    log: Log, breaks: list[Break] | None = None, kind: type[Invalidations] = Invalidations
) -> tuple[Invalidations, SequenceFreshness]:
    """`Invalidations`, and the freshness that keeps them current."""
    invalidations = kind((breaks if breaks is not None else []).append)
    return invalidations, SequenceFreshness(log, invalidations, Clock())  # type: ignore[arg-type]


def test_an_entry_is_accepted_until_its_key_is_invalidated() -> None:
    """A change to the key or its organisation refuses it; changes to others do not."""
    invalidations, freshness = watch(log := Log())
    assert freshness.is_fresh()
    read_at = log.seq
    log.commit("key_b")
    log.commit(None, "rival")
    assert freshness.is_fresh()
    assert invalidations.accepts("key_a", "acme", read_at)
    touched = log.commit("key_a")
    assert freshness.is_fresh()
    assert not invalidations.accepts("key_a", "acme", read_at)
    assert invalidations.accepts("key_a", "acme", touched)
    log.commit(None, "acme")
    assert freshness.is_fresh()
    assert not invalidations.accepts("key_a", "acme", touched)


def test_a_read_in_flight_cannot_reactivate_a_revoked_key() -> None:
    """An entry read before the revoke and stored after it carries the older number."""
    invalidations, freshness = watch(log := Log())
    read_at = log.seq
    log.commit("key_a")
    assert freshness.is_fresh()
    assert not invalidations.accepts("key_a", "acme", read_at)


def test_a_change_that_touches_everything_refuses_everything() -> None:
    """A row without a key and an organisation raises the floor."""
    invalidations, freshness = watch(log := Log())
    read_at = log.seq
    everything = log.commit()
    assert freshness.is_fresh()
    assert not invalidations.accepts("key_a", "acme", read_at)
    assert invalidations.accepts("key_a", "acme", everything)


@pytest.mark.parametrize("cause", ["pruned", "too many"])
def test_an_entry_from_before_an_incomplete_batch_is_not_accepted(cause: str) -> None:
    """A log that was pruned or is too long raises the floor: cold caches, right answers."""
    invalidations, freshness = watch(log := Log())
    assert freshness.is_fresh()
    read_at = log.seq
    for number in range(5 if cause == "pruned" else 1_001):
        log.commit(f"key_{number}")
    log.pruned = log.seq if cause == "pruned" else 0
    assert freshness.is_fresh()
    assert not invalidations.accepts("key_z", "acme", read_at)
    assert invalidations.accepts("key_z", "acme", log.seq)


def test_an_unchanged_data_version_saves_the_query() -> None:
    """Equal bytes, no commit: the sequence number is read only when they differ."""
    store, invalidations = Log(), Invalidations(lambda touched: None)
    counter = SequenceFreshness(store, invalidations, Clock())  # type: ignore[arg-type]
    store.mark = lambda: b"%d" % store.seq
    assert counter.is_fresh()
    queries = store.queries
    assert counter.is_fresh()
    assert store.queries == queries
    store.commit("key_a")
    assert counter.is_fresh()
    assert (store.queries, invalidations.seq) == (queries + 1, store.seq)


def test_a_commit_between_mark_and_counter_is_found_at_the_next_look() -> None:
    """The data version is read first: a commit meanwhile shows as another data version, later."""
    store, invalidations = Log(), Invalidations(lambda touched: None)
    counter = SequenceFreshness(store, invalidations, Clock())  # type: ignore[arg-type]

    def mark_and_commit() -> bytes:
        mark = b"%d" % store.seq
        store.mark = lambda: b"%d" % store.seq
        store.commit("key_a")
        return mark

    store.mark = mark_and_commit
    assert counter.is_fresh()
    store.commit("key_b")
    assert counter.is_fresh()
    assert invalidations.seq == store.seq


def test_too_many_tombstones_raise_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory for tombstones is bounded; entries older than a dropped one are not used."""
    monkeypatch.setattr("keylatch.revocation.invalidations._MAX_TOMBSTONES", 3)
    invalidations, freshness = watch(log := Log())
    read_at = log.seq
    for number in range(6):
        log.commit(f"key_{number}")
        assert freshness.is_fresh()
    assert not invalidations.accepts("key_0", "acme", read_at)
    assert not invalidations.accepts("key_other", "acme", read_at)


def test_an_unreadable_store_is_not_current() -> None:
    """Without the sequence number the process is not fresh."""
    invalidations, freshness = watch(log := Log())
    log.blind = True
    assert not freshness.is_fresh()
    assert not invalidations.seq


class ComparesNumbers(Invalidations):
    """The broken twin: a store whose sequence number is not smaller has the same history."""

    def _is_broken(self, batch: InvalidationBatch, min_seq: int) -> bool:
        return batch.seq < max(self.seq, min_seq)


@pytest.mark.parametrize("kind", [Invalidations, ComparesNumbers])
@pytest.mark.parametrize("given_out_again", [0, 2, 3, 10])
def test_a_store_that_lost_changes_is_noticed(
    kind: type[Invalidations], given_out_again: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it has given out the lost numbers again or not. What was read before is not used,
    what the lost changes revoked is refused, and the log is loud about it."""
    breaks: list[Break] = []
    invalidations, freshness = watch(log := Log(), breaks, kind)
    log.commit("key_a")
    for _ in range(3):
        log.commit("key_lost")
    assert freshness.is_fresh()
    history = invalidations.history
    log.lose(3)
    for number in range(given_out_again):
        log.commit(f"key_{number}")
    assert freshness.is_fresh()
    is_noticed = kind is Invalidations or given_out_again < 3
    assert bool(breaks) == is_noticed == (invalidations.history is not history)
    assert ("lost changes" in caplog.text) == is_noticed
    if is_noticed:
        assert {row.key_id for row in breaks[0].revocations} == {"key_a", "key_lost"}
        assert not invalidations.accepts("key_lost", "acme", log.seq)
        assert invalidations.accepts("key_other", "acme", log.seq)


def test_a_new_epoch_alone_is_no_break(caplog: pytest.LogCaptureFixture) -> None:
    """Another process starts a new epoch after a break that does not concern this one: the rows
    that this process knows are all there."""
    breaks: list[Break] = []
    invalidations, freshness = watch(log := Log(), breaks)
    log.commit("key_a")
    assert freshness.is_fresh()
    log.epoch = "second"
    touched = log.commit()
    assert freshness.is_fresh()
    assert breaks == []
    assert caplog.text == ""
    assert invalidations.epoch == "second"
    assert not invalidations.accepts("key_b", "acme", touched - 1)


@pytest.mark.anyio
async def test_invalidations_begin_with_the_newest_row() -> None:
    """A process that starts has cached nothing, so earlier changes do not matter to it."""
    invalidations, freshness = watch(log := Log())
    touched = log.commit("key_b")
    await freshness.begin()
    assert invalidations.position == Position(touched, log.row_id_at(touched))
    assert invalidations.accepts("key_b", "acme", touched)
    assert not invalidations.accepts("key_b", "acme", touched - 1)


NAMES = st.sampled_from(["key_a", "key_b", "key_c"])


class FeedAgainstTruth(RuleBasedStateMachine):
    """Whatever happens in whatever order, an accepted entry says what the store says; also when
    the store loses its last changes, and gives their sequence numbers out again."""

    kind: type[Invalidations] = Invalidations

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self.invalidations, self.freshness = watch(self.log, kind=self.kind)
        self.entries: list[tuple[str, int, object, int]] = []

    def state_of(self, name: str) -> int:
        """The row that changed a key last."""
        return max((row.row_id for row in self.log.rows if row.key_id == name), default=0)

    @rule(name=NAMES)
    def change(self, name: str) -> None:
        self.log.commit(name)

    @rule(name=NAMES)
    def read(self, name: str) -> None:
        anchor = self.invalidations.known.seq
        position = Position(self.log.seq, self.log.row_id_at(self.log.seq))
        log = LogState(position, Position(anchor, self.log.row_id_at(anchor)))
        as_of = self.invalidations.as_of(log)
        if as_of is not None:
            self.entries.append((name, as_of, self.invalidations.history, self.state_of(name)))

    @rule()
    def prune(self) -> None:
        self.log.pruned = self.log.seq

    @rule(count=st.integers(1, 3), again=st.lists(NAMES, max_size=4))
    def lose(self, count: int, again: list[str]) -> None:
        if self.log.seq - count > self.log.pruned:
            self.log.lose(count)
            for name in again:
                self.log.commit(name)

    @rule()
    def look(self) -> None:
        self.freshness.is_fresh()

    @invariant()
    def nothing_stale_is_accepted(self) -> None:
        if self.freshness.is_fresh():
            for name, as_of, history, state in self.entries:
                if history is self.invalidations.history and self.invalidations.accepts(
                    name, "acme", as_of
                ):
                    assert state == self.state_of(name)


FeedAgainstTruth.TestCase.settings = hypothesis_settings(max_examples=50)
TestFeedAgainstTruth = FeedAgainstTruth.TestCase


def test_the_twin_that_compares_numbers_is_caught() -> None:
    """It takes a store that has given the lost numbers out again for the one that it knew."""

    class Twin(FeedAgainstTruth):
        kind = ComparesNumbers

    with pytest.raises(AssertionError):
        run_state_machine_as_test(Twin, settings=hypothesis_settings(max_examples=500))


@pytest.mark.anyio
async def test_many_who_want_the_same_share_one_flight() -> None:
    """A hundred callers, one fetch."""
    single_flight: SingleFlight[int] = SingleFlight()
    gate = asyncio.Event()
    fetched = []

    async def fetch() -> int:
        fetched.append(1)
        await gate.wait()
        return 7

    callers = [asyncio.create_task(single_flight.do("token", fetch)) for _ in range(100)]
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*callers) == [7] * 100
    assert len(fetched) == 1


@pytest.mark.anyio
async def test_a_cancelled_leader_does_not_cancel_its_followers() -> None:
    """The first caller is cancelled; the others still get the result."""
    single_flight: SingleFlight[int] = SingleFlight()
    gate = asyncio.Event()

    async def fetch() -> int:
        await gate.wait()
        return 7

    leader = asyncio.create_task(single_flight.do("token", fetch))
    follower = asyncio.create_task(single_flight.do("token", fetch))
    await asyncio.sleep(0)
    leader.cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await follower == 7
    with pytest.raises(asyncio.CancelledError):
        await leader


@pytest.mark.anyio
@pytest.mark.timeout(600)
async def test_cancelled_leaders_cost_no_follower_its_answer(engine: Engine, times: Times) -> None:
    """Leaders of cold tokens are cancelled at every possible point: each follower gets the
    right answer, and none waits for ever."""
    keyring = await engine.keyring()
    good = await keyring.create("org", "good")
    gone = await keyring.create("org", "gone")
    await keyring.delete("org", gone.record.id)
    headers = [[b"Bearer " + key.token.reveal().encode()] for key in (good, gone)]

    async def one_round(number: int) -> None:
        engine._l1.clear()
        leaders = [asyncio.create_task(engine.authenticate(values)) for values in headers]
        followers = [asyncio.create_task(engine.authenticate(values)) for values in headers]
        for _ in range(number % 8):
            await asyncio.sleep(0)
        for leader in leaders:
            leader.cancel()
        allowed, refused = await asyncio.gather(*followers)
        assert isinstance(allowed, Allow)
        assert refused == Deny(Reason.REVOKED)

    for number in range(times(250, 5_000)):
        await asyncio.wait_for(one_round(number), 10)


@pytest.mark.anyio
async def test_a_flight_that_has_just_landed_is_not_boarded() -> None:
    """A caller in the same turn of the loop would get the earlier value, and get it again
    and again, because nothing makes it wait until the flight has ended."""
    single_flight: SingleFlight[int] = SingleFlight()
    fetched: list[int] = []

    async def fetch() -> int:
        fetched.append(len(fetched))
        return fetched[-1]

    async def come_when_it_lands() -> tuple[int, int]:
        while not fetched:  # noqa: ASYNC110 - to come in the very turn in which it lands
            await asyncio.sleep(0)
        return await single_flight.do("token", fetch), await single_flight.do("token", fetch)

    late = [asyncio.create_task(come_when_it_lands()) for _ in range(3)]
    assert await single_flight.do("token", fetch) == 0
    for first, second in await asyncio.gather(*late):
        assert second > first > 0


@pytest.mark.anyio
async def test_a_failed_flight_is_not_remembered() -> None:
    """All of its callers get the error; the next caller tries again."""
    single_flight: SingleFlight[int] = SingleFlight()

    async def fail() -> int:
        raise OSError("down")

    async def succeed() -> int:
        return 7

    results = await asyncio.gather(
        single_flight.do("token", fail), single_flight.do("token", fail), return_exceptions=True
    )
    assert [type(result) for result in results] == [OSError, OSError]
    assert await single_flight.do("token", succeed) == 7


def test_the_breaker_lets_one_try_each_second() -> None:
    """One wait a second while Redis is down, and all go on as soon as it is back."""
    clock = Clock()
    breaker = CircuitBreaker(clock)
    assert breaker.try_acquire()
    breaker.record_failure()
    assert not breaker.try_acquire()
    clock.tick(1.1)
    assert [breaker.try_acquire() for _ in range(3)] == [True, False, False]
    breaker.record_failure()
    clock.tick(1.1)
    assert breaker.try_acquire()
    breaker.record_success()
    assert breaker.try_acquire()
    assert breaker.try_acquire()


class IgnoresInvalidations(Invalidations):
    """The broken twin: it uses whatever it once read."""

    def accepts(self, key_id: str, organization_id: str, as_of: int) -> bool:
        return True


def test_the_twin_that_accepts_every_entry_is_caught() -> None:
    """The machine above finds a stale entry where the rule is missing."""

    class AgainstIgnoresInvalidations(FeedAgainstTruth):
        def __init__(self) -> None:
            super().__init__()
            self.invalidations = IgnoresInvalidations(lambda _: None)
            self.freshness = SequenceFreshness(self.log, self.invalidations, Clock())  # type: ignore[arg-type]

    with pytest.raises(AssertionError):
        run_state_machine_as_test(AgainstIgnoresInvalidations)


@pytest.mark.anyio
async def test_a_value_of_another_type_is_a_miss_and_no_outage() -> None:
    """An attacker who can write Redis cannot switch off the shared cache."""
    breaker = CircuitBreaker(Clock())

    async def wrong_type() -> bytes:
        raise ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")

    assert await breaker.attempt("GET", wrong_type) is None
    assert breaker.try_acquire()
