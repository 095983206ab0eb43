"""The life of a credential: which parts are used, which are not, and what is cached."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis, FakeServer
from sqlalchemy import Connection

from keylatch.authentication.authenticator import CacheMiss
from keylatch.authentication.hashing import CHEAPEST, Cost, Hasher, VerifyResult
from keylatch.authentication.keyset import Keyset, ReadAt
from keylatch.core import tokens
from keylatch.core.decisions import Allow, Deny, Reason, Requirement, principal_of
from keylatch.core.timestamps import datetime_of
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.errors import HashingBusy, QuotaExceeded, StoreUnavailable
from keylatch.management.keyring import Created
from keylatch.revocation.invalidations import Invalidations
from keylatch.settings import Settings
from keylatch.storage.invalidation_log import advance
from keylatch.storage.store import Found, NotFound, Poll, Store
from keylatch.storage.usage import UsageBatch
from tests.support.clock import Clock
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer

pytestmark = pytest.mark.anyio


class WatchedStore(Store):
    """A store that counts queries, can fail, and can delay an answer."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.finds = 0
        self.broken = False
        self.holding: asyncio.Event | None = None
        self.has_read = asyncio.Event()
        self._find, self._record = self.keys.find, self.usage.record
        self.keys.find = self.find  # type: ignore[method-assign]
        self.usage.record = self.record_last_used  # type: ignore[method-assign]

    async def find(self, key_id: str, anchor: int = 0) -> Found | NotFound:
        self.finds += 1
        if self.broken:
            raise StoreUnavailable("broken by the test")
        answer = await self._find(key_id, anchor)
        self.has_read.set()
        if self.holding is not None:
            await self.holding.wait()
        return answer

    async def record_last_used(
        self, last_used: Mapping[str, int], batch: UsageBatch | None = None
    ) -> None:
        if self.broken:
            raise StoreUnavailable("broken by the test")
        await self._record(last_used, batch)


class WatchedHasher(Hasher):
    """A hasher that counts what it verifies."""

    def __init__(self, cost: Cost = CHEAPEST) -> None:
        super().__init__("argon2id", cost)
        self.verified = 0
        self.full = False

    async def verify(self, stored: str, token: Token) -> VerifyResult:
        self.verified += 1
        if self.full:
            raise HashingBusy("filled by the test")
        return await super().verify(stored, token)


@pytest.fixture
def store(store_url: str) -> WatchedStore:
    return WatchedStore(store_url)


@pytest.fixture
def hasher() -> WatchedHasher:
    return WatchedHasher()


@pytest.fixture
async def engine(
    make_engine: MakeEngine, store: WatchedStore, hasher: WatchedHasher
) -> AsyncIterator[Engine]:
    engine = make_engine(store=store, hasher=hasher)
    await engine.start()
    yield engine
    store.broken = False
    await engine.stop()


@pytest.fixture
async def other(make_engine: MakeEngine) -> AsyncIterator[Engine]:
    """Another process's engine on the same store."""
    other = make_engine()
    await other.start()
    yield other
    await other.stop()


async def until(is_so: Callable[[], bool]) -> None:
    """Return once something that other threads do is so; the test's own time limit ends it."""
    while not is_so():  # noqa: ASYNC110 - threads set no event of this loop
        await asyncio.sleep(0.005)


async def create(engine: Engine, organization: str = "acme", **values: Any) -> Created:
    return await (await engine.keyring()).create(organization, "ci", **values)


async def revoke(engine: Engine, created: Created) -> None:
    assert await (await engine.keyring()).delete("acme", created.record.id)


def bearer(token: Token) -> list[bytes]:
    return [b"Bearer " + token.reveal().encode()]


async def with_other_secret(store: Store, token: Token) -> Token:
    """A token of the same key whose check and CRC are right and whose secret is not."""
    secrets = await store.open(0)
    head = token.reveal().rpartition("_")[0]
    body = f"{head}_{'A' * tokens.SECRET_LENGTH}"
    body += tokens._mac(secrets.mac_keys[0], body)
    return Token(body + tokens._crc(body))


class TestLookupOrder:
    """Costs: what a check may and may not do."""

    async def test_a_cold_key_costs_one_look_up_and_one_hash_and_then_nothing(
        self, engine: Engine, store: WatchedStore, hasher: WatchedHasher
    ) -> None:
        """The first check uses the store and argon2; all further ones neither."""
        created = await create(engine)
        assert isinstance(engine.authenticator.check_token_cached(created.token), CacheMiss)
        for _ in range(5):
            assert isinstance(await engine.authenticate(bearer(created.token)), Allow)
        assert isinstance(engine.authenticator.check_token_cached(created.token), Allow)
        assert (store.finds, hasher.verified) == (1, 1)

    async def test_a_hit_never_suspends(self, engine: Engine) -> None:
        """The first step of the coroutine is its last: no hop, no await that yields."""
        created = await create(engine)
        await engine.authenticate(bearer(created.token))
        with pytest.raises(StopIteration) as done:
            engine.authenticate(bearer(created.token)).send(None)
        assert isinstance(done.value.value, Allow)

    async def test_a_hundred_cold_requests_cost_one_hash(
        self, engine: Engine, store: WatchedStore, hasher: WatchedHasher
    ) -> None:
        """A herd on one cold key is one flight."""
        created = await create(engine)
        decisions = await asyncio.gather(
            *(engine.authenticate(bearer(created.token)) for _ in range(100))
        )
        assert all(isinstance(decision, Allow) for decision in decisions)
        assert (store.finds, hasher.verified) == (1, 1)

    async def test_forged_tokens_cost_nothing(
        self, engine: Engine, store: WatchedStore, hasher: WatchedHasher
    ) -> None:
        """Tokens that this store never minted are refused by check_token_cached alone."""
        forged = tokens.MacKeys([b"s" * 32]).mint("kl", "live")
        for token in (forged, Token("rubbish"), Token("kl_live_a_b"), Token("x" * 500)):
            assert engine.authenticator.check_token_cached(token) == Deny(Reason.FORGED)
        assert (store.finds, hasher.verified) == (0, 0)

    async def test_a_known_id_with_a_wrong_secret_costs_no_hash(
        self, engine: Engine, store: WatchedStore, hasher: WatchedHasher
    ) -> None:
        """The cached digest refuses it, and the good token stays good."""
        created = await create(engine)
        await engine.authenticate(bearer(created.token))
        wrong = await with_other_secret(store, created.token)
        assert engine.authenticator.check_token_cached(wrong) == Deny(Reason.WRONG_SECRET)
        assert isinstance(engine.authenticator.check_token_cached(created.token), Allow)
        assert hasher.verified == 1

    async def test_a_wrong_secret_for_a_cold_id_is_hashed_once(
        self, engine: Engine, store: WatchedStore, hasher: WatchedHasher
    ) -> None:
        """Then the negative cache has it; the valid token is not affected."""
        created = await create(engine)
        wrong = await with_other_secret(store, created.token)
        for _ in range(5):
            assert await engine.authenticate(bearer(wrong)) == Deny(Reason.WRONG_SECRET)
        assert hasher.verified == 1
        assert isinstance(await engine.authenticate(bearer(created.token)), Allow)

    async def test_a_revoked_key_that_was_cached_costs_one_look_up(
        self, engine: Engine, store: WatchedStore, hasher: WatchedHasher
    ) -> None:
        """Its cached entry is dropped, so that the negative entry is found in its place."""
        created = await create(engine)
        await engine.authenticate(bearer(created.token))
        await revoke(engine, created)
        for _ in range(5):
            assert await engine.authenticate(bearer(created.token)) == Deny(Reason.REVOKED)
        assert (store.finds, hasher.verified) == (2, 1)


class Unmoved(Invalidations):
    """A broken twin: it learns, and does not show it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "version":
            super().__setattr__(name, value)


class TestRevocation:
    """What is cached, and for how long."""

    async def test_a_revoke_elsewhere_holds_from_the_next_check_on(
        self, engine: Engine, other: Engine
    ) -> None:
        """G1: no process accepts the key after the answer of the delete."""
        created = await create(engine)
        await engine.authenticate(bearer(created.token))
        await revoke(other, created)
        assert await engine.authenticate(bearer(created.token)) == Deny(Reason.REVOKED)

    async def test_the_twin_that_does_not_read_seq_is_caught(
        self, engine: Engine, other: Engine
    ) -> None:
        """Without the sequence number the same steps accept a revoked key."""
        created = await create(engine)
        await engine.authenticate(bearer(created.token))
        engine._freshness.now_if_fresh = lambda: 0.0  # type: ignore[method-assign]
        await revoke(other, created)
        assert isinstance(await engine.authenticate(bearer(created.token)), Allow)

    async def test_the_twin_whose_version_never_changes_is_caught(
        self, engine: Engine, other: Engine
    ) -> None:
        """A cached entry would be used for ever, whatever tombstones there are."""
        created = await create(engine)
        await engine.authenticate(bearer(created.token))
        engine._invalidations.__class__ = Unmoved
        await revoke(other, created)
        assert isinstance(await engine.authenticate(bearer(created.token)), Allow)
        assert not engine._invalidations.accepts(created.record.id, "acme", as_of=0)

    async def test_a_read_in_flight_cannot_reactivate_a_revoked_key(
        self, engine: Engine, other: Engine, store: WatchedStore
    ) -> None:
        """Read as active, revoked, then delivered: neither the late answer nor any cache
        accepts it."""
        created = await create(engine)
        store.holding = asyncio.Event()
        late = asyncio.create_task(engine.authenticate(bearer(created.token)))
        await store.has_read.wait()
        await revoke(other, created)
        store.holding.set()
        assert await late == Deny(Reason.REVOKED)
        assert await engine.authenticate(bearer(created.token)) == Deny(Reason.REVOKED)

    async def test_a_late_caller_of_a_single_flight_validates_its_result(
        self, engine: Engine, other: Engine, store: WatchedStore
    ) -> None:
        """A request that starts after the delete is refused, though its flight left before."""
        created = await create(engine)
        store.holding = asyncio.Event()
        early = asyncio.create_task(engine.authenticate(bearer(created.token)))
        await store.has_read.wait()
        await revoke(other, created)
        joined = asyncio.create_task(engine.authenticate(bearer(created.token)))
        await asyncio.sleep(0)
        store.holding.set()
        assert await joined == Deny(Reason.REVOKED)
        await early

    async def test_every_kind_of_change_holds_at_once(self, engine: Engine, other: Engine) -> None:
        """Disabled, enabled, permission, expiry: the next check knows."""
        created = await create(engine)
        keyring = await other.keyring()
        sends = Requirement.all_of(["SENDING"])
        steps: list[tuple[dict[str, Any], Requirement, object]] = [
            ({"active": False}, sends, Deny(Reason.DISABLED)),
            ({"active": True}, sends, Allow),
            ({"permission": "SENDING"}, sends, Allow),
            (
                {"permission": "SENDING"},
                Requirement(frozenset({"FULL"})),
                Deny(Reason.INSUFFICIENT_SCOPE, "FULL"),
            ),
        ]
        for change, requirement, expected in steps:
            await keyring.change("acme", created.record.id, **change)
            decision = await engine.authenticate(bearer(created.token), requirement)
            assert decision == expected or type(decision) is expected

    async def test_a_disabled_organisation_disables_its_keys(
        self, engine: Engine, other: Engine
    ) -> None:
        """One row of the log refuses all keys of the organisation, cached or not."""
        created, other_key = await create(engine), await create(engine, "rival")
        for each in (created, other_key):
            await engine.authenticate(bearer(each.token))

        def disable(connection: Connection) -> None:
            connection.exec_driver_sql(
                "UPDATE keylatch_organizations SET active = false WHERE id = 'acme'"
            )
            advance(connection, 0, organization_id="acme")

        await other.store._database.write(disable)
        assert await engine.authenticate(bearer(created.token)) == Deny(
            Reason.ORGANIZATION_DISABLED
        )
        assert isinstance(await engine.authenticate(bearer(other_key.token)), Allow)

    async def test_expiry_is_judged_at_each_use(
        self, engine: Engine, clock: Clock, store: WatchedStore
    ) -> None:
        """A cached key ends with its last millisecond, without an invalidation."""
        expires_at = int(clock() * 1000) + 60_000
        created = await create(engine, expires_at=datetime_of(expires_at))
        await engine.authenticate(bearer(created.token))
        clock.tick(59.999)
        assert isinstance(engine.authenticator.check_token_cached(created.token), Allow)
        clock.tick(0.001)
        assert engine.authenticator.check_token_cached(created.token) == Deny(Reason.EXPIRED)
        assert store.finds == 1

    async def test_a_key_that_was_just_created_is_not_hidden(
        self, engine: Engine, other: Engine
    ) -> None:
        """A look-up may have come a moment too early."""
        keyring = await other.keyring()
        token = keyring._mac_keys.mint("kl", "live")
        assert await engine.authenticate(bearer(token)) == Deny(Reason.UNKNOWN)
        created = await create(other)
        record = replace(created.record, id=token.key_id)
        await other.store.keys.add(record, await other.hasher.hash(token))
        assert isinstance(await engine.authenticate(bearer(token)), Allow)

    async def test_keys_of_another_environment_are_not_welcome(
        self, make_engine: MakeEngine
    ) -> None:
        """An engine for live refuses a test key as if it did not exist."""
        engine = make_engine(environment="live")
        live, test = await create(engine), await create(engine, environment="test")
        assert isinstance(await engine.authenticate(bearer(live.token)), Allow)
        assert await engine.authenticate(bearer(test.token)) == Deny(Reason.WRONG_ENVIRONMENT)
        await engine.stop()


class TestFailure:
    """No fault turns a valid key into 401, and no fault is cached."""

    async def test_a_broken_store_is_unavailable_and_forgotten(
        self, engine: Engine, store: WatchedStore
    ) -> None:
        """An error writes to no cache: when the store is back, so are the keys."""
        created = await create(engine)
        store.broken = True
        assert await engine.authenticate(bearer(created.token)) == Deny(Reason.UNAVAILABLE)
        store.broken = False
        assert isinstance(await engine.authenticate(bearer(created.token)), Allow)

    async def test_a_full_hash_queue_is_busy_and_cached_keys_are_unaffected(
        self, engine: Engine, hasher: WatchedHasher
    ) -> None:
        """Cold keys get 503; warm ones do not need a hash."""
        warm, cold = await create(engine), await create(engine)
        await engine.authenticate(bearer(warm.token))
        hasher.full = True
        assert await engine.authenticate(bearer(cold.token)) == Deny(Reason.BUSY)
        assert isinstance(await engine.authenticate(bearer(warm.token)), Allow)
        hasher.full = False
        assert isinstance(await engine.authenticate(bearer(cold.token)), Allow)

    async def test_a_damaged_hash_is_unavailable(self, engine: Engine, store: WatchedStore) -> None:
        """A row that cannot be read is no decision on the key."""
        created = await create(engine)
        found = await store.keys.find(created.record.id)
        assert isinstance(found, Found)
        await store.keys.replace_hash(created.record.id, found.hash, "$argon2id$damaged")
        assert await engine.authenticate(bearer(created.token)) == Deny(Reason.UNAVAILABLE)

    async def test_a_store_that_is_late_is_waited_for(
        self,
        make_engine: MakeEngine,
        tmp_path: Path,
        clock: Clock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The engine starts without it, answers 503, says why once, and tries again soon."""
        folder = tmp_path / "late"
        engine = make_engine(store=Store(f"sqlite:///{folder}/keys.db"))
        await engine.start()
        token = tokens.MacKeys([b"k" * 32]).mint("kl", "live")
        assert await engine.authenticate(bearer(token)) == Deny(Reason.UNAVAILABLE)
        clock.tick(0.11)
        assert await engine.authenticate(bearer(token)) == Deny(Reason.UNAVAILABLE)
        assert caplog.text.count("error: the store failed") == 1
        folder.mkdir()
        assert await engine.authenticate(bearer(token)) == Deny(Reason.UNAVAILABLE)
        clock.tick(0.11)
        assert await engine.authenticate(bearer(token)) == Deny(Reason.FORGED)
        await engine.stop()


class TestLifecycle:
    """Start, stop, and everything that must survive it."""

    async def test_a_graceful_stop_loses_no_use(
        self, engine: Engine, other: Engine, clock: Clock
    ) -> None:
        """A use just before the stop is in the store after it."""
        used, unused = await create(engine), await create(engine)
        await engine.authenticate(bearer(used.token))
        now_ms = int(clock() * 1000)
        await engine.stop()
        keyring = await other.keyring()
        found = {key.id: key.record.last_used for key in await keyring.list("acme")}
        assert found == {used.record.id: now_ms, unused.record.id: None}

    async def test_only_good_keys_leave_a_trace(self, engine: Engine, other: Engine) -> None:
        """A key whose permission does not suffice was used; a disabled one was not."""
        sending, disabled = await create(engine, permission="SENDING"), await create(engine)
        await (await other.keyring()).change("acme", disabled.record.id, active=False)
        await engine.authenticate(bearer(sending.token), Requirement(frozenset({"FULL"})))
        await engine.authenticate(bearer(disabled.token))
        await engine.stop()
        keyring = await other.keyring()
        used = {key.id for key in await keyring.list("acme") if key.last_used}
        assert used == {sending.record.id}

    async def test_an_engine_can_be_started_again(self, engine: Engine) -> None:
        """Stopping closes everything; the next check opens it again."""
        created = await create(engine)
        await engine.stop()
        assert isinstance(await engine.authenticate(bearer(created.token)), Allow)

    async def test_two_engines_in_one_process_do_not_meet(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        """No global state: another store's keys are unknown."""
        second = Engine(Settings.load(store=f"sqlite:///{tmp_path}/second.db", hasher="sha256"))
        created = await create(second)
        assert isinstance(await second.authenticate(bearer(created.token)), Allow)
        assert await engine.authenticate(bearer(created.token)) == Deny(Reason.FORGED)
        await second.stop()

    async def test_hashes_are_upgraded_on_use(
        self, make_engine: MakeEngine, engine: Engine, store: WatchedStore
    ) -> None:
        """A key that was hashed at another cost is hashed anew when it is used, once."""
        created = await create(engine)
        dearer = make_engine(hasher=WatchedHasher(Cost(memory_kib=16, passes=2)))
        assert isinstance(await dearer.authenticate(bearer(created.token)), Allow)
        await dearer.stop()
        found = await store.keys.find(created.record.id)
        assert isinstance(found, Found)
        assert "m=16,t=2" in found.hash
        assert isinstance(await engine.authenticate(bearer(created.token)), Allow)


class TestSharedCache:
    """Redis, between two engines."""

    @pytest.fixture
    def redis(self) -> FakeServer:
        return FakeServer()

    async def test_what_one_process_proved_another_need_not(
        self, make_engine: MakeEngine, redis: FakeServer
    ) -> None:
        """A second process, or the same one after a restart, uses Redis and not argon2."""
        first = make_engine(redis=FakeAsyncRedis(server=redis))
        hasher = WatchedHasher()
        second = make_engine(redis=FakeAsyncRedis(server=redis), hasher=hasher)
        created = await create(first)
        await first.authenticate(bearer(created.token))
        await first.stop()
        assert isinstance(await second.authenticate(bearer(created.token)), Allow)
        assert hasher.verified == 0
        await second.stop()

    async def test_what_redis_says_is_judged_by_the_store(
        self, make_engine: MakeEngine, redis: FakeServer
    ) -> None:
        """An old value put back after the revoke is older than the tombstone, so refused."""
        first = make_engine(redis=FakeAsyncRedis(server=redis))
        client = FakeAsyncRedis(server=redis)
        created = await create(first)
        await first.authenticate(bearer(created.token))
        await first.stop()
        (name,) = await client.keys("*")
        old: Any = await client.get(name)
        second = make_engine(redis=FakeAsyncRedis(server=redis))
        await revoke(second, created)
        assert await client.get(name) != old
        await client.set(name, old)
        assert await second.authenticate(bearer(created.token)) == Deny(Reason.REVOKED)
        await second.stop()
        await client.aclose()


class TestPostgreSQL:
    """The same promises on PostgreSQL, where processes hold leases."""

    @pytest.fixture
    def store_url(self, postgres: PostgresServer) -> str:
        return postgres.new_database()

    async def test_a_warm_key_costs_nothing(
        self, engine: Engine, store: WatchedStore, hasher: WatchedHasher
    ) -> None:
        """While the lease lasts, a hit needs no I/O and never suspends."""
        created = await create(engine)
        await engine.authenticate(bearer(created.token))
        with pytest.raises(StopIteration) as done:
            engine.authenticate(bearer(created.token)).send(None)
        assert isinstance(done.value.value, Allow)
        assert (store.finds, hasher.verified) == (1, 1)

    async def test_a_revoke_elsewhere_holds_from_its_answer_on(
        self, engine: Engine, other: Engine
    ) -> None:
        """G2: the delete returns when every process knows."""
        created = await create(engine)
        await engine.authenticate(bearer(created.token))
        changed = await (await other.keyring()).delete("acme", created.record.id)
        assert changed is not None
        receipt = changed.receipt
        assert (receipt.acknowledged, receipt.members, receipt.bound_seconds) == (2, 2, 0.0)
        assert isinstance(engine.authenticator.check_token_cached(created.token), CacheMiss)
        assert await engine.authenticate(bearer(created.token)) == Deny(Reason.REVOKED)

    async def test_a_read_in_flight_cannot_reactivate_a_revoked_key(
        self, engine: Engine, other: Engine, store: WatchedStore
    ) -> None:
        """Read as active, revoked, then delivered: refused."""
        created = await create(engine)
        store.holding = asyncio.Event()
        late = asyncio.create_task(engine.authenticate(bearer(created.token)))
        await store.has_read.wait()
        await revoke(other, created)
        store.holding.set()
        assert await late == Deny(Reason.REVOKED)

    async def test_when_the_lease_is_over_and_cannot_be_renewed_it_is_unavailable(
        self, engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch, store: WatchedStore
    ) -> None:
        """A cached key is good for X without the store, then 503; never 401, never 200."""
        created = await create(engine)
        await engine.authenticate(bearer(created.token))

        async def fail(*question: object) -> Poll:
            raise StoreUnavailable("broken by the test")

        monkeypatch.setattr(store.leases, "poll", fail)
        clock.tick(0.5)
        assert isinstance(await engine.authenticate(bearer(created.token)), Allow)
        clock.tick(0.5)
        assert await engine.authenticate(bearer(created.token)) == Deny(Reason.UNAVAILABLE)
        monkeypatch.undo()
        assert isinstance(await engine.authenticate(bearer(created.token)), Allow)

    async def test_a_suspended_process_asks_before_it_answers(
        self, engine: Engine, other: Engine, clock: Clock
    ) -> None:
        """Stopped, revoked meanwhile, continued: the first check finds the lease over."""
        created = await create(engine)
        await engine.authenticate(bearer(created.token))
        await engine._tasks.stop()
        keyring = await other.keyring()
        await keyring.delete("acme", created.record.id, wait=False)
        clock.tick(3600)
        assert await engine.authenticate(bearer(created.token)) == Deny(Reason.REVOKED)

    async def test_expiry_is_judged_on_the_stores_time(self, engine: Engine, clock: Clock) -> None:
        """A wall clock that is far ahead does not end a key that has an hour left."""
        soon = int(time.time() * 1000) + 3_600_000
        created = await create(engine)
        assert clock() > time.time() + 3_600
        changed = await engine.store.keys.change("acme", created.record.id, 0, {"expires_at": soon})
        assert changed is not None
        assert isinstance(await engine.authenticate(bearer(created.token)), Allow)


class GatedHasher(Hasher):
    """A hasher whose new tokens wait for the test, each on a thread or in the queue."""

    def __init__(self) -> None:
        super().__init__("argon2id", CHEAPEST, workers=2)
        self.gate = threading.Event()

    def _hash_sync(self, token: Token) -> str:
        self.gate.wait(30)
        return super()._hash_sync(token)


class OneHashPool(GatedHasher):
    """A broken twin: new tokens take the threads and the queue of checks."""

    async def hash(self, token: Token) -> str:
        return await self._hash(token, self._check_pool)


class TestSharedWithManagement:
    """What one tenant's management does to another tenant's checks."""

    @pytest.mark.parametrize("kind", [GatedHasher, OneHashPool])
    async def test_creates_of_one_make_no_cold_key_of_another_busy(
        self, make_engine: MakeEngine, kind: type[GatedHasher]
    ) -> None:
        """80 creates by an operator, who has no limit, while 40 cold keys are checked: 0 of these
        are refused for it. With the twin all are."""
        full = 66 if kind is OneHashPool else 65  # threads, and the queue
        engine = make_engine(hasher=(hasher := kind()))
        hasher.gate.set()
        cold = [await create(engine, "rival") for _ in range(40)]
        hasher.gate.clear()
        creating = [asyncio.create_task(create(engine, "acme")) for _ in range(80)]
        await until(lambda: sum(map(asyncio.Task.done, creating)) == 80 - full)
        decisions = await asyncio.gather(*(engine.authenticate(bearer(key.token)) for key in cold))
        busy = decisions.count(Deny(Reason.BUSY))
        assert busy == (40 if kind is OneHashPool else 0)
        hasher.gate.set()
        made = await asyncio.gather(*creating, return_exceptions=True)
        assert sum(isinstance(each, Created) for each in made) == full
        await engine.stop()

    async def test_a_key_has_its_organisations_share_of_hashes(
        self, make_engine: MakeEngine
    ) -> None:
        """80 creates by a key: four are hashed or wait for a thread, 16 wait for those, and 60 are
        refused with a retry time; meanwhile another organisation's create finds a place."""
        engine = make_engine(hasher=(hasher := GatedHasher()))
        hasher.gate.set()
        caller = principal_of((await create(engine, "acme")).record)
        hasher.gate.clear()
        creating = [asyncio.create_task(create(engine, "acme", by=caller)) for _ in range(80)]
        await until(
            lambda: (
                hasher.in_progress()["management"] == 4
                and sum(map(asyncio.Task.done, creating)) == 60
            )
        )
        other = asyncio.create_task(create(engine, "rival"))
        await until(lambda: hasher.in_progress()["management"] == 5)
        hasher.gate.set()
        made = await asyncio.gather(*creating, return_exceptions=True)
        refused = [each for each in made if isinstance(each, QuotaExceeded)]
        assert (len(refused), sum(isinstance(each, Created) for each in made)) == (60, 20)
        assert {each.retry_after_seconds for each in refused} == {1}
        assert isinstance(await other, Created)
        await engine.stop()


class CountingKeyset(Keyset):
    """Counts MACs."""

    verified = 0

    def verify_mac(self, token: Token) -> bool:
        CountingKeyset.verified += 1
        return super().verify_mac(token)


class TrustsMisses(Keyset):
    """A broken twin: what was verified once is not verified by newer secrets."""

    async def may_be_valid(self, token: Token, verified_as_of: ReadAt | None) -> bool:
        return verified_as_of is not None


class TestCacheMiss:
    """The third answer: what was found on the way is not looked for again."""

    async def test_a_miss_shows_no_token(self, engine: Engine) -> None:
        """Neither it nor its entry is in the representation."""
        created = await create(engine)
        miss = engine.authenticator.check_cached(bearer(created.token))
        assert isinstance(miss, CacheMiss)
        assert created.token.reveal() not in repr(miss)
        assert created.record.id not in repr(miss)

    async def test_the_mac_of_a_miss_is_verified_once(self, engine: Engine) -> None:
        """`check` goes on from it."""
        created = await create(engine)
        engine._keyset.__class__ = CountingKeyset
        CountingKeyset.verified = 0
        assert isinstance(await engine.authenticate(bearer(created.token)), Allow)
        assert CountingKeyset.verified == 1

    @pytest.mark.parametrize("kind", [Keyset, TrustsMisses])
    async def test_a_miss_of_retired_secrets_is_verified_again(
        self, engine: Engine, other: Engine, clock: Clock, kind: type[Keyset]
    ) -> None:
        """Between the miss and the check the secret was retired: the token is forged now. The twin
        that trusts the miss allows it."""
        created = await create(engine)
        engine._keyset.__class__ = kind
        miss = engine.authenticator.check_token_cached(created.token)
        assert isinstance(miss, CacheMiss)
        secrets = await other.store_secrets()
        await secrets.rotate(["mac"])
        clock.tick(1_000_000)
        oldest = min(each.id for each in await secrets.list() if each.kind == "mac")
        await secrets.retire(oldest)
        decision = await engine.authenticator.check(miss)
        assert isinstance(decision, Allow) == (kind is TrustsMisses)

    async def test_timings_are_sampled_and_then_cost_nothing(self, engine: Engine) -> None:
        """64 hits are timed, then the plain method takes over until uses are stored."""
        created = await create(engine)
        await engine.authenticate(bearer(created.token))
        for _ in range(100):
            await engine.authenticate(bearer(created.token))
        buckets, _ = engine.stats().stages["l1"]
        assert buckets[-1] == ("+Inf", 63.0)
        assert engine.stats().decisions["allow", "l1"] == 100
