"""Copies of a store that share a Redis with it: a backup that is served, a clone for staging."""

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fakeredis import FakeAsyncRedis, FakeServer

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.core.decisions import Allow, Deny, Reason
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.revocation.invalidations import MAX_SEQ
from keylatch.settings import Settings
from keylatch.storage.store import Secrets, Store
from keylatch_sidecar.operations import backup
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer, RedisServer, eventually

pytestmark = pytest.mark.anyio

Copy = Callable[[], str]
"""Copies the store that no process uses, and returns the copy's URL."""


class Anonymous(Store):
    """A broken twin: it does not say which database it is."""

    async def open(self, now_ms: int) -> Secrets:
        secrets = await super().open(now_ms)
        self.invalidations.database_hash = ""
        return secrets


def bearer(key: Created) -> list[bytes]:
    return [b"Bearer " + key.token.reveal().encode()]


async def epoch_of(store: Store) -> str:
    """What a store says of itself."""
    await store.open(0)
    epoch = (await store.invalidations.since(MAX_SEQ)).epoch
    await store.close()
    return epoch


def copied_file(url: str, how: Callable[[Path, Path], Any]) -> str:
    source = Path(url.removeprefix("sqlite:///"))
    target = source.with_name("copy.db")
    how(source, target)
    return f"sqlite:///{target}"


def copied_database(url: str, postgres: PostgresServer) -> str:
    """Another one in the same cluster, with the same tables."""
    server, _, name = url.rpartition("/")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE copy_of_{name} TEMPLATE {name}")
    return f"{server}/copy_of_{name}"


@pytest.fixture(params=["cp", "backup", "template"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store_url(kind: str, request: pytest.FixtureRequest, store_url: str) -> str:
    if kind != "template":
        return store_url
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return postgres.new_database()


@pytest.fixture
def copy(kind: str, store_url: str, request: pytest.FixtureRequest) -> Copy:
    if kind == "template":
        return lambda: copied_database(store_url, request.getfixturevalue("postgres"))
    how = shutil.copy if kind == "cp" else backup.create_backup
    return lambda: copied_file(store_url, how)


async def create(engine: Engine, name: str) -> Created:
    return await (await engine.keyring()).create("acme", name)


async def test_a_copy_reactivates_no_key(make_engine: MakeEngine, copy: Copy) -> None:
    """The copy accepts a key that was revoked in the original meanwhile, and writes it to Redis.
    The original's processes, new ones as well, refuse it, and count nothing as forged."""
    server = FakeServer()
    original = make_engine(redis=FakeAsyncRedis(server=server))
    kept, revoked = await create(original, "kept"), await create(original, "revoked")
    await original.stop()
    url = copy()
    await (await original.keyring()).delete("acme", revoked.record.id)
    staging = make_engine(redis=FakeAsyncRedis(server=server), store=Store(url))
    for key in (kept, revoked):
        assert isinstance(await staging.authenticate(bearer(key)), Allow)
    await staging.stop()
    names = set(await FakeAsyncRedis(server=server).keys())
    newcomer = make_engine(redis=FakeAsyncRedis(server=server))
    for process in (original, newcomer):
        assert await process.authenticate(bearer(revoked)) == Deny(Reason.REVOKED)
        assert isinstance(await process.authenticate(bearer(kept)), Allow)
        assert process._opened is not None
        assert process._opened.shared_cache is not None
        assert process._opened.shared_cache.forged.value == 0
        await process.stop()
    more = set(await FakeAsyncRedis(server=server).keys()) - names
    assert len([name for name in more if kept.record.id.encode() in name]) == 1


async def test_a_copy_has_another_epoch(kind: str, copy: Copy, store_url: str) -> None:
    """So nothing that names it or is signed with it is the same; without the database in it, the
    twin's is, unless it was renewed, as `keylatch backup` does."""
    before = await epoch_of(Store(store_url))
    url = copy()
    assert await epoch_of(Store(store_url)) == before
    assert await epoch_of(Store(url)) != before
    twins = await epoch_of(Anonymous(store_url)), await epoch_of(Anonymous(url))
    assert (twins[0] == twins[1]) is (kind != "backup")


async def test_all_processes_of_a_store_say_the_same(store_url: str, kind: str) -> None:
    """Also those that come to the file by a link."""
    urls = [store_url, store_url]
    if kind != "template":
        path = Path(store_url.removeprefix("sqlite:///"))
        await epoch_of(Store(store_url))
        link = path.with_name("link.db")
        link.symlink_to(path)
        urls.append(f"sqlite:///{link}")
    assert len({await epoch_of(Store(url)) for url in urls}) == 1


async def test_stores_in_memory_have_nothing_in_common() -> None:
    """Each is one of its own."""
    assert await epoch_of(Store("sqlite://")) != await epoch_of(Store("sqlite://"))


async def test_a_restored_backup_goes_beyond_all_that_was_given_out() -> None:
    """A backup has an epoch of its own, so another epoch alone does not say that a process was
    faster to renew it: numbers that were given out are never given out again."""
    store = Store("sqlite://")
    await store.open(0)
    present = await store.invalidations.since(MAX_SEQ)
    await store.invalidations.start_new_epoch("of the original", present.seq + 50, 0)
    renewed = await store.invalidations.since(MAX_SEQ)
    assert renewed.seq > present.seq + 50
    assert renewed.epoch != present.epoch
    await store.invalidations.start_new_epoch("of the original", present.seq + 20, 0)
    assert (await store.invalidations.since(MAX_SEQ)).epoch == renewed.epoch, "one was faster"
    await store.invalidations.start_new_epoch(renewed.epoch, 0, 0)
    assert (await store.invalidations.since(MAX_SEQ)).epoch != renewed.epoch
    await store.close()


async def test_two_schemas_of_a_database_are_two_stores(postgres: PostgresServer) -> None:
    """The tables say which, and not only the database."""
    url = postgres.new_database()
    epochs = [await epoch_of(Store(url))]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA staging")
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in tables.fetchall():
            connection.execute(f"CREATE TABLE staging.{table} AS TABLE public.{table}")
    epochs.append(await epoch_of(Store(f"{url}?options=-csearch_path%3Dstaging")))
    assert epochs[0].partition(".")[0] == epochs[1].partition(".")[0]
    assert epochs[0] != epochs[1]


async def test_a_role_that_may_not_ask_for_the_cluster_is_served(postgres: PostgresServer) -> None:
    """Its databases differ by their numbers."""
    url = postgres.new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
        connection.execute("CREATE ROLE app LOGIN")
        connection.execute("GRANT ALL ON SCHEMA public TO app")
    as_app = url.replace("postgres@", "app@")
    assert await epoch_of(Store(as_app)) == await epoch_of(Store(as_app))


# Notices


@pytest.fixture
async def two_stores(
    postgres: PostgresServer, redis_server: RedisServer, request: pytest.FixtureRequest
) -> AsyncIterator[tuple[Engine, Engine, Created]]:
    """A process of the original, one of its copy, and a key that both know."""
    kind: type[Store] = request.param
    url = postgres.new_database()
    first = engine_on(kind(url), url, redis_server)
    key = await create(first, "known to both")
    await first.stop()
    copy = copied_database(url, postgres)
    engines = [engine_on(kind(each), each, redis_server) for each in (url, copy)]
    for engine in engines:
        assert isinstance(await engine.authenticate(bearer(key)), Allow)
    with redis_server.client() as client:
        hashes = {engine.store.invalidations.database_hash for engine in engines}
        channels = {f"keylatch:{{{database_hash}}}:invalidations" for database_hash in hashes}
        listening = partial(client.pubsub_numsub, *channels)
        await asyncio.to_thread(eventually, lambda: sum(n for _, n in listening()) == 2)
    yield engines[0], engines[1], key
    for engine in engines:
        await engine.stop()


def engine_on(store: Store, url: str, redis: RedisServer) -> Engine:
    # With a lease that outlasts the test, what is known early came by a notice.
    settings = Settings.load(store=url, redis=redis.url, lease=60.0)
    return Engine(settings, store=store, hasher=Hasher("argon2id", CHEAPEST))


@pytest.mark.long
@pytest.mark.parametrize("two_stores", [Store], indirect=True)
async def test_notices_of_a_copy_do_not_reach_the_original(
    two_stores: tuple[Engine, Engine, Created], caplog: pytest.LogCaptureFixture
) -> None:
    """Only the copy's own processes receive notices of its revokes."""
    original, copy, key = two_stores
    known = original._invalidations._floor_and_tombstones
    await (await copy.keyring()).delete("acme", key.record.id)
    await asyncio.sleep(0.2)
    assert original._invalidations._floor_and_tombstones == known
    assert original._invalidations.pending == ()
    assert isinstance(original.authenticator.check_token_cached(key.token), Allow)
    assert await copy.authenticate(bearer(key)) == Deny(Reason.REVOKED)
    assert "backup" not in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("two_stores", [Anonymous], indirect=True)
async def test_the_twin_that_does_not_say_which_store_it_is_raises_a_false_alarm(
    two_stores: tuple[Engine, Engine, Created], caplog: pytest.LogCaptureFixture
) -> None:
    """It detects a restored backup in error: the copy's notice has a higher number."""
    _, copy, key = two_stores
    with caplog.at_level(logging.CRITICAL):
        await (await copy.keyring()).delete("acme", key.record.id, wait=False)
        for _ in range(1_000):
            if "was it restored from a backup?" in caplog.text:
                break
            await asyncio.sleep(0.02)
    assert "was it restored from a backup?" in caplog.text
