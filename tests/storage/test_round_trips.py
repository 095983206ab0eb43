"""Round trips to PostgreSQL: far from the server, nothing else takes time."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection

from keylatch.core.decisions import KeyRecord, Principal, secret_version_of
from keylatch.core.validation import LIVE
from keylatch.storage.authorization import Actor
from keylatch.storage.invalidation_log import advance
from keylatch.storage.store import Store
from tests.storage.test_store import NOW, record
from tests.support.postgresql_cluster import Way
from tests.support.servers import PostgresServer

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

TRIPS = 5
"""BEGIN; read and lock the key; advance; change the key and log it; COMMIT."""
DELETED = {"active": False, "revoked_reason": None, "deleted_at": NOW}


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.new_database()


@pytest.fixture
def way(postgres: PostgresServer) -> Iterator[Way]:
    way = Way(postgres.port)
    yield way
    way.remove()


@pytest.fixture
async def store(url: str, way: Way, postgres: PostgresServer) -> AsyncIterator[Store]:
    store = Store(url.replace(f":{postgres.port}", f":{way.port}"))
    await store.open(NOW)
    yield store
    await store.close()


async def add(store: Store, key_id: str, environment: str = LIVE) -> KeyRecord:
    return (await store.keys.add(record(key_id, environment=environment), "hashed"))[0]


def acting(by: KeyRecord) -> Actor:
    secret = secret_version_of(by)
    principal = Principal(by.id, by.name, by.organization_id, by.permission, by.environment, secret)
    return Actor(by.id, principal, now_ms=lambda: NOW)


async def delete(store: Store, key_id: str, by: Actor) -> tuple[KeyRecord, int] | None:
    return await store.keys.change("acme", key_id, NOW, DELETED, by=by)


async def trips(way: Way, work: Callable[[], Awaitable[object]]) -> int:
    before = way.round_trips
    await work()
    return way.round_trips - before


async def test_a_delete_takes_few_round_trips(store: Store, way: Way) -> None:
    """By a key one more: it is authorized by a statement that begins when the sequence row is
    locked."""
    admin = await add(store, "key_admin")
    for key_id in ("key_a", "key_b"):
        await add(store, key_id)
    assert await trips(way, lambda: delete(store, "key_a", Actor("me"))) == TRIPS
    assert await trips(way, lambda: delete(store, "key_b", acting(admin))) == TRIPS + 1
    assert await trips(way, lambda: delete(store, "key_b", Actor("me"))) == TRIPS


async def test_one_more_statement_is_one_more_round_trip(
    store: Store, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the test above."""
    await add(store, "key_a")

    def advance_and_ask(connection: Connection, now_ms: int, **values: Any) -> int:
        connection.exec_driver_sql("SELECT 1")
        return advance(connection, now_ms, **values)

    monkeypatch.setattr("keylatch.storage.keys.advance", advance_and_ask)
    assert await trips(way, lambda: delete(store, "key_a", Actor("me"))) == TRIPS + 1


async def test_what_a_caller_cannot_see_it_does_not_lock(store: Store, url: str) -> None:
    """A key of another environment cannot delay a revocation. While a transaction has the row, who
    may see it waits, and who may not is answered."""
    await add(store, "key_a")
    other_actor = acting(await add(store, "key_test", "test"))
    async with await psycopg.AsyncConnection.connect(url) as other:
        await other.execute("SELECT 1 FROM keylatch_keys WHERE id = 'key_a' FOR UPDATE")
        waiting = asyncio.create_task(delete(store, "key_a", Actor("me")))
        assert await delete(store, "key_a", other_actor) is None
        assert not waiting.done()
        await other.rollback()
        assert await waiting is not None
