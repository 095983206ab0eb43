"""The store's contract: one class of promises, held by SQLite and by a real PostgreSQL."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from keylatch.core.decisions import KeyRecord
from keylatch.errors import ConfigurationError, StoreIncompatible, StoreUnavailable
from keylatch.storage import schema
from keylatch.storage.store import Found, NotFound, Store, database_of
from tests.support.servers import PostgresServer
from tests.support.stores import StoreTests

pytestmark = pytest.mark.anyio
NOW = 1_800_000_000_000


def record(key_id: str = "key_a", organization_id: str = "acme", **values: object) -> KeyRecord:
    plain = KeyRecord(
        id=key_id,
        organization_id=organization_id,
        name="ci",
        permission="FULL",
        environment="live",
        partial_token="kl_...abcd",
        active=True,
        organization_active=True,
        created_at=NOW,
        updated_at=NOW,
    )
    return replace(plain, **values)  # type: ignore[arg-type]


def position_seq(store: Store) -> int:
    """The sequence number, without waiting."""
    position = store.invalidations.position_nowait()
    assert position is not None
    return position.seq


class StoreContract(StoreTests):
    """What both databases promise."""

    async def test_a_key_is_found_with_the_sequence_number_of_its_creation(
        self, store: Store
    ) -> None:
        """What was added is found whole, with its hash, as of its own transaction."""
        _, seq = await store.keys.add(record(expires_at=NOW + 5), "hashed")
        assert await store.keys.find("key_a") == Found(record(expires_at=NOW + 5), "hashed", seq)

    async def test_absence_has_a_sequence_number_too(self, store: Store) -> None:
        """That there is no such key is only true as of a sequence number."""
        _, seq = await store.keys.add(record(), "hashed")
        assert await store.keys.find("key_b") == NotFound(seq)

    async def test_every_change_advances_the_sequence_number_and_writes_an_invalidation(
        self, store: Store
    ) -> None:
        """Create, change and delete each leave one invalidation, in order."""
        _, created = await store.keys.add(record(), "hashed")
        changed = await store.keys.change("acme", "key_a", NOW + 1, {"name": "new"})
        deleted = await store.keys.change("acme", "key_a", NOW + 2, {"deleted_at": NOW + 2})
        assert changed is not None
        assert deleted is not None
        assert [changed[1], deleted[1]] == [created + 1, created + 2]
        changes = await store.invalidations.since(created - 1)
        assert changes.seq == created + 2
        assert changes.is_complete
        assert [row[:3] for row in changes.invalidations] == [
            (seq, "key_a", None) for seq in range(created, created + 3)
        ]
        assert [row.revokes for row in changes.invalidations] == [None, None, "delete"]
        row_ids = [row.row_id for row in changes.invalidations]
        assert len({*row_ids, 0}) == 4
        assert changes.position == changes.invalidations[-1].position
        assert (await store.invalidations.since(created)).since_row_id == row_ids[0]

    async def test_deleting_is_final_and_repeatable(self, store: Store) -> None:
        """A deleted key comes back as it is; nothing changes it and no invalidation is repeated."""
        await store.keys.add(record(), "hashed")
        first = await store.keys.change("acme", "key_a", NOW, {"deleted_at": NOW, "active": False})
        again = await store.keys.change(
            "acme", "key_a", NOW + 9, {"active": True, "deleted_at": None}
        )
        assert first is not None
        assert first == again
        assert first[0].updated_at > NOW

    async def test_another_organisations_key_is_an_unknown_key(self, store: Store) -> None:
        """Another organisation can neither see nor change it, and leaves no trace by trying."""
        _, seq = await store.keys.add(record(), "hashed")
        await store.keys.add(record("key_b", "rival"), "hashed")
        assert await store.keys.get("rival", "key_a") is None
        assert await store.keys.change("rival", "key_a", NOW, {"active": False}) is None
        assert [found.id for found in await store.keys.list("rival")] == ["key_b"]
        assert (await store.invalidations.since(0)).seq == seq + 1
        assert await store.keys.get("acme", "key_a") == record()

    async def test_an_addition_may_be_repeated(self, store: Store) -> None:
        """A client that lost the answer of the commit retries, and makes no second change."""
        _, seq = await store.keys.add(record(), "hashed")
        assert (await store.keys.add(record(), "hashed"))[1] == seq
        assert await store.keys.find("key_a") == Found(record(), "hashed", seq)
        await store.leases.join("member", 0, seconds=5)
        await store.leases.join("member", 0, seconds=5)

    async def test_lists_are_in_the_order_of_creation(self, store: Store) -> None:
        """Also where many keys are made in the same millisecond; deleted ones only on demand."""
        for name in ("key_c", "key_a", "key_b"):
            await store.keys.add(record(name), "hashed")
        await store.keys.change("acme", "key_a", NOW, {"deleted_at": NOW})
        assert [found.id for found in await store.keys.list("acme")] == ["key_b", "key_c"]
        everything = await store.keys.list("acme", newest_first=False, deleted=True)
        assert [found.id for found in everything] == ["key_c", "key_a", "key_b"]

    async def test_last_used_never_goes_back_and_touches_nothing_else(self, store: Store) -> None:
        """Uses may arrive out of order, late, or for keys that are gone."""
        _, seq = await store.keys.add(record(), "hashed")
        await store.usage.record({"key_a": NOW + 5, "key_gone": NOW})
        await store.usage.record({"key_a": NOW + 3})
        assert await store.keys.find("key_a") == Found(record(last_used=NOW + 5), "hashed", seq)

    async def test_a_use_does_not_reactivate_a_deleted_key(self, store: Store) -> None:
        """A flush after the delete records only uses from before it, and changes no state."""
        await store.keys.add(record(), "hashed")
        await store.keys.change("acme", "key_a", NOW + 5, {"active": False, "deleted_at": NOW + 5})
        await store.usage.record({"key_a": NOW + 9})
        await store.usage.record({"key_a": NOW + 4})
        found = await store.keys.get("acme", "key_a")
        assert found is not None
        assert (found.last_used, found.active, found.deleted_at) == (NOW + 4, False, NOW + 5)

    async def test_a_hash_is_replaced_only_if_it_is_still_the_old_one(self, store: Store) -> None:
        """Two processes that upgrade the same hash do not undo each other."""
        await store.keys.add(record(), "old")
        await store.keys.replace_hash("key_a", "old", "new")
        await store.keys.replace_hash("key_a", "old", "other")
        found = await store.keys.find("key_a")
        assert isinstance(found, Found)
        assert found.hash == "new"

    async def test_writers_at_once_lose_nothing(self, store: Store) -> None:
        """Forty keys from many tasks: forty sequence numbers, none skipped, none twice."""
        before = (await store.invalidations.since(0)).seq
        added = await asyncio.gather(
            *(store.keys.add(record(f"key_{n}", f"org{n % 3}"), "hashed") for n in range(40))
        )
        assert sorted(seq for _, seq in added) == list(range(before + 1, before + 41))

    async def test_the_log_is_pruned_and_says_so(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A batch from before the start of the log is marked incomplete."""
        monkeypatch.setattr("keylatch.storage.invalidation_log._MAX_ROWS", 2)
        for number in range(5):
            _, last = await store.keys.add(record(f"key_{number}"), "hashed")
        await store.run_maintenance(NOW)
        assert (await store.invalidations.since(last - 2)).is_complete
        assert not (await store.invalidations.since(last - 3)).is_complete
        assert (await store.invalidations.since(last - 3)).invalidations == ()


class TestMemory(StoreContract):
    """The double that tests of apps use passes what the real ones pass."""

    @pytest.fixture
    def url(self) -> str:
        return "sqlite://"


class LastingStoreContract(StoreContract):
    """What every store promises that other processes open as well."""

    async def test_two_at_once_set_up_one_store(self, url: str) -> None:
        """The first process creates them; all end with the same secrets."""
        stores = [Store(url) for _ in range(4)]
        secrets = await asyncio.gather(*(store.open(NOW) for store in stores))
        assert len({each.mac_keys for each in secrets}) == 1
        assert len({each.peppers for each in secrets}) == 1
        for store in stores:
            await store.close()

    async def test_a_newer_store_is_refused(self, url: str, store: Store) -> None:
        """An old keylatch does not touch tables that it does not understand."""
        database = database_of(url)
        await database.write(
            lambda connection: connection.exec_driver_sql(
                "UPDATE keylatch_version SET version_num = '9999'"
            )
        )
        older = Store(url)
        with pytest.raises(StoreIncompatible, match="9999"):
            await older.open(NOW)
        await older.close()
        await database.close()

    async def test_migrations_make_what_the_code_expects(self, url: str, store: Store) -> None:
        """Tables made by Alembic and tables described in `schema` are the same."""

        def difference(connection: Connection) -> list[object]:
            context = MigrationContext.configure(
                connection, opts={"version_table": "keylatch_version"}
            )
            return list(compare_metadata(context, schema.metadata))

        database = database_of(url)
        assert await database.read(difference) == []
        await database.close()


class TestSQLite(LastingStoreContract):
    """The contract on a SQLite file, and what only SQLite promises."""

    @pytest.fixture
    def url(self, store_url: str) -> str:
        return store_url

    async def test_changes_are_seen_without_waiting(self, store: Store) -> None:
        """The sequence number and the log can be read in place, by another connection, at once."""
        before = position_seq(store)
        assert before is not None
        _, seq = await store.keys.add(record(), "hashed")
        assert position_seq(store) == seq == before + 1
        assert store.invalidations.since_nowait(before) == await store.invalidations.since(before)

    @pytest.mark.long
    async def test_every_commit_leaves_another_mark(
        self, store: Store, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also one of another process, also after the log was truncated, and nothing else does."""
        monkeypatch.setattr("keylatch.storage.sqlite._CHECKPOINT_BYTES", 1)
        program = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute(sys.argv[2])"
        program += "; c.commit(); c.execute('PRAGMA wal_checkpoint(TRUNCATE)'); c.close()"
        change = "UPDATE keylatch_meta SET seq = seq + 1"
        marks = [store.data_version()]
        for number in range(200):
            _, seq = await store.keys.add(record(f"key_{number}"), "hashed")
            marks.append(store.data_version())
            assert position_seq(store) == seq
            assert store.data_version() == marks[-1]
            if number % 50 == 0:
                await store.run_maintenance(NOW)
                marks[-1] = store.data_version()
                command = [sys.executable, "-c", program, url.removeprefix("sqlite:///"), change]
                await asyncio.to_thread(subprocess.run, command, check=True)
                marks.append(store.data_version())
        assert None not in marks
        assert len(set(marks)) == len(marks)

    async def test_without_a_data_version_the_sequence_number_is_read(
        self, store: Store, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """A system that does not tell where the index is costs microseconds, and no key."""
        monkeypatch.setattr("keylatch.storage.wal_index._MAPS", tmp_path / "missing")
        unaided = Store(url)
        await unaided.open(NOW)
        assert unaided.data_version() is None
        assert unaided.invalidations.position_nowait() == store.invalidations.position_nowait()
        await unaided.close()
        assert unaided.data_version() is None

    async def test_reading_in_place_holds_no_snapshot(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After checks, the log can still be truncated: no connection keeps an old snapshot."""
        monkeypatch.setattr("keylatch.storage.sqlite._CHECKPOINT_BYTES", 1)
        await store.keys.add(record(), "hashed")
        store.invalidations.position_nowait()
        store.invalidations.since_nowait(0)
        await store.run_maintenance(NOW)
        assert (tmp_path / "keys.db-wal").stat().st_size == 0

    async def test_the_file_is_for_its_owner_only(self, store: Store, tmp_path: Path) -> None:
        """It holds the pepper and the MAC key."""
        await store.keys.add(record(), "hashed")
        for name in ("keys.db", "keys.db-wal", "keys.db-shm"):
            assert (tmp_path / name).stat().st_mode & 0o077 == 0, name

    @pytest.mark.long
    async def test_the_log_is_never_checkpointed_by_the_way(
        self, store: Store, tmp_path: Path
    ) -> None:
        """Automatic checkpoints are off on every connection: they are what can lose commits."""
        for number in range(300):
            await store.keys.add(record(f"key_{number}"), "h" * 200)
            await store.usage.record({f"key_{number}": NOW})
        assert (tmp_path / "keys.db-wal").stat().st_size > 1000 * 4096

    async def test_a_locked_store_is_unavailable(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A writer that gets no lock within the busy time fails; reads and checks go on."""
        await store.close()  # connections with another busy time
        monkeypatch.setattr("keylatch.storage.sqlite._BUSY_SECONDS", 0.05)
        await store.open(NOW)
        holder = sqlite3.connect(tmp_path / "keys.db", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.keys.add(record(), "hashed")
        assert store.invalidations.position_nowait() is not None
        assert isinstance(await store.keys.find("key_a"), NotFound)
        holder.close()
        await store.keys.add(record(), "hashed")

    async def test_a_full_disk_is_unavailable_and_commits_nothing(
        self, store: Store, tmp_path: Path
    ) -> None:
        """A write on a full disk fails, and the store is as before."""
        before = await store.invalidations.since(0)
        database = store._database
        await database.write(lambda c: c.exec_driver_sql("PRAGMA max_page_count = 1").all())

        async def fill() -> None:
            for number in range(200):
                await store.keys.add(record(f"key_{number}"), "h" * 250)

        with pytest.raises(StoreUnavailable, match="full"):
            await fill()
        kept = await store.keys.list("acme")
        assert (await store.invalidations.since(0)).seq == before.seq + len(kept)

    async def test_no_statement_runs_on_the_event_loop(self, store: Store) -> None:
        """Queries and commits happen on the store's own threads."""
        seen = set()
        await store._database.write(lambda _: seen.add(threading.current_thread().name))
        await store._database.read(lambda _: seen.add(threading.current_thread().name))
        assert all(name.startswith("keylatch-store") for name in seen)

    def test_a_network_file_system_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """SQLite's locks do not hold there, so the start is stopped, with a hint."""
        monkeypatch.setattr(Path, "read_text", lambda _: "/dev/sda / ext4\nhost:/x /mnt/n nfs4 rw")
        with pytest.raises(ConfigurationError, match="nfs4"):
            database_of("sqlite:////mnt/n/keys.db")
        database_of("sqlite:////mnt/other/keys.db")

    async def test_errors_hold_no_parameters(self, store: Store) -> None:
        """A failing statement does not carry the hash into the exception or its chain."""
        await store.keys.add(record(), "hashed-secret")
        with pytest.raises(StoreUnavailable) as caught:
            await store.keys.add(record(), "another-hashed-secret")
        assert caught.value.__suppress_context__
        assert "hashed-secret" not in str(caught.value)


class TestPostgreSQL(LastingStoreContract):
    """The contract on a real PostgreSQL, and what only PostgreSQL promises."""

    @pytest.fixture
    def url(self, postgres: PostgresServer) -> str:
        return postgres.new_database()

    async def test_nothing_is_known_without_asking(self, store: Store) -> None:
        """There is no way to read a server without waiting for a socket."""
        assert store.invalidations.position_nowait() is None
        assert store.invalidations.since_nowait(0) is None

    async def test_a_server_that_comes_back_is_used_again(
        self, postgres: PostgresServer, store: Store
    ) -> None:
        """Down: unavailable, at once and not 401. Up again: the old connections do not matter."""
        _, seq = await store.keys.add(record(), "hashed")
        postgres.kill()
        with pytest.raises(StoreUnavailable):
            await store.keys.find("key_a")
        postgres.start()
        assert await store.keys.find("key_a") == Found(record(), "hashed", seq)

    async def test_the_password_is_in_no_error(self) -> None:
        """A refused connection is explained without its password."""
        store = Store("postgresql://keylatch:pass-word@127.0.0.1:1/keys")
        with pytest.raises(StoreUnavailable) as caught:
            await store.open(NOW)
        await store.close()
        assert "pass-word" not in f"{caught.value} {caught.value.hint} {store!r}"


@pytest.mark.parametrize("package", ["psycopg", "greenlet"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, a PostgreSQL store says what to install, before anything is imported."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "keylatch.storage.postgresql", raising=False)
    with pytest.raises(ConfigurationError, match=r"keylatch\[postgres\]"):
        database_of("postgresql://localhost/keys")
