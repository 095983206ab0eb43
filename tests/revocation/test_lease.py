"""Leases: which process may use its cache, how long, and which ones a revoke waits for."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from keylatch.errors import StoreUnavailable
from keylatch.revocation.invalidations import Invalidations
from keylatch.revocation.lease import Lease
from keylatch.revocation.notices import Notice
from keylatch.revocation.propagation import Propagation, Receipt
from keylatch.storage.database import Durability
from keylatch.storage.invalidation_log import ChangeSeq
from keylatch.storage.store import Invalidation, InvalidationBatch, Laggards, Poll, Position
from keylatch.telemetry.counters import Histogram
from keylatch.telemetry.health import Health
from tests.support.clock import Clock

pytestmark = pytest.mark.anyio
X = 1.0


class Members:
    """A store's counter, log and members, for leases of several processes; parts can be cut off."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seq = 1
        self.rows: list[Invalidation] = []
        self.members: dict[str, list[int]] = {}
        self.on_poll: Callable[[str], None] = lambda member: None
        self.reads = 0
        self.server_age_seconds, self.server, self.row_id = 60.0, "first", 0
        self.on_look: Callable[[], None] = lambda: None
        self.cut_off: set[str] = set()
        self.lost_answers: set[str] = set()
        self.invalidations = self.leases = self

    def commit(self, key_id: str) -> int:
        self.seq += 1
        self.rows.append(Invalidation(self.seq, key_id, None))
        return self.seq

    async def since(self, since: int, seconds: float | None = None) -> InvalidationBatch:
        self.reads += 1
        return self.since_nowait(since)

    def since_nowait(self, since: int) -> InvalidationBatch:
        return InvalidationBatch(
            self.seq, "epoch", True, tuple(row for row in self.rows if row[0] > since)
        )

    async def join(self, member: str, now_ms: int, seconds: float) -> None:
        self.members[member] = [0, 0]

    async def leave(self, member: str) -> None:
        self.members.pop(member, None)

    async def poll(
        self, member: str, known: Position, seconds: float, pending: Sequence[Invalidation] = ()
    ) -> Poll:
        if member in self.cut_off:
            raise StoreUnavailable("cut off by the test")
        row = self.members.get(member)
        acknowledged_seq = self.acknowledged(known.seq, pending)
        if row is not None:
            row[0], row[1] = row[0] + 1, acknowledged_seq
        answer = Poll(
            row is not None,
            acknowledged_seq,
            self.since_nowait(known.seq),
            self.clock(),
            self.server,
        )
        self.on_poll(member)
        if member in self.lost_answers:
            raise StoreUnavailable("its answer was lost by the test")
        return answer

    def acknowledged(self, seq: int, pending: Sequence[Invalidation]) -> int:
        if pending and tuple(pending) == tuple(
            line for line in self.rows if seq < line[0] <= pending[-1][0]
        ):
            return pending[-1][0]
        return seq

    def set_lease_poll(self, poll: object) -> None:
        return

    def durability(self) -> Durability:
        return "local"

    async def laggards(self, seq: int, seconds: float) -> Laggards:
        laggards = {name: row[0] for name, row in self.members.items() if row[1] < seq}
        if laggards:
            self.clock.tick(X / 20)  # each look takes its time
        self.on_look()
        return Laggards(laggards, len(self.members), self.server_age_seconds, self.row_id)

    async def remove_members(self, laggards: dict[str, int], seq: int, seconds: float) -> int:
        gone = [
            name
            for name, grants in laggards.items()
            if name in self.members
            and self.members[name][0] == grants
            and self.members[name][1] < seq
        ]
        for name in gone:
            del self.members[name]
        return len(gone)


class Process:
    """One process: invalidations, a lease, and the task that renews it."""

    health = Health("not used", "not used")

    def __init__(self, store: Members, clock: Clock) -> None:
        self.invalidations = Invalidations(lambda found: None)
        self.lease = Lease(store, self.invalidations, X, clock, clock)  # type: ignore[arg-type]
        self.propagation = Propagation(
            *(store, self.invalidations, Histogram(())),  # type: ignore[arg-type]
            lease=self.lease,
            notifier=self,
            timer=clock,
        )
        self.others: list[Process] = []
        self.deaf = False

    async def publish(self, notice: Notice | None) -> None:
        for other in self.others:
            if not other.deaf:
                other.lease.on_notice(notice)

    async def subscribe(self, on_notice: object) -> None:
        raise AssertionError("the others call each other")

    async def close(self) -> None:
        return None

    def accepts(self, key_id: str, as_of: int) -> bool:
        return self.lease.is_fresh() and self.invalidations.accepts(key_id, "acme", as_of)


@pytest.fixture
def store(clock: Clock) -> Members:
    return Members(clock)


@pytest.fixture
async def processes(store: Members, clock: Clock) -> AsyncIterator[list[Process]]:
    """Three processes that hold leases and receive each other's notices."""
    processes = [Process(store, clock) for _ in range(3)]
    tasks = []
    for process in processes:
        process.others = processes
        await process.lease.begin()
        tasks.append(asyncio.create_task(process.lease.run()))
    yield processes
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_a_lease_counts_from_its_request(store: Members, clock: Clock) -> None:
    """An answer that takes half of X leaves half of X; one that takes all of it leaves nothing."""
    process = Process(store, clock)
    store.on_poll = lambda member: clock.tick(X / 2)
    await process.lease.begin()
    assert process.lease.is_fresh()
    clock.tick(X / 2)
    assert not process.lease.is_fresh()
    store.on_poll = lambda member: clock.tick(X)
    with pytest.raises(StoreUnavailable, match="slower"):
        await process.lease.revalidate()


async def test_a_holder_gives_up_early(store: Members, clock: Clock) -> None:
    """Two clocks may differ by one percent each way, so the last two percent are not used."""
    process = Process(store, clock)
    await process.lease.begin()
    clock.tick(X * 0.979)
    assert process.lease.is_fresh()
    clock.tick(X * 0.002)
    assert not process.lease.is_fresh()


async def test_tombstone_and_lease_come_in_one_step(store: Members, clock: Clock) -> None:
    """A process with the new lease has the tombstone: no cached entry is used in between."""
    process = Process(store, clock)
    await process.lease.begin()
    read_at = store.seq
    clock.tick(X)
    store.commit("key_a")
    await process.lease.revalidate()
    assert process.lease.is_fresh()
    assert not process.accepts("key_a", read_at)


async def test_a_revoke_waits_until_every_member_acknowledged(
    store: Members, processes: list[Process]
) -> None:
    """It returns when all have acknowledged, and says so."""
    read_at = store.seq
    assert all(process.accepts("key_a", read_at) for process in processes)
    seq = store.commit("key_a")
    receipt = await processes[0].propagation.publish(seq)
    assert receipt == Receipt(seq, acknowledged=3, members=3, bound_seconds=0.0)
    assert not any(process.accepts("key_a", read_at) for process in processes)


async def test_a_revoke_that_does_not_wait_says_how_long_it_may_take(
    store: Members, processes: list[Process]
) -> None:
    """The receipt bounds it by X, and the notice was published."""
    seq = store.commit("key_a")
    receipt = await processes[0].propagation.publish(seq, wait=False)
    assert receipt.bound_seconds == X
    assert receipt.acknowledged == 0


@pytest.mark.long
async def test_a_process_that_is_cut_off_is_waited_for_until_its_lease_is_over(
    store: Members, processes: list[Process], clock: Clock
) -> None:
    """The revoke takes X; then the process uses no cached entry, and its row is gone."""
    lost = processes[2]
    read_at = store.seq
    store.cut_off.add(lost.lease._member)
    began = clock()
    receipt = await processes[0].propagation.publish(store.commit("key_a"))
    assert (receipt.acknowledged, receipt.members) == (2, 3)
    assert X <= clock() - began <= X * 1.2
    assert not lost.accepts("key_a", read_at)
    assert lost.lease._member not in store.members


@pytest.mark.long
async def test_a_dead_process_costs_one_revoke(
    store: Members, processes: list[Process], clock: Clock
) -> None:
    """The second revoke after a kill -9 does not wait for it any more."""
    await store.leases.join("killed", 0, seconds=X)
    await processes[0].propagation.publish(store.commit("key_a"))
    began = clock()
    receipt = await processes[0].propagation.publish(store.commit("key_b"))
    assert clock() - began < X / 4
    assert (receipt.acknowledged, receipt.members) == (3, 3)


async def test_a_hundred_that_left_cost_nothing(
    store: Members, processes: list[Process], clock: Clock
) -> None:
    """A rolling restart: every old worker removes its membership, so no revoke waits for it."""
    for _ in range(100):
        old = Process(store, clock)
        await old.lease.begin()
        await old.lease.end()
        assert not old.lease.is_fresh()
    began = clock()
    await processes[0].propagation.publish(store.commit("key_a"))
    assert clock() - began < X / 4
    assert len(store.members) == 3


@pytest.mark.long
async def test_a_process_that_was_granted_something_meanwhile_is_not_removed(
    store: Members, processes: list[Process], clock: Clock
) -> None:
    """Its lease may still run, so later revokes have to wait for it as well."""
    await store.leases.join("slow", 0, seconds=X)

    def granted(member: str) -> None:
        store.members["slow"][0] += 1  # it polls, but the answer never arrives

    store.on_poll = granted
    await processes[0].propagation.publish(store.commit("key_a"))
    for _ in range(3):
        await processes[1].lease.renew()
    assert "slow" in store.members


async def test_a_removed_member_rejoins(
    store: Members, processes: list[Process], caplog: pytest.LogCaptureFixture
) -> None:
    """A process that comes back holds no lease until it has a new name and the tombstones."""
    back = processes[2]
    read_at = store.seq
    name = back.lease._member
    del store.members[name]
    store.commit("key_a")
    await back.lease.renew()
    assert back.lease._member != name
    assert back.lease._member in store.members
    assert not back.accepts("key_a", read_at)
    assert "rejoining" in caplog.text


async def test_lost_notices_only_cost_time(
    store: Members, processes: list[Process], clock: Clock
) -> None:
    """Without notices every process polls by itself, well before X."""
    for process in processes:
        process.deaf = True
    seq = store.commit("key_a")
    await asyncio.gather(*(process.lease.renew() for process in processes))
    receipt = await processes[0].propagation.publish(seq)
    assert receipt.acknowledged == 3


async def test_a_notice_costs_the_store_one_poll_of_each_member(
    store: Members, processes: list[Process], clock: Clock
) -> None:
    """The revoker reads, for all; every member acknowledges, and without invalidations none
    writes. A key that was created just before is among the invalidations."""
    polls: list[str] = []
    store.on_poll = polls.append
    store.reads = 0
    store.commit("key_made_before")
    seq = store.commit("key_a")
    await processes[0].propagation.publish(seq)
    assert sorted(polls) == sorted(process.lease._member for process in processes)
    assert store.reads == 1
    for process in processes:
        assert await process.lease.renew(changes_only=True) is False
    assert len(polls) == 3


async def test_endless_notices_do_not_keep_a_lease_from_being_renewed(
    store: Members, clock: Clock
) -> None:
    """A client that can publish in Redis can do so for ever; leases are renewed anyway."""
    process = Process(store, clock)
    await process.lease.begin()
    for _ in range(40):
        clock.tick(X / 10)
        await process.lease.renew(changes_only=True)
        assert process.lease.is_fresh()


async def test_a_poll_that_was_sent_before_a_call_does_not_answer_it(
    store: Members, clock: Clock
) -> None:
    """A caller that arrives while a poll is under way waits for the next one, and shares it."""
    process = Process(store, clock)
    await process.lease.begin()
    polls: list[str] = []
    store.on_poll = polls.append
    early = asyncio.create_task(process.lease.renew())
    await asyncio.sleep(0)
    late = [asyncio.create_task(process.lease.renew()) for _ in range(20)]
    await asyncio.gather(early, *late)
    assert len(polls) == 2


async def test_silence_counts_from_after_the_first_look(
    store: Members, processes: list[Process], clock: Clock
) -> None:
    """A look that takes long has counted grants that were made while it was under way: each member
    with such a grant keeps its row, or a later revoke would not wait for it."""
    await store.leases.join("slow", 0, seconds=X)
    look = store.leases.laggards

    async def slow_look(seq: int, seconds: float) -> Laggards:
        if clock() < committed_at + X / 2:
            clock.tick(X / 2)
            store.members["slow"][0] += 1  # granted just before the look reads its row
        return await look(seq, seconds)

    store.leases.laggards = slow_look  # type: ignore[method-assign]
    committed_at = clock()
    await processes[0].propagation.publish(store.commit("key_a"))
    assert committed_at + X <= clock() <= committed_at + 1.25 * X
    assert "slow" in store.members


@pytest.mark.long
async def test_a_revoke_whose_looks_all_fail_waits_for_time_alone(
    store: Members, processes: list[Process], clock: Clock
) -> None:
    """The change is committed: X later no lease from before it is left."""

    async def fail(seq: int, seconds: float) -> Laggards:
        clock.tick(X / 20)
        raise StoreUnavailable("cut off by the test")

    store.leases.laggards = fail  # type: ignore[method-assign]
    committed_at = clock()
    receipt = await processes[0].propagation.publish(store.commit("key_a"))
    assert clock() >= committed_at + X
    assert receipt.bound_seconds == 0.0


async def test_a_young_server_is_waited_for(
    store: Members, processes: list[Process], clock: Clock
) -> None:
    """A standby that took over may not know a member whose lease still runs: until this server has
    committed for X, a revoke waits X, whatever the members acknowledge."""
    store.server_age_seconds = 0.0
    committed_at = clock()
    store.on_look = lambda: clock.tick(X / 20)
    receipt = await processes[0].propagation.publish(store.commit("key_a"))
    assert committed_at + X <= clock() <= committed_at + 1.2 * X
    assert receipt.acknowledged == 3
    store.server_age_seconds = X
    committed_at = clock()
    await processes[0].propagation.publish(store.commit("key_b"))
    assert clock() < committed_at + X / 2


async def test_a_revoke_that_a_failover_loses_is_not_answered(
    store: Members, processes: list[Process]
) -> None:
    """Its sequence number is given out again, and acknowledged by all: they know another change."""
    store.row_id = 8
    seq = ChangeSeq.of(Position(store.commit("key_a"), 7))
    with pytest.raises(StoreUnavailable, match="lost"):
        await processes[0].propagation.publish(seq)
    store.row_id = 7
    receipt = await processes[0].propagation.publish(seq)
    assert receipt.acknowledged == 3


class Unmoved(Invalidations):
    """The broken twin: what one server answered counts on the next one."""

    def forget_reads(self) -> None:
        return


@pytest.mark.parametrize("kind", [Invalidations, Unmoved])
async def test_another_server_ends_what_was_read_before(
    store: Members, clock: Clock, kind: type[Invalidations]
) -> None:
    """The log of a standby that takes over may agree with what this process knows, and still lack
    a later change that gave access back to a key."""
    process = Process(store, clock)
    process.invalidations = process.lease._invalidations = kind(lambda found: None)
    await process.lease.begin()
    history, version = process.invalidations.history, process.invalidations.version
    await process.lease.poll()
    assert process.invalidations.history is history
    store.server = "second"
    await process.lease.poll()
    is_forgotten = process.invalidations.history is not history
    assert is_forgotten == (process.invalidations.version is not version)
    assert is_forgotten == (kind is Invalidations)
