"""PostgreSQL as operators run it: standbys, poolers, strict defaults.

No answer of a standby counts, and no session is changed for its next user.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import product
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection

from keylatch.errors import StoreUnavailable
from keylatch.storage import postgresql
from keylatch.storage.authorization import Actor
from keylatch.storage.connector import Connector
from keylatch.storage.database import Query
from keylatch.storage.invalidation_log import INVALIDATIONS_SINCE
from keylatch.storage.leases import LAGGARDS, POLL
from keylatch.storage.libpq_connection import LibpqConnection
from keylatch.storage.libpq_pool import ConnectionPool
from keylatch.storage.postgresql import PostgreSQL
from keylatch.storage.records import FIND, FIND_BY_LOCATOR
from keylatch.storage.store import Found, NotFound, Position, Store
from keylatch.storage.usage import UsageBatch
from keylatch.storage.work_pool import WorkPool
from tests.storage.test_store import NOW, record
from tests.support.poolers import PgBouncer
from tests.support.postgresql_cluster import Machines, Node, Way
from tests.support.servers import PostgresServer, eventually

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PATIENT = 10.0
CHANGED = "SELECT name, setting FROM pg_settings WHERE source = 'session' AND name <> 'role'"
START = Position(0, 0)
COMMIT = "SHOW synchronous_commit"


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Makes servers of the test's own."""
    with Machines() as machines:
        yield machines


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.new_database()


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    store = Store(url)
    await store.open(NOW)
    yield store
    await store.close()


async def open_store(url: str, **options: Any) -> Store:
    store = Store(url, **options)
    await store.open(NOW)
    return store


def database_of(store: Store) -> PostgreSQL:
    database = store._database
    assert isinstance(database, PostgreSQL)
    return database


async def configure(url: str, statement: str) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        name = connection.info.dbname
        await connection.execute("SET default_transaction_read_only = off")
        await connection.execute(statement.format(database=name).encode())


def shown(connection: Connection) -> object:
    return connection.exec_driver_sql(COMMIT).scalar()


async def revoke(store: Store, key_id: str = "key_a") -> object:
    return await store.keys.change("acme", key_id, NOW, {"deleted_at": NOW}, by=Actor("me"))


# Settings


async def use_everything(store: Store) -> None:
    await store.keys.add(record(), "hashed")
    await store.keys.find("key_a")
    await store.keys.list("acme")
    await store.leases.join("member", NOW, PATIENT)
    await store.leases.poll("member", START, PATIENT)
    await store.usage.record({"key_a": NOW}, UsageBatch("process", 1, 1))


async def changed_settings(store: Store) -> list[object]:
    """What the sessions of all its connections have set."""
    database = database_of(store)
    found: list[object] = []
    for pool in (database._lookup_pool, database._lease_pool):
        found += await pool.fetch(CHANGED, (), PATIENT)
    found += await database.read(lambda connection: connection.exec_driver_sql(CHANGED).all())
    return found


async def test_no_setting_stays_on_a_session(store: Store) -> None:
    """A pooler may give the session to another program, which would then commit asynchronously."""
    await use_everything(store)
    assert await changed_settings(store) == []


async def test_a_setting_that_stays_is_found(store: Store) -> None:
    """The twin of the test above."""
    await use_everything(store)
    await database_of(store)._lease_pool.fetch("SET synchronous_commit = off", (), PATIENT)
    assert await changed_settings(store) == [("synchronous_commit", "off")]


@pytest.mark.parametrize("default", ["off", "local", "on", "remote_apply"])
async def test_changes_are_durable_whatever_the_default_is(default: str, url: str) -> None:
    """Each transaction says so itself; an operator's stronger choice stays. Uses may be lost."""
    store = await open_store(url)
    await store.close()
    await configure(url, f"ALTER DATABASE {{database}} SET synchronous_commit = {default}")
    database = database_of(store := Store(url))
    changes = "remote_apply" if default == "remote_apply" else "on"
    assert await database.write(shown) == changes
    assert await database.write(shown, is_urgent=True) == changes
    assert await database.write(shown, durable=False) == "off"
    assert database.durability() == "local"
    await store.close()


def note_commits(node: Node) -> None:
    """The server notes with which setting a lease is granted."""
    node.query("CREATE TABLE noted (setting text)")
    node.query(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN INSERT INTO noted VALUES (current_setting('synchronous_commit'));"
        " RETURN NEW; END$$"
    )
    node.query(
        "CREATE TRIGGER note AFTER UPDATE ON keylatch_members FOR EACH ROW EXECUTE FUNCTION note()"
    )


@pytest.mark.long
async def test_a_lease_waits_for_the_synchronous_standby_where_there_is_one(
    machines: Machines,
) -> None:
    """So an old primary, whose standby was promoted, grants none. Without one it waits for no disk:
    what a crash may take back of it makes revokes wait longer."""
    primary, _ = machines.pair(synchronous=False)
    store = await open_store(primary.url)
    await store.leases.join("member", NOW, PATIENT)
    note_commits(primary)
    await store.leases.poll("member", START, PATIENT)
    primary.wait_for_standby()
    await store.leases.poll("member", START, PATIENT)
    await store.close()
    assert primary.query("SELECT setting FROM noted") == [("off",), ("remote_write",)]


async def poll_often(store: Store) -> None:
    """One poll after the other, as a lease does."""
    for _ in range(10):
        await store.leases.poll(f"member{id(store)}", START, PATIENT)


async def test_strict_isolation_levels_make_no_difference(url: str) -> None:
    """Changes at once under the strictest default: all succeed, and so do the polls."""
    store = await open_store(url)
    await store.keys.add_many([(record(f"key_{n}"), "hashed") for n in range(20)])
    await store.close()
    isolation = "ALTER DATABASE {database} SET default_transaction_isolation = serializable"
    await configure(url, isolation)
    stores = [await open_store(url) for _ in range(3)]
    for each in stores:
        await each.leases.join(f"member{id(each)}", NOW, PATIENT)
    await asyncio.gather(
        *(revoke(stores[n % 3], f"key_{n}") for n in range(20)),
        *(poll_often(each) for each in stores),
    )
    for each in stores:
        await each.close()


# Standbys


@pytest.fixture
async def behind(machines: Machines) -> AsyncIterator[tuple[Node, Node, Way, Store]]:
    """A primary, a standby that receives nothing any more, and a store whose way may lead to
    either."""
    primary, standby = machines.pair(synchronous=False)
    way = machines.way(primary)
    store = await open_store(way.url)
    eventually(lambda: standby.query("SELECT to_regclass('keylatch_meta') IS NULL") == [(False,)])
    standby.stop_replication()
    await store.keys.add(record(), "hashed")
    await store.leases.join("member", NOW, PATIENT)
    yield primary, standby, way, store
    await store.close()


@pytest.mark.long
async def test_an_answer_of_a_standby_is_never_believed(
    behind: tuple[Node, Node, Way, Store],
) -> None:
    """A balancer or an old DNS entry leads there: unavailable, never "no such key"; and once it
    leads to the primary again, everything works."""
    primary, standby, way, store = behind
    way.lead_to(standby.port)
    for operation in (
        store.keys.find("key_a"),
        store.keys.list("acme"),
        store.leases.poll("member", START, PATIENT),
        store.keys.add(record("key_b"), "hashed"),
        Store(way.url).open(NOW),
    ):
        with pytest.raises(StoreUnavailable, match=r"standby|read-only"):
            await operation
    way.lead_to(primary.port)
    assert isinstance(await store.keys.find("key_a"), Found)
    assert (await store.leases.poll("member", START, PATIENT)).is_member
    await store.keys.add(record("key_b"), "hashed")


@pytest.mark.long
async def test_a_standby_that_is_believed_refuses_a_valid_key(
    behind: tuple[Node, Node, Way, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the test above."""
    _, standby, way, store = behind
    monkeypatch.setattr(
        *(PostgreSQL, "_read_checked"),
        lambda self, rows, *, columns, is_grant: [row[:-columns] for row in rows],
    )
    way.lead_to(standby.port)
    assert isinstance(await store.keys.find("key_a"), NotFound)


@pytest.mark.long
async def test_a_standby_is_queried_as_a_standby(behind: tuple[Node, Node, Way, Store]) -> None:
    """KEYLATCH_STORE_READ: its answer is marked as one that may be old, and its failure is none."""
    primary, standby, _, plain = behind
    assert await database_of(plain).fetch_from_standby(FIND, key_id="key_a", anchor=0) is None
    database = database_of(Store(primary.url, read_url=standby.url))
    answer = await database.fetch_from_standby(FIND, key_id="key_a", anchor=0)
    [(seq, _, _, hashed, *_)] = answer or [(0, 0, 0, "")]
    assert (seq, hashed) == (1, None)  # from before the key was added
    standby.kill()
    assert await database.fetch_from_standby(FIND, key_id="key_a", anchor=0) is None
    await database.close()


@pytest.mark.long
async def test_no_connection_stays_with_the_server_that_the_lease_has_left(
    behind: tuple[Node, Node, Way, Store],
) -> None:
    """The old primary lives on: look-ups and changes would go there, and leases come from the new
    one."""
    _, standby, way, store = behind
    await store.keys.find("key_a")
    await store.keys.list("acme")
    assert (await store.leases.poll("member", START, PATIENT)).is_member
    standby.promote()
    way.lead_to(standby.port, cut=False)
    assert isinstance(await store.keys.find("key_a"), Found)  # on the old one
    database_of(store)._lease_pool.close_idle()
    await store.leases.poll("member", START, PATIENT)
    assert isinstance(await store.keys.find("key_a"), NotFound)
    assert await store.keys.list("acme") == []


@pytest.mark.long
async def test_no_change_is_made_on_another_server_than_the_one_that_grants_leases(
    machines: Machines,
) -> None:
    """Its members would not be told of it. A pooler may lead to the old primary, and the direct URL
    to the new one."""
    primary, standby = machines.pair(synchronous=False)
    way = machines.way(primary)
    store = await open_store(primary.url, direct_url=way.url)
    await store.leases.join("member", NOW, PATIENT)
    await store.leases.poll("member", START, PATIENT)
    await store.keys.add(record(), "hashed")
    eventually(lambda: standby.query("SELECT to_regclass('keylatch_keys') IS NULL") == [(False,)])
    standby.promote()
    way.lead_to(standby.port)
    await store.leases.poll("member", START, PATIENT)
    with pytest.raises(StoreUnavailable, match="another server"):
        await revoke(store)
    # Nor read: it says what the new primary has lost, and that nothing has to be repeated there.
    with pytest.raises(StoreUnavailable, match="another server"):
        await store.invalidations.missing([], 0)
    await store.close()


@pytest.mark.long
async def test_a_store_is_opened_again_after_a_restart_of_the_server(machines: Machines) -> None:
    """The lease before was granted by the server as it ran then: it is over. So an engine that was
    stopped, or whose start failed, can be started again."""
    node = machines.primary()
    store = await open_store(node.url)
    await store.leases.join("member", NOW, PATIENT)
    await store.leases.poll("member", START, PATIENT)
    node.kill()
    node.start()
    await store.open(NOW)
    assert (await store.invalidations.since(0, PATIENT)).seq == 1
    await store.close()


@pytest.mark.long
async def test_a_change_after_a_restart_of_the_server_is_made(machines: Machines) -> None:
    """The server says another starting time, and grants leases as before."""
    primary = machines.primary()
    store = await open_store(primary.url)
    await store.leases.join("member", NOW, PATIENT)
    await store.leases.poll("member", START, PATIENT)
    primary.shut_down()
    primary.start()
    await store.keys.add(record(), "hashed")
    await store.close()


async def test_a_database_that_was_read_only_is_written_to_again(url: str) -> None:
    """As after a switch of roles behind the same address: no restart is needed."""
    store = await open_store(url)
    read_only = "ALTER DATABASE {database} SET default_transaction_read_only = "
    await configure(url, read_only + "on")
    await store.close()
    with pytest.raises(StoreUnavailable, match="read-only transaction"):
        await store.keys.add(record(), "hashed")
    await configure(url, read_only + "off")
    await store.keys.add(record(), "hashed")
    await store.close()


# A synchronous standby that is gone


def advance(connection: Connection) -> None:
    connection.exec_driver_sql("UPDATE keylatch_meta SET seq = seq + 1")


async def processes_after_timeouts(store: Store, node: Node) -> int:
    """Of the server, after changes and polls that could not end."""
    node.configure("synchronous_standby_names", "gone")
    database = database_of(store)
    with contextlib.suppress(StoreUnavailable):
        while True:  # the server has not read its configuration yet
            await database.write(advance, seconds=0.5)
    for number in range(10):
        results = await asyncio.gather(
            store.leases.poll("member", START, 0.2),
            database.write(advance, seconds=0.3),
            store.keys.find(f"key_{number}"),
            return_exceptions=True,
        )
        assert isinstance(results[0], StoreUnavailable)
        assert isinstance(results[1], StoreUnavailable)
        assert isinstance(results[2], NotFound)
    await asyncio.sleep(0)
    for _ in range(100):
        if node.connections() <= 6:
            break
        await asyncio.sleep(0.05)  # the server notices once a second who has left
    return node.connections()


@pytest.fixture
async def lonely(machines: Machines) -> AsyncIterator[tuple[Store, Node]]:
    primary = machines.primary()
    store = await open_store(primary.url)
    await store.leases.join("member", NOW, PATIENT)
    yield store, primary
    primary.configure("synchronous_standby_names", "")
    await store.close()


@pytest.mark.long
async def test_a_missing_standby_leaves_few_server_processes(lonely: tuple[Store, Node]) -> None:
    """Changes and leases fail while it is gone. The first change waits for it as long as it takes,
    and holds its locks; all others end. Look-ups go on."""
    assert await processes_after_timeouts(*lonely) <= 6


@pytest.mark.long
async def test_without_a_cancel_every_poll_leaves_one(
    lonely: tuple[Store, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the test above."""

    async def do_nothing(connection: LibpqConnection) -> None:
        pass

    monkeypatch.setattr(LibpqConnection, "cancel", do_nothing)
    assert await processes_after_timeouts(*lonely) > 6


# KEYLATCH_DURABLE


@pytest.mark.long
async def test_replicated_is_refused_without_a_synchronous_standby(machines: Machines) -> None:
    """At the start, and later for each change; with one, a change says that it is replicated."""
    primary, _ = machines.pair(synchronous=False)
    await (await open_store(primary.url)).close()
    with pytest.raises(StoreUnavailable, match="KEYLATCH_DURABLE"):
        await open_store(primary.url, durable="replicated")
    primary.wait_for_standby()
    store = await open_store(primary.url, durable="replicated")
    await store.keys.add(record(), "hashed")
    assert store.durability() == "replicated"
    primary.configure("synchronous_standby_names", "")
    eventually(lambda: primary.query("SHOW synchronous_standby_names") == [("",)])
    await asyncio.sleep(0.2)  # no event tells when the other sessions have read it as well
    with pytest.raises(StoreUnavailable, match="KEYLATCH_DURABLE"):
        await revoke(store)
    assert isinstance(await store.keys.find("key_a"), Found)
    await store.close()


# Row-level security


@pytest.mark.parametrize("tables", [["keylatch_keys"], ["keylatch_keys", "keylatch_version"]])
async def test_row_level_security_that_hides_keys_is_refused(
    tables: Sequence[str], url: str
) -> None:
    """Its role would be told that valid keys do not exist."""
    store = await open_store(url)
    await store.keys.add(record(), "hashed")
    await store.close()
    restricted = await hide(url, tables)
    with pytest.raises(StoreUnavailable, match="row-level security hides rows of keylatch_keys"):
        await open_store(restricted)


async def test_hidden_rows_are_no_such_key(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above."""
    store = await open_store(url)
    await store.keys.add(record(), "hashed")
    await store.close()
    monkeypatch.setattr(Connector, "_check", lambda self, facts: None)
    restricted = await open_store(await hide(url, ["keylatch_keys"]))
    assert isinstance(await restricted.keys.find("key_a"), NotFound)
    await restricted.close()


async def hide(url: str, tables: Sequence[str]) -> str:
    """Switch it on as an adviser of a hosted database asks for, without policies; the URL of a role
    for which it counts."""
    role = f"app_{url.rpartition('/')[2]}"
    await configure(url, f"CREATE ROLE {role} LOGIN")
    await configure(url, f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    for table in tables:
        await configure(url, f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    return url.replace("postgres@", f"{role}@")


# Plans


@pytest.mark.parametrize("query", [POLL, LAGGARDS, INVALIDATIONS_SINCE, FIND, FIND_BY_LOCATOR])
async def test_no_query_is_compiled_by_the_server(query: Query, store: Store, url: str) -> None:
    """JIT compilation takes 15 ms, and a session setting against it would stay behind a pooler. So
    no plan may cost as much as `jit_above_cost`, on tables that were never analysed either, with
    the values known (statements that are not prepared, and the first ones of those that are) and
    without."""
    for columns, mode in product(
        (postgresql._CHECKED, postgresql._LEASED), ("force_custom_plan", "force_generic_plan")
    ):
        text, fixed, order = query.compile_for(postgresql._DIALECT, *columns)
        values = [f"'{1 if fixed.get(name) is None else fixed[name]}'" for name in order]
        arguments = f"({', '.join(values)})" if order else ""
        async with await psycopg.AsyncConnection.connect(url) as connection:
            await connection.execute(f"SET plan_cache_mode = {mode}".encode())
            await connection.execute(f"PREPARE statement AS {text}".encode())
            explain = f"EXPLAIN (FORMAT JSON) EXECUTE statement{arguments}"
            [[[plan]]] = await (await connection.execute(explain.encode())).fetchall()
        assert plan["Plan"]["Total Cost"] < 100_000


# Poolers


@pytest.mark.long
@pytest.mark.parametrize("robin", [0, 1])
async def test_a_pooler_shows_its_mode(robin: int, machines: Machines) -> None:
    """Whichever of its sessions it gives out first. Nothing is prepared on one."""
    primary = machines.primary()
    session = machines.add(PgBouncer(primary, "session", server_round_robin=robin))
    pooled = machines.add(PgBouncer(primary, "transaction", server_round_robin=robin))
    for url, is_pooled in ((primary.url, False), (session.url, True)):
        connector = Connector({"conninfo": url}, "KEYLATCH_STORE", needs_session=True)
        connection = await connector.connect()
        assert (connection.prepare_threshold is None) is is_pooled
        await connection.close()
    for _ in range(5):
        connector = Connector({"conninfo": pooled.url}, "KEYLATCH_STORE", needs_session=True)
        with pytest.raises(StoreUnavailable) as refused:
            await connector.connect()
        assert "KEYLATCH_STORE_DIRECT" in refused.value.hint


@pytest.mark.long
async def test_a_stalled_session_behind_a_pooler_is_terminated(machines: Machines) -> None:
    """The process id that libpq knows is the pooler's; the one that blocks is the server's."""
    primary = machines.primary()
    pooled = machines.add(PgBouncer(primary, "transaction"))
    store = await open_store(pooled.url, direct_url=primary.url)
    async with await psycopg.AsyncConnection.connect(
        primary.url, application_name="keylatch"
    ) as stalled:
        await stalled.execute("UPDATE keylatch_meta SET seq = seq + 1")
        await store.keys.add(record(), "hashed")
        with pytest.raises(psycopg.OperationalError):
            await stalled.commit()
    await store.close()


async def test_a_direct_url_to_another_store_is_refused(
    store: Store, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its leases would say nothing about the keys that are looked up. The log has the reason once,
    however often the process tries to open the store."""
    await configure(url, "CREATE SCHEMA elsewhere")
    direct_url = with_search_path(url, "elsewhere")
    # Without tables there, and with a store of its own.
    wrong = Store(url, direct_url=direct_url)
    for _ in range(3):
        with pytest.raises(StoreUnavailable) as refused:
            await wrong.open(NOW)
        assert "KEYLATCH_STORE_DIRECT" in refused.value.hint
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "the store does not answer"
    ]
    await wrong.close()
    await (await open_store(direct_url)).close()
    wrong = Store(url, direct_url=direct_url)
    with pytest.raises(StoreUnavailable, match="KEYLATCH_STORE_DIRECT leads to another store"):
        await wrong.open(NOW)
    await wrong.close()
    await (await open_store(url, direct_url=url)).close()


def with_search_path(url: str, schema: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}options=-c%20search_path%3D{schema}"


# How many connections


async def test_a_process_uses_few_connections(store: Store, url: str) -> None:
    """However much it has to do: two each for look-ups, changes and leases."""
    await store.keys.add_many([(record(f"key_{n}"), "hashed") for n in range(40)])
    counted = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    most = 0
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as observer:
        work = asyncio.gather(
            *(revoke(store, f"key_{n}") for n in range(40)),
            *(store.keys.find(f"key_{n}") for n in range(200)),
            *(store.leases.laggards(n, PATIENT) for n in range(100)),
        )
        while not work.done():
            [count] = await (await observer.execute(counted)).fetchone() or [0]
            most = max(most, count - 1)
        await work
    assert most <= 6


async def test_connections_that_are_not_used_are_closed(url: str) -> None:
    """Each process gives them back, so that others get one."""

    async def connect(on_open: object = None) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(url, autocommit=True)

    lookups = ConnectionPool(connect, max_size=2, idle_seconds=0.05)
    changes = WorkPool(connect, str, PATIENT, idle_seconds=0.05)
    await lookups.fetch("SELECT 1", (), PATIENT)
    [(idle, _)] = lookups._idle

    async def nothing(connection: object, driver_connection: object) -> None:
        pass

    pool = changes._engine.pool
    await changes.run(PATIENT, nothing)
    await asyncio.to_thread(
        eventually, lambda: not idle.is_open and changes._engine.pool is not pool
    )
    assert lookups._idle == []
    assert await lookups.fetch("SELECT 1", (), PATIENT) == [(1,)]
    await changes.run(PATIENT, nothing)
    lookups.close()
    await changes.close()
