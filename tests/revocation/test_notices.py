"""Notices: applied before the next poll, acknowledged against the store's own log, never forged."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial

import pytest

from keylatch.core.decisions import Allow, Deny, KeyRecord, Reason
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.revocation.invalidations import Break, Invalidations
from keylatch.revocation.notices import Notice, Signer
from keylatch.settings import Settings
from keylatch.storage.store import Invalidation, InvalidationBatch, Store
from tests.revocation.test_lease import Members, Process, X
from tests.support.clock import Clock
from tests.support.servers import PostgresServer, RedisServer, eventually

pytestmark = pytest.mark.anyio
EPOCH = "epoch"


def notice_of(since: int, *lines: Invalidation, epoch: str = EPOCH) -> Notice:
    """What was committed after `since`."""
    return Notice(since, InvalidationBatch(lines[-1][0], epoch, True, lines))


def invalidations_at(
    seq: int, kind: type[Invalidations] = Invalidations
) -> tuple[Invalidations, list[Break]]:
    """`Invalidations` that are complete up to `seq`, and the breaks that they found."""
    breaks: list[Break] = []
    invalidations = kind(breaks.append)
    invalidations.apply(InvalidationBatch(seq, EPOCH, True))
    return invalidations, breaks


class TestSeal:
    """Who wrote it, and nothing else."""

    def test_what_was_closed_is_opened(self) -> None:
        """By the newest pepper and by the one before it: peppers rotate."""
        notice = notice_of(
            5,
            Invalidation(6, "key_a", None),
            Invalidation(7, None, ""),
            Invalidation(9, None, "acme"),
        )
        assert Signer([b"new", b"old"]).verify(Signer([b"new"]).sign(notice)) == notice
        assert Signer([b"new", b"old"]).verify(Signer([b"old"]).sign(notice)) == notice

    def test_a_notice_without_the_pepper_is_rejected(self) -> None:
        """Another pepper, any byte changed, bytes missing, nothing, noise, or far too much."""
        signer = Signer([b"pepper"])
        signed = signer.sign(notice_of(5, Invalidation(6, "key_a", None)))
        assert signer.verify(signed)
        forged = [
            Signer([b"guess"]).sign(notice_of(5, Invalidation(6, "key_a", None))),
            b"",
            b"{}",
            b"\xff" * 100,
        ]
        for at, byte in enumerate(signed):
            forged.append(signed[:at] + bytes([byte ^ 1]) + signed[at + 1 :])
        forged += [signed[:-1], signed + b" ", signed[64:], b"0" * 10_000_000]
        assert {signer.verify(each) for each in forged} == {None}

    def test_a_notice_of_an_earlier_version_makes_a_process_poll(self) -> None:
        """While a deployment is upgraded: it has no row ids, and to read it would end the task that
        receives notices."""
        body = b'["epoch",5,6,[[6,"key_a",null]]]'
        derived = hmac.digest(b"pepper", b"keylatch: MAC of notices", "sha256")
        signed = hmac.digest(derived, body, "sha256").hex().encode() + body
        assert Signer([b"pepper"]).verify(signed) is None

    def test_too_much_for_a_notice_is_not_published(self) -> None:
        """PostgreSQL's NOTIFY takes less than 8,000 bytes; the others look then."""
        lines = [Invalidation(number, f"key_{number:064}", None) for number in range(200)]
        assert Signer([b"pepper"]).sign(notice_of(-1, *lines)) == b""
        assert Signer([b"pepper"]).sign(None) == b""


class TestFeed:
    """What a process applies of it."""

    def test_a_notice_without_a_gap_is_applied_at_once(self) -> None:
        """Their tombstones are there; what is known for sure waits for the store."""
        invalidations, _ = invalidations_at(5)
        state = invalidations.version
        assert invalidations.add_pending(
            notice_of(3, Invalidation(4, "key_z", None), Invalidation(6, "key_a", None))
        )
        assert not invalidations.accepts("key_a", "acme", 5)
        assert (invalidations.seq, invalidations.pending) == (5, (Invalidation(6, "key_a", None),))
        assert invalidations.version is not state

    @pytest.mark.parametrize(
        "notice",
        [
            notice_of(6, Invalidation(7, "key_a", None)),  # a gap: what was 6?
            notice_of(5, Invalidation(6, "key_a", None), epoch="another"),
            notice_of(3, Invalidation(4, "key_a", None)),  # played again
            notice_of(4, Invalidation(5, "key_a", None)),
            notice_of(5, Invalidation(6, None, None)),  # about everything at once
            notice_of(
                5, Invalidation(6, None, "")
            ),  # many new keys: is one of them the first imported one?
            Notice(
                5, InvalidationBatch(7, EPOCH, True, (Invalidation(6, "key_a", None),))
            ),  # not all of it
            Notice(5, InvalidationBatch(7, EPOCH, True)),
        ],
    )
    def test_anything_else_is_a_call_to_look(self, notice: Notice) -> None:
        """A gap, another epoch, what is known, what does not add up: nothing is applied."""
        invalidations, _ = invalidations_at(5)
        state = invalidations.version
        assert not invalidations.add_pending(notice)
        assert invalidations.accepts("key_a", "acme", 5)
        assert (invalidations.seq, invalidations.pending, invalidations.version) == (5, (), state)

    def test_notices_may_overtake_each_other(self) -> None:
        """The later one contains what the earlier one does."""
        invalidations, _ = invalidations_at(5)
        assert invalidations.add_pending(
            notice_of(5, Invalidation(6, "key_a", None), Invalidation(7, "key_b", None))
        )
        assert invalidations.add_pending(notice_of(5, Invalidation(6, "key_a", None)))
        assert invalidations.known.seq == 7
        poll = InvalidationBatch(
            6, EPOCH, True, (Invalidation(6, "key_a", None),)
        )  # sent before the notice
        invalidations.apply(poll)
        assert (invalidations.seq, invalidations.pending) == (6, (Invalidation(7, "key_b", None),))

    def test_an_older_answer_removes_no_tombstone(self) -> None:
        """A notice of seq 7 stays applied, though a poll up to seq 6 ends later; a twin that
        takes over the last number that it got accepts an entry from between."""

        class Forgetful(Invalidations):
            def _add_tombstones(self, lines: Iterable[Invalidation]) -> None:
                self._floor_and_tombstones[1].update(
                    {row.key_id: row.seq for row in lines if row.key_id is not None}
                )

        def accepts_old_entry(kind: type[Invalidations]) -> bool:
            invalidations, _ = invalidations_at(5, kind)
            invalidations.add_pending(
                notice_of(5, Invalidation(6, "key_a", None), Invalidation(7, "key_a", None))
            )
            invalidations.apply(
                InvalidationBatch(6, EPOCH, True, (Invalidation(6, "key_a", None),))
            )
            return invalidations.accepts("key_a", "acme", 6)

        assert not accepts_old_entry(Invalidations)
        assert accepts_old_entry(Forgetful)

    def test_applied_notices_are_dropped_with_the_tombstones(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the floor takes their place, nothing is acknowledged by hearsay any more."""
        monkeypatch.setattr("keylatch.revocation.invalidations._MAX_TOMBSTONES", 1)
        invalidations, _ = invalidations_at(5)
        invalidations.add_pending(
            notice_of(5, Invalidation(6, "key_a", None), Invalidation(7, "key_b", None))
        )
        invalidations.apply(InvalidationBatch(6, EPOCH, True, (Invalidation(6, "key_a", None),)))
        assert invalidations.pending == ()

    @pytest.mark.parametrize(
        "answer",
        [
            InvalidationBatch(
                6, EPOCH, True, (Invalidation(6, "key_b", None),)
            ),  # the number was given out again
            InvalidationBatch(5, EPOCH, True),  # it was not yet
        ],
    )
    def test_a_store_that_contradicts_a_notice_was_restored(
        self, answer: InvalidationBatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A notice follows the commit, so such a store was restored, even if all processes were
        started since: no older entry is used, and the key is refused until the store is asked
        what it has lost."""
        invalidations, breaks = invalidations_at(5)
        revocation = Invalidation(6, "key_a", None, revokes="delete")
        invalidations.add_pending(notice_of(5, revocation))
        invalidations.apply(answer, min_seq=invalidations.known.seq)
        assert breaks == [Break((revocation,), EPOCH, 6)]
        assert (invalidations.seq, invalidations.pending) == (answer.seq, ())
        assert not invalidations.accepts("key_a", "acme", answer.seq)
        assert invalidations.accepts("key_c", "acme", answer.seq)
        assert invalidations.release(breaks[0].revocations, invalidations.history)
        assert invalidations.accepts("key_a", "acme", answer.seq)
        assert "restored from a backup" in caplog.text

    def test_an_answer_to_an_earlier_poll_contradicts_nothing(self) -> None:
        """A notice that arrived after the poll was sent may be missing in its answer."""
        invalidations, breaks = invalidations_at(5)
        reached = invalidations.known.seq
        invalidations.add_pending(notice_of(5, Invalidation(6, "key_a", None)))
        invalidations.apply(InvalidationBatch(5, EPOCH, True), reached)
        assert breaks == []
        assert invalidations.known.seq == 6


class Trusting(Members):
    """A broken twin of the store: acknowledges whatever a process claims to have applied."""

    def acknowledged(self, seq: int, pending: Sequence[Invalidation]) -> int:
        return pending[-1][0] if pending else seq


class Gullible(Invalidations):
    """A broken twin of `Invalidations`: applies notices with a gap before them."""

    def add_pending(self, notice: Notice) -> bool:
        return super().add_pending(Notice(self.seq, notice.batch))


@pytest.fixture
async def tasks() -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks: list[asyncio.Task[None]] = []
    yield tasks
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


class TestAcknowledging:
    """No member counts as having acknowledged by an old notice, or by one after a lost one.

    In these tests the victim's poll arrives, and its answer is lost: until its lease is over
    it uses what it had applied before, and the revoke must wait.
    """

    async def accepts_after_revoke(
        self,
        store: Members,
        kind: type[Invalidations],
        notice: Notice,
        tasks: list[asyncio.Task[None]],
    ) -> bool:
        """A revoker, and a victim that receives another notice than the revoker's; True if the
        victim accepts the key after the revoke was answered."""
        revoker, victim = processes = [Process(store, store.clock) for _ in range(2)]
        victim.invalidations = victim.lease._invalidations = kind(lambda found: None)
        revoker.others = [revoker]
        for process in processes:
            await process.lease.begin()
            tasks.append(asyncio.create_task(process.lease.run()))
        read_at = store.seq
        store.lost_answers.add(victim.lease._member)
        store.commit("key_a")
        seq = store.commit("key_b")
        victim.lease.on_notice(notice)
        await revoker.propagation.publish(seq)
        return victim.accepts("key_a", read_at)

    @pytest.mark.long
    async def test_an_old_notice_is_compared_with_the_log(
        self, clock: Clock, tasks: list[asyncio.Task[None]]
    ) -> None:
        """From before the store went back: genuine, of this epoch, and the next number."""
        old = notice_of(1, Invalidation(2, "key_z", None), Invalidation(3, "key_b", None))
        assert not await self.accepts_after_revoke(Members(clock), Invalidations, old, tasks)
        assert await self.accepts_after_revoke(Trusting(clock), Invalidations, old, tasks)

    @pytest.mark.long
    async def test_a_notice_with_a_gap_is_not_applied(
        self, clock: Clock, tasks: list[asyncio.Task[None]]
    ) -> None:
        """The notice before it was lost. The process sees the gap, and the store would as well."""
        later = notice_of(2, Invalidation(3, "key_b", None))
        assert not await self.accepts_after_revoke(Members(clock), Invalidations, later, tasks)
        assert not await self.accepts_after_revoke(Trusting(clock), Invalidations, later, tasks)
        assert not await self.accepts_after_revoke(Members(clock), Gullible, later, tasks)
        assert await self.accepts_after_revoke(Trusting(clock), Gullible, later, tasks)

    async def test_a_true_notice_is_acknowledged_in_one_poll(
        self, clock: Clock, tasks: list[asyncio.Task[None]]
    ) -> None:
        """Although the answer is lost, the victim knows, and the revoke waits for nothing."""
        began = clock()
        notice = notice_of(1, Invalidation(2, "key_a", None), Invalidation(3, "key_b", None))
        assert not await self.accepts_after_revoke(Members(clock), Invalidations, notice, tasks)
        assert clock() < began + X / 2


class TestPostgreSQL:
    """The comparison is one statement with the acknowledgement, on the real log."""

    @pytest.fixture
    async def store(self, postgres: PostgresServer) -> AsyncIterator[Store]:
        store = Store(postgres.new_database())
        await store.open(0)
        await store.leases.join("member", 0, seconds=5)
        yield store
        await store.close()

    async def test_only_what_the_log_says_is_acknowledged(self, store: Store) -> None:
        """Row by row, up to the last one applied; the answer is the log after the known number."""
        since = (await store.invalidations.since(2**62)).position
        record = KeyRecord("key_a", "acme", "ci", "FULL", "live", "kl_...abcd", True, True, 0, 0)
        _, first = await store.keys.add(record, "hashed")
        second = await store.organizations.set_active("acme", 0, False)
        assert second == first + 1 == since.seq + 2
        one, two = (await store.invalidations.since(since.seq)).invalidations
        assert (one[:3], two[:3]) == ((first, "key_a", None), (second, None, "acme"))
        for applied, known in {
            (): since.seq,
            (one,): first,
            (one, two): second,
            (two,): since.seq,  # a gap
            (two, one): since.seq,
            (one._replace(row_id=one.row_id + 1),): since.seq,  # of another history
            (one, two._replace(row_id=one.row_id)): since.seq,
            (one, two, two._replace(seq=second + 1)): since.seq,  # not yet
        }.items():
            poll = await store.leases.poll("member", since, 5, applied)
            assert (poll.is_member, poll.acknowledged_seq) == (True, known), applied
            assert poll.batch.invalidations == (one, two)
            assert list((await store.leases.laggards(known + 1, 5)).grants) == ["member"]
            assert (await store.leases.laggards(known, 5)).grants == {}
        assert not (await store.leases.poll("unknown", since, 5, (one,))).is_member

    async def test_a_process_that_knows_another_history_acknowledges_nothing(
        self, store: Store
    ) -> None:
        """Its sequence number exists in the log, as another row. What it had acknowledged of the
        other history, with a number that may be higher than all of this one, counts no more: a
        change that is made before its next poll would be answered too early."""
        record = KeyRecord("key_a", "acme", "ci", "FULL", "live", "kl_...abcd", True, True, 0, 0)
        _, first = await store.keys.add(record, "hashed")
        second = await store.organizations.set_active("acme", 0, False)
        [*_, one, two] = (await store.invalidations.since(0)).invalidations
        assert (await store.leases.poll("member", one.position, 5)).acknowledged_seq == first
        lost = two._replace(row_id=two.row_id + 1)
        for known, pending in ((lost.position, ()), (one._replace(row_id=1).position, (two,))):
            poll = await store.leases.poll("member", known, 5, pending)
            assert (poll.is_member, poll.acknowledged_seq) == (True, 0)
            assert list((await store.leases.laggards(first, 5)).grants) == ["member"]
        assert poll.batch.since_row_id == one.row_id
        assert (await store.leases.poll("member", two.position, 5)).acknowledged_seq == second

    async def test_notify_carries_its_payload(self, store: Store) -> None:
        """NOTIFY with its payload; the first call says that the connection is up."""
        received: asyncio.Queue[str] = asyncio.Queue()
        listening = asyncio.create_task(store.invalidations.listen(received.put_nowait))
        assert await asyncio.wait_for(received.get(), 10) == ""
        await store.invalidations.notify("x" * 7_999)
        assert await asyncio.wait_for(received.get(), 10) == "x" * 7_999
        listening.cancel()
        await asyncio.wait([listening])


class TestRedis:
    """Two processes, real notices, and an attacker who can read and write Redis."""

    @pytest.fixture
    async def engines(
        self, postgres: PostgresServer, redis_server: RedisServer
    ) -> AsyncIterator[list[Engine]]:
        url = postgres.new_database()
        # With a lease that outlasts the test, what is known early came by a notice.
        settings = Settings.load(store=url, redis=redis_server.url, lease=60.0, hasher="sha256")
        engines = [Engine(settings) for _ in range(2)]
        for engine in engines:
            await engine.start()
        with redis_server.client() as client:
            listening = partial(client.pubsub_numsub, channel(engines[0]))
            await asyncio.to_thread(eventually, lambda: listening()[0][1] == 2)
        yield engines
        for engine in engines:
            await engine.stop()

    async def test_who_writes_redis_can_only_make_them_look(
        self, engines: list[Engine], redis_server: RedisServer
    ) -> None:
        """Notices arrive and contain no token; forged ones, noise and old ones, a hundred of each,
        invalidate no other key and change nothing."""
        revoker, other = engines
        keyring = await revoker.keyring()
        revoked, kept = [await keyring.create("acme", name) for name in ("revoked", "kept")]
        for created in (revoked, kept):
            assert isinstance(await other.authenticate(bearer(created)), Allow)
        with redis_server.client() as client, client.pubsub() as tap:
            tap.subscribe(channel(other))
            assert tap.get_message(timeout=60)
            changed = await keyring.delete("acme", revoked.record.id)
            assert changed is not None
            assert changed.receipt.acknowledged == 2
            rung = tap.get_message(timeout=60)
            assert rung is not None
            published: bytes = rung["data"]
            assert revoked.record.id.encode() in published
            assert revoked.token.reveal().encode() not in published
            forged = published.replace(revoked.record.id.encode(), kept.record.id.encode())
            known = other._invalidations._floor_and_tombstones[1].copy()
            seq = other._invalidations.seq
            for _ in range(100):
                for message in (forged, published, b"", b"\0" * 9_000):
                    client.publish(channel(other), message)
        assert isinstance(await other.authenticate(bearer(kept)), Allow)
        assert await other.authenticate(bearer(revoked)) == Deny(Reason.REVOKED)
        await keyring.delete("acme", kept.record.id)  # received after all that
        assert await other.authenticate(bearer(kept)) == Deny(Reason.REVOKED)
        assert other._invalidations.seq == seq + 1
        assert other._invalidations._floor_and_tombstones[1] == {**known, kept.record.id: seq + 1}

    async def test_a_notice_from_before_a_backup_shows_the_restore(
        self, engines: list[Engine], redis_server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """All processes were started after it, so none knows; replaying an old notice causes
        a new epoch in which the notice is invalid, and no key is refused."""
        revoker, other = engines
        kept = await (await revoker.keyring()).create("acme", "kept")
        assert isinstance(await other.authenticate(bearer(kept)), Allow)
        log = await other.store.invalidations.since(0)
        then = Invalidation(log.seq + 1, kept.record.id, None)
        signer = Signer((await other.store.open(0)).peppers)
        published = signer.sign(notice_of(0, *log.invalidations, then, epoch=log.epoch))
        alarm = "and lost changes: did a standby take over, or was it restored from a backup?"
        with redis_server.client() as client:
            client.publish(channel(other), published)
            await asyncio.to_thread(eventually, lambda: alarm in caplog.text)
            assert other._opened is not None
            lost = other._opened.lost_revocations
            await asyncio.to_thread(eventually, lambda: lost.has_repeated_all)
            now = await other.store.invalidations.since(0)
            client.publish(channel(other), published)
        assert now.epoch != log.epoch
        assert now.seq > then[0]
        assert isinstance(await other.authenticate(bearer(kept)), Allow)
        assert (await other.store.invalidations.since(0)).seq == now.seq


def channel(engine: Engine) -> str:
    return f"keylatch:{{{engine.store.invalidations.database_hash}}}:invalidations"


def bearer(created: Created) -> list[bytes]:
    return [b"Bearer " + created.token.reveal().encode()]
