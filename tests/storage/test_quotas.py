"""What an organisation's own keys may leave in the store, and how long its log is kept: on both
databases, also when many ask at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.engine import make_url

from keylatch.errors import QuotaExceeded
from keylatch.storage.authorization import Actor
from keylatch.storage.key_changes import insert_keys
from keylatch.storage.quotas import HOUR_MS, Quotas, check_quota
from keylatch.storage.schema import keys
from keylatch.storage.store import Store
from keylatch.storage.usage import DAY_MS
from tests.storage.test_store import NOW, record
from tests.support.servers import PostgresServer
from tests.support.stores import StoreTests

pytestmark = pytest.mark.anyio
BY = "key_caller"
SECOND = 1_000


async def add(store: Store, name: str, quotas: Quotas | None, at: int = NOW, by: str = BY) -> int:
    actor = Actor(by, quotas=quotas)
    _, seq = await store.keys.add(record(name, created_at=at), "hashed", by=actor)
    return seq


async def rename(store: Store, name: str, at: int, quotas: Quotas | None, by: str = BY) -> object:
    actor = Actor(by, quotas=quotas)
    return await store.keys.change("acme", "key_a", at, {"name": name}, by=actor)


async def delete(store: Store, name: str, at: int) -> None:
    values = {"active": False, "deleted_at": at}
    assert await store.keys.change("acme", name, at, values, by=Actor(BY))


async def state_of(store: Store) -> tuple[object, ...]:
    """All that a change would leave a trace in."""
    invalidations = await store.invalidations.since(0)
    return (
        await store.audit.events(None, 100),
        invalidations,
        await store.keys.list("acme", deleted=True),
    )


class QuotaContract(StoreTests):
    """What both databases promise."""

    @pytest.fixture
    async def other(self, url: str, store: Store) -> AsyncIterator[Store]:
        """Another process on the same database."""
        other = Store(url)
        await other.open(NOW)
        yield other
        await other.close()

    async def test_an_organisation_has_at_most_so_many_live_keys(self, store: Store) -> None:
        """Another one is refused until one is deleted; another organisation has its own number."""
        limit = Quotas(max_keys=3)
        for number in range(3):
            await add(store, f"key_{number}", limit)
        before = await state_of(store)
        with pytest.raises(QuotaExceeded) as caught:
            await add(store, "key_more", limit)
        assert (caught.value.limit, caught.value.retry_after_seconds) == ("keys", None)
        assert await state_of(store) == before, "what is refused writes nothing"
        await store.keys.add(record("key_x", "rival"), "hashed", by=Actor("key_x", quotas=limit))
        await store.keys.change("acme", "key_0", NOW, {"active": False, "deleted_at": NOW})
        await add(store, "key_more", limit)

    async def test_operators_have_no_limit(self, store: Store) -> None:
        """What they add counts; of what they add, nothing is refused."""
        for number in range(5):
            await add(store, f"key_{number}", None, by="cli:alice")
        with pytest.raises(QuotaExceeded):
            await add(store, "key_more", Quotas(max_keys=5))
        await add(store, "key_more", None, by="cli:alice")
        await add(store, "key_a", Quotas(max_changes=1))

    async def test_an_organisation_over_its_number_of_keys_still_changes_them(
        self, store: Store
    ) -> None:
        """The limit is one for creating: it was lowered, or an import created many."""
        for name in ("key_a", "key_b"):
            await add(store, name, None)
        assert await rename(store, "new", NOW, Quotas(max_keys=1, max_changes=9))

    async def test_so_many_changes_an_hour_and_a_true_retry_after(self, store: Store) -> None:
        """The next one is refused until the first is an hour old, to the second."""
        limit = Quotas(max_changes=3)
        await add(store, "key_a", limit, NOW)
        for number, at in enumerate((NOW + 10 * SECOND, NOW + 20 * SECOND)):
            await rename(store, f"name {number}", at, limit)
        before = await state_of(store)
        asked_at = NOW + 30 * SECOND + 1
        with pytest.raises(QuotaExceeded) as caught:
            await rename(store, "more", asked_at, limit)
        assert caught.value.limit == "changes"
        assert caught.value.retry_after_seconds == 3_600 - 30
        assert await state_of(store) == before, "what is refused writes nothing"
        with pytest.raises(QuotaExceeded):
            await rename(store, "more", asked_at + (3_600 - 31) * SECOND, limit)
        assert await rename(store, "more", asked_at + (3_600 - 30) * SECOND, limit)
        with pytest.raises(QuotaExceeded):
            await rename(store, "and more", asked_at + (3_600 - 30) * SECOND, limit)

    @pytest.mark.parametrize("lowered", [1, 2, 3])
    async def test_a_lowered_limit_has_a_true_retry_after_as_well(
        self, store: Store, lowered: int
    ) -> None:
        """It counts from the change that has to be an hour old for there to be room."""
        await add(store, "key_a", None, NOW)
        for second in (1, 2):
            await rename(store, f"name {second}", NOW + second * SECOND, None)
        limit = Quotas(max_changes=lowered)
        with pytest.raises(QuotaExceeded) as caught:
            await rename(store, "more", NOW + 3 * SECOND, limit)
        wait = caught.value.retry_after_seconds
        assert wait == 3_600 - lowered
        assert await rename(store, "more", NOW + (3 + (wait or 0)) * SECOND, limit)

    async def test_what_counts_is_what_the_organisations_keys_changed(self, store: Store) -> None:
        """Not what operators did, and not what others did."""
        limit = Quotas(max_changes=2)
        await add(store, "key_a", None, by="cli:alice")
        await store.keys.add(record("key_x", "rival"), "hashed", by=Actor("key_x"))
        for number in range(3):
            await rename(store, f"name {number}", NOW, None, by="cli:alice")
        await rename(store, "one", NOW, limit)
        await rename(store, "two", NOW, limit)
        with pytest.raises(QuotaExceeded):
            await rename(store, "three", NOW, limit)

    async def test_rotations_are_changes(self, store: Store) -> None:
        """Ending one is never refused, and neither is revoking everything."""
        limit = Quotas(max_changes=2)
        await add(store, "key_a", limit)
        rotated = "acme", "key_a", NOW, "new", "kl_...wxyz", NOW + 5
        assert await store.rotation.rotate(*rotated, by=Actor(BY, quotas=limit))
        before = await state_of(store)
        with pytest.raises(QuotaExceeded):
            await store.rotation.rotate(
                "acme", "key_a", NOW, "newer", "...", NOW + 5, by=Actor(BY, quotas=limit)
            )
        assert await state_of(store) == before
        assert await store.rotation.end_grace("acme", "key_a", NOW, False, by=Actor(BY))
        assert await store.organizations.revoke_all("acme", NOW, None, by=Actor(BY))

    async def test_what_takes_access_away_is_never_refused(self, store: Store) -> None:
        """The owner of a leaked key can demote and disable it, whatever its thief has used up."""
        by = Actor(BY, quotas=Quotas(max_changes=1))
        await add(store, "key_a", by.quotas)
        narrower: list[dict[str, Any]] = [{"permission": "SENDING"}, {"active": False}]
        for values in narrower:
            assert await store.keys.change("acme", "key_a", NOW, values, by=by)
        wider = {"permission": "FULL"}, {"active": True}, {"active": False, "name": "x"}
        for more in wider:
            with pytest.raises(QuotaExceeded):
                await store.keys.change("acme", "key_a", NOW, more, by=by)

    async def test_deletions_are_not_counted_but_hide_nothing(self, store: Store) -> None:
        """Half of what a log may grow in an hour is for changes: keys that were there before cannot
        be deleted to make room for more."""
        for number in range(20):
            await add(store, f"key_old{number}", None, by="cli:alice")
        limit = Quotas(max_changes=4)
        for number in range(4):
            at = NOW + number * SECOND
            await add(store, f"key_{number}", limit, at)
            await delete(store, f"key_{number}", at)
        with pytest.raises(QuotaExceeded):
            await add(store, "key_more", limit)
        later = NOW + HOUR_MS + 10 * SECOND
        for number in range(8):
            await delete(store, f"key_old{number}", later + number * SECOND)
        with pytest.raises(QuotaExceeded) as caught:
            await add(store, "key_more", limit, later + 8 * SECOND)
        assert caught.value.retry_after_seconds == 3_600 - 8
        await delete(store, "key_old9", later + 8 * SECOND)
        await add(store, "key_more", limit, later + HOUR_MS + SECOND)

    async def test_a_change_that_changes_nothing_leaves_no_line(self, store: Store) -> None:
        """However often it is repeated; the answer is the key as it is."""
        await add(store, "key_a", None)
        values = {"name": "new", "metadata": '{"a":1}'}
        first = await store.keys.change("acme", "key_a", NOW, values, by=Actor(BY))
        before = await state_of(store)
        for at in (NOW + 1, NOW + 2):
            assert await store.keys.change("acme", "key_a", at, values, by=Actor(BY)) == first
        assert await state_of(store) == before

    async def test_the_log_has_metadata_by_its_digest(self, store: Store) -> None:
        """4 KB of it leave less than 200 bytes there."""
        await add(store, "key_a", None)
        text = '{"m":"' + "y" * 4_000 + '"}'
        await store.keys.change("acme", "key_a", NOW, {"metadata": text}, by=Actor(BY))
        [line] = await store.audit.events("acme", 1)
        assert line.details["metadata"]["bytes"] == len(text)
        assert set(line.details["metadata"]) == {"sha256", "bytes"}
        assert len(str(line.details)) < 200

    async def test_of_changes_at_the_same_time_no_more_pass_than_there_is_room_for(
        self, store: Store, other: Store
    ) -> None:
        """Forty creates by two processes, with room for ten."""
        limit = Quotas(max_keys=10, max_changes=0)
        tried = await asyncio.gather(
            *(add((store, other)[n % 2], f"key_{n}", limit) for n in range(40)),
            return_exceptions=True,
        )
        assert sum(isinstance(each, int) for each in tried) == 10
        assert sum(isinstance(each, QuotaExceeded) for each in tried) == 30
        made = await store.keys.list("acme")
        assert len(made) == 10
        limit = Quotas(max_changes=15)
        changed = await asyncio.gather(
            *(
                (store, other)[n % 2].keys.change(
                    "acme", key.id, NOW, {"name": f"name {n}"}, by=Actor(BY, quotas=limit)
                )
                for n, key in enumerate(made * 3)
            ),
            return_exceptions=True,
        )
        assert sum(isinstance(each, tuple) for each in changed) == 5
        assert sum(isinstance(each, QuotaExceeded) for each in changed) == 25

    # How long the log is kept

    async def test_old_audit_events_are_deleted_in_batches_and_young_ones_stay(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those from before the time that the setting names, and of these not the newest event."""
        monkeypatch.setattr("keylatch.storage.audit._PRUNE_BATCH", 4)
        store.audit_days = 30
        for number in range(10):
            at = NOW + (0 if number < 7 else 29 * DAY_MS)
            await add(store, f"key_{number}", None, at)
        left = []
        for _ in range(4):
            await store.run_maintenance(NOW + 30 * DAY_MS + 1)
            left.append(len(await store.audit.events(None, 100)))
        assert left == [7, 4, 3, 3]
        young = [event.key_id for event in await store.audit.events(None, 100)]
        assert young == ["key_9", "key_8", "key_7"]

    async def test_the_newest_audit_event_stays_so_that_no_number_is_reused(
        self, store: Store
    ) -> None:
        """Cursors and exports go by it."""
        store.audit_days = 1
        for number in range(3):
            await add(store, f"key_{number}", None)
        [newest, *_] = await store.audit.events(None, 100)
        for _ in range(2):
            await store.run_maintenance(NOW + 9 * DAY_MS)
        assert await store.audit.events(None, 100) == [newest]
        await add(store, "key_new", None)
        [new, *_] = await store.audit.events(None, 100)
        assert new.id > newest.id

    async def test_one_audit_event_with_a_wrong_time_delays_nothing(self, store: Store) -> None:
        """The clock of another process was a century ahead."""
        await add(store, "key_0", None, NOW + 36_500 * DAY_MS)
        for number in range(1, 4):
            await add(store, f"key_{number}", None)
        store.audit_days = 1
        await store.run_maintenance(NOW + 9 * DAY_MS)
        assert [event.key_id for event in await store.audit.events(None, 100)] == ["key_3", "key_0"]

    async def test_nothing_goes_where_it_is_kept_for_ever(self, store: Store) -> None:
        """0, which is also what a middleware does: only the sidecar deletes."""
        await add(store, "key_0", None)
        await add(store, "key_1", None)
        await store.run_maintenance(NOW + 4_000 * DAY_MS)
        assert len(await store.audit.events(None, 100)) == 2

    async def test_processes_that_prune_at_once_do_not_disturb_each_other(
        self, store: Store, other: Store
    ) -> None:
        """Nor what is written meanwhile."""
        await store.keys.add_many([(record(f"key_{n}"), "hashed") for n in range(400)])
        later = NOW + 40 * DAY_MS
        for each in (store, other):
            each.audit_days = 30
        await asyncio.gather(
            *(each.run_maintenance(later) for each in (store, other) * 3),
            *(add(store, f"key_new{n}", None, later) for n in range(10)),
        )
        await store.run_maintenance(later)
        assert len(await store.audit.events(None, 1_000)) == 10


class TestSQLite(QuotaContract):
    """On a file."""

    @pytest.fixture
    def url(self, store_url: str) -> str:
        return store_url


class TestPostgreSQL(QuotaContract):
    """On a server."""

    @pytest.fixture
    def url(self, postgres: PostgresServer) -> str:
        return postgres.new_database()

    @pytest.mark.parametrize("limit", [Quotas(max_keys=1), Quotas(max_changes=1)])
    @pytest.mark.parametrize("counts_again", [True, False])
    async def test_a_change_counts_once_it_holds_the_counter(
        self, url: str, store: Store, limit: Quotas, counts_again: bool
    ) -> None:
        """Both find room for one; the second to commit is refused. The twin, which has counted
        before and does not again, commits as well."""
        engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
        with engine.connect() as slow, engine.connect() as quick:
            for each in (slow, quick):
                check_quota(each, "acme", NOW, limit, new_keys=1)
            insert_keys(quick, [(record("key_1"), "hashed")], Actor(BY, quotas=limit), "key.create")
            quick.commit()
            by = Actor(BY, quotas=limit if counts_again else None)
            with contextlib.suppress(QuotaExceeded):
                insert_keys(slow, [(record("key_2"), "hashed")], by, "key.create")
                slow.commit()
            slow.rollback()
            made = quick.execute(select(keys.c.id)).scalars().all()
        engine.dispose()
        assert len(made) == (1 if counts_again else 2)
