"""A new secret for a key: which of the two is good when, in whichever process, and whose it was."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis, FakeServer

from keylatch.caches.local_cache import Entry, entry_of
from keylatch.core.decisions import Allow, Deny, Reason, principal_of
from keylatch.core.timestamps import datetime_of
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.errors import InvalidKeyState, InvalidValue, NotPermitted
from keylatch.management.keyring import Created, Rotated
from keylatch.storage.authorization import Actor
from keylatch.storage.store import Found, Store
from tests.storage.test_store import NOW, record
from tests.support.clock import Clock
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer
from tests.support.stores import StoreTests
from tests.test_engine import WatchedHasher, WatchedStore, bearer, create, with_other_secret

pytestmark = pytest.mark.anyio

GRACE = 60


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
    await engine.stop()


@pytest.fixture
async def other(make_engine: MakeEngine) -> AsyncIterator[Engine]:
    """Another process's engine on the same store."""
    other = make_engine()
    await other.start()
    yield other
    await other.stop()


async def rotate(engine: Engine, key: Created, seconds: int = GRACE, **by: Any) -> Rotated:
    keyring = await engine.keyring()
    rotated = await keyring.rotate("acme", key.record.id, grace=timedelta(seconds=seconds), **by)
    assert rotated is not None
    return rotated


async def is_good(engine: Engine, token: Token) -> bool:
    decision = await engine.authenticate(bearer(token))
    assert isinstance(decision, Allow) or decision.reason in (Reason.WRONG_SECRET, Reason.EXPIRED)
    return isinstance(decision, Allow)


class TestTheGrace:
    """Two secrets are good, and then one."""

    async def test_both_secrets_are_good_until_it_ends(
        self, engine: Engine, other: Engine, clock: Clock
    ) -> None:
        """To the millisecond, also where the old one is cached; the key is the same one."""
        key = await create(engine)
        assert await is_good(other, key.token)
        new = await rotate(engine, key)
        assert new.record.id == key.record.id == new.token.key_id
        for process in (engine, other):
            assert await is_good(process, key.token)
            assert await is_good(process, new.token)
        clock.tick(GRACE - 0.001)
        assert await is_good(other, key.token)
        clock.tick(0.001)
        for process in (engine, other):
            assert not await is_good(process, key.token)
            assert await is_good(process, new.token)

    async def test_without_one_the_old_secret_ends_with_the_call(
        self, engine: Engine, other: Engine
    ) -> None:
        """Where it is cached, too."""
        key = await create(engine)
        assert await is_good(other, key.token)
        new = await rotate(engine, key, 0)
        assert new.record.previous_expires_at is None
        assert not await is_good(other, key.token)
        assert await is_good(other, new.token)

    async def test_it_never_outlives_the_key(self, engine: Engine, clock: Clock) -> None:
        """A key that ends in ten seconds has no secret that is good for sixty."""
        key = await create(engine, expires_at=datetime_of(int(clock() * 1000) + 10_000))
        new = await rotate(engine, key)
        assert new.record.previous_expires_at == key.record.expires_at
        clock.tick(10)
        assert not await is_good(engine, key.token)
        assert not await is_good(engine, new.token)

    async def test_an_expiry_that_is_moved_earlier_ends_both(
        self, engine: Engine, other: Engine, clock: Clock
    ) -> None:
        """The grace was longer when it began; the key's own end counts for both secrets."""
        key = await create(engine)
        new = await rotate(engine, key)
        assert await is_good(other, key.token)
        keyring = await engine.keyring()
        await keyring.change(
            "acme", key.record.id, expires_at=datetime_of(int(clock() * 1000) + 5_000)
        )
        assert await is_good(other, key.token)
        clock.tick(5)
        assert not await is_good(other, key.token)
        assert not await is_good(other, new.token)

    async def test_a_second_rotation_ends_the_first_secret(self, engine: Engine) -> None:
        """There are two secrets at most."""
        key = await create(engine)
        second = await rotate(engine, key)
        third = await rotate(engine, key)
        assert not await is_good(engine, key.token)
        assert await is_good(engine, second.token)
        assert await is_good(engine, third.token)

    async def test_a_revoke_ends_both(self, engine: Engine, other: Engine) -> None:
        """In the process that has them cached."""
        key = await create(engine)
        new = await rotate(engine, key)
        for token in (key.token, new.token):
            assert isinstance(await other.authenticate(bearer(token)), Allow)
        await (await engine.keyring()).delete("acme", key.record.id)
        for token in (key.token, new.token):
            assert await other.authenticate(bearer(token)) == Deny(Reason.REVOKED)

    async def test_no_other_secret_is_good(
        self, engine: Engine, store: WatchedStore, hasher: WatchedHasher
    ) -> None:
        """A wrong one is verified against both hashes, once, and then cached."""
        key = await create(engine)
        await rotate(engine, key)
        wrong = await with_other_secret(store, key.token)
        for _ in range(3):
            assert not await is_good(engine, wrong)
        assert (store.finds, hasher.verified) == (1, 2)

    async def test_the_end_of_the_grace_is_not_forgotten_by_a_cache_entry(
        self, engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another library has this defect; the twin here accepts the old secret for ever."""
        key = await create(engine)
        await rotate(engine, key)

        def without_end(*known: Any) -> Entry:
            entry = entry_of(*known)
            entry.allow = replace(entry.allow, expires_at=None)
            return entry

        monkeypatch.setattr("keylatch.authentication.lookup.entry_of", without_end)
        assert await is_good(engine, key.token)
        clock.tick(GRACE * 10)
        with pytest.raises(AssertionError):
            assert not await is_good(engine, key.token)


class TestItsEnd:
    """Before its time: back to the old secret, or on to the new one."""

    async def test_cancelled_the_old_secret_is_the_key_again(
        self, engine: Engine, other: Engine, clock: Clock
    ) -> None:
        """The new one ends at once, where it is cached, too; the old one stays good."""
        key = await create(engine)
        new = await rotate(engine, key)
        assert await is_good(other, new.token)
        assert await is_good(other, key.token)
        keyring = await engine.keyring()
        changed = await keyring.cancel_rotation("acme", key.record.id)
        assert changed is not None
        assert changed.record.partial_token == key.record.partial_token
        assert changed.record.previous_expires_at is None
        assert not await is_good(other, new.token)
        clock.tick(GRACE * 10)
        assert await is_good(other, key.token)

    async def test_finished_only_the_new_secret_is_good(
        self, engine: Engine, other: Engine
    ) -> None:
        """At once, where the old one is cached, too."""
        key = await create(engine)
        new = await rotate(engine, key)
        assert await is_good(other, key.token)
        assert await (await engine.keyring()).finish_rotation("acme", key.record.id)
        assert not await is_good(other, key.token)
        assert await is_good(other, new.token)

    async def test_only_what_runs_can_end(self, engine: Engine, clock: Clock) -> None:
        """No rotation, or one whose grace is over: nothing to go back to."""
        key = await create(engine)
        keyring = await engine.keyring()
        for end in (keyring.cancel_rotation, keyring.finish_rotation):
            with pytest.raises(InvalidKeyState):
                await end("acme", key.record.id)
        await rotate(engine, key)
        clock.tick(GRACE)
        for end in (keyring.cancel_rotation, keyring.finish_rotation):
            with pytest.raises(InvalidKeyState):
                await end("acme", key.record.id)
            assert await end("acme", "key_unknown") is None
            assert await end("other", key.record.id) is None


class TestWhoMay:
    """Rotating hands out a token, so it is bound like creating."""

    async def test_a_deleted_key_gets_no_secret(self, engine: Engine) -> None:
        """Deleting is final."""
        key = await create(engine)
        keyring = await engine.keyring()
        await keyring.delete("acme", key.record.id)
        with pytest.raises(InvalidKeyState):
            await keyring.rotate("acme", key.record.id)

    async def test_no_caller_gets_more_rights_than_its_own(self, engine: Engine) -> None:
        """Neither another permission nor a way into live."""
        key = await create(engine)
        keyring = await engine.keyring()
        for permission, environment in (("SENDING", "live"), ("FULL", "test")):
            made = await keyring.create(
                "acme", "by", permission=permission, environment=environment
            )
            by = principal_of(made.record)
            for change in (keyring.rotate, keyring.cancel_rotation, keyring.finish_rotation):
                if environment == "test":  # it finds no key for live
                    assert await change("acme", key.record.id, by=by) is None
                    continue
                with pytest.raises(NotPermitted):
                    await change("acme", key.record.id, by=by)
            with pytest.raises(NotPermitted):
                await keyring.revoke_all("acme", by=by)
        assert await is_good(engine, key.token)

    @pytest.mark.parametrize("seconds", [-1, 366 * 86_400 + 1])
    async def test_a_grace_has_bounds(self, engine: Engine, seconds: int) -> None:
        """From 0 to a year."""
        key = await create(engine)
        with pytest.raises(InvalidValue, match="graceSeconds"):
            await rotate(engine, key, seconds)


class TestCosts:
    """Two secrets in turn are hits like one."""

    async def test_in_turn_they_cost_one_look_up_each(
        self, engine: Engine, store: WatchedStore
    ) -> None:
        """The in-process cache holds both."""
        key = await create(engine)
        new = await rotate(engine, key)
        for _ in range(5):
            assert await is_good(engine, key.token)
            assert await is_good(engine, new.token)
        assert store.finds == 2
        assert isinstance(engine.authenticator.check_token_cached(key.token), Allow)
        assert isinstance(engine.authenticator.check_token_cached(new.token), Allow)

    @pytest.mark.parametrize("order", ["old first", "new first"])
    async def test_redis_knows_both(
        self, make_engine: MakeEngine, hasher: WatchedHasher, order: str, clock: Clock
    ) -> None:
        """Another process hashes neither, in any order of notices, and observes the grace."""
        redis = FakeServer()
        first = make_engine(redis=FakeAsyncRedis(server=redis))
        second = make_engine(redis=FakeAsyncRedis(server=redis), hasher=hasher)
        await first.start()
        await second.start()
        key = await create(first)
        new = await rotate(first, key)
        pair = [key.token, new.token] if order == "old first" else [new.token, key.token]
        for process in (first, second):
            for token in pair:
                assert await is_good(process, token)
            await process._tasks.stop()
        assert hasher.verified == 0
        clock.tick(GRACE)
        assert not await is_good(second, key.token)
        assert await is_good(second, new.token)
        await first.stop()
        await second.stop()


async def test_the_last_use_of_each_secret_is_shown(engine: Engine, clock: Clock) -> None:
    """It shows when the old one can be removed."""
    key = await create(engine)
    clock.tick(1)
    assert await is_good(engine, key.token)
    await engine._usage.flush()
    first = int(clock() * 1000)
    new = await rotate(engine, key)
    assert new.record.previous_last_used == first
    clock.tick(1)
    assert await is_good(engine, key.token)
    second = int(clock() * 1000)
    clock.tick(1)
    assert await is_good(engine, new.token)
    await engine._usage.flush()
    found = await (await engine.keyring()).get("acme", key.record.id)
    assert found is not None
    record = found.record
    assert record.previous_last_used == second
    assert record.last_used == int(clock() * 1000)
    assert record.previous_partial_token == key.record.partial_token


class RotationContract(StoreTests):
    """What both databases promise of it."""

    async def test_repeated_after_a_lost_answer_it_is_done_once(self, store: Store) -> None:
        """The old hash is not lost under the new one."""
        await store.keys.add(record(), "old")
        for _ in range(2):
            rotated = await store.rotation.rotate(
                "acme", "key_a", NOW, "new", "kl_...wxyz", NOW + 5
            )
            assert rotated is not None
        found = await store.keys.find("key_a")
        assert isinstance(found, Found)
        assert (found.hash, found.previous_hash) == ("new", "old")
        assert found.record.previous_expires_at == NOW + 5
        assert found.record.partial_token == "kl_...wxyz"

    async def test_a_cancelled_one_leaves_no_trace_but_in_the_log(self, store: Store) -> None:
        """Hash and partial token are what they were."""
        await store.keys.add(record(), "old")
        await store.rotation.rotate(
            "acme", "key_a", NOW, "new", "kl_...wxyz", NOW + 5, by=Actor("key_b")
        )
        await store.rotation.end_grace("acme", "key_a", NOW, True, by=Actor("key_c"))
        found = await store.keys.find("key_a")
        assert isinstance(found, Found)
        assert (found.hash, found.previous_hash) == ("old", None)
        assert found.record.partial_token == "kl_...abcd"
        events = await store.audit.events("acme", 10)
        assert [(event.action, event.actor) for event in events] == [
            ("key.rotate.cancel", "key_c"),
            ("key.rotate", "key_b"),
            ("key.create", "operator"),
        ]

    async def test_all_keys_of_an_organisation_end_in_one_change(self, store: Store) -> None:
        """One sequence number and one invalidation for any number of keys of the organisation."""
        for number in range(5):
            await store.keys.add(record(f"key_{number}"), f"hash {number}")
        await store.keys.add(record("key_x", "other"), "hash")
        deleted = await store.keys.change(
            "acme", "key_0", NOW, {"active": False, "deleted_at": NOW}
        )
        assert deleted is not None
        _, before = deleted
        count, seq = await store.organizations.revoke_all(
            "acme", NOW + 1, "leaked", by=Actor("key_1")
        )
        assert (count, seq) == (4, before + 1)
        batch = await store.invalidations.since(before)
        [row] = batch.invalidations
        assert row[:3] == (seq, None, "acme")
        records = await store.keys.list("acme", deleted=True)
        assert {each.id for each in records if each.revoked_reason == "leaked"} == {
            f"key_{number}" for number in range(1, 5)
        }
        assert not any(each.active or each.deleted_at is None for each in records)
        assert await store.keys.list("other")
        assert (await store.organizations.revoke_all("acme", NOW + 2, None))[0] == 0

    async def test_a_change_and_its_audit_event_are_one_transaction(self, store: Store) -> None:
        """Nothing done, nothing written: the transaction that fails leaves neither."""
        await store.keys.add(record(), "hash")
        await store.keys.change("acme", "key_a", NOW, {"active": False, "deleted_at": NOW})
        before = await store.audit.events(None, 10)
        with pytest.raises(InvalidKeyState):
            await store.rotation.rotate("acme", "key_a", NOW, "new", "kl_...wxyz", None)
        assert await store.keys.change("acme", "key_b", NOW, {"name": "b"}) is None
        assert await store.organizations.set_active("unknown", NOW, False) is None
        assert await store.audit.events(None, 10) == before

    async def test_the_log_is_read_in_pages_and_by_key(self, store: Store) -> None:
        """The newest first; another organisation's lines are not there."""
        for number in range(4):
            await store.keys.add(record(f"key_{number}"), f"hash {number}", by=Actor("cli:alice"))
        await store.keys.add(record("key_x", "other"), "hash")
        first = await store.audit.events("acme", 3)
        rest = await store.audit.events("acme", 3, None, first[-1].id)
        assert [event.key_id for event in (*first, *rest)] == [
            f"key_{number}" for number in (3, 2, 1, 0)
        ]
        assert [event.key_id for event in await store.audit.events("acme", 3, "key_1")] == ["key_1"]
        assert first[0].details == {
            "name": "ci",
            "permission": "FULL",
            "environment": "live",
            "expiresAt": None,
        }


class TestSQLite(RotationContract):
    """On a file."""

    @pytest.fixture
    def url(self, store_url: str) -> str:
        return store_url


class TestPostgreSQL(RotationContract):
    """On a real server."""

    @pytest.fixture
    def url(self, postgres: PostgresServer) -> str:
        return postgres.new_database()
