"""A PostgreSQL that falls silent: no answer, no reset, and later a network that is sound again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest
from sqlalchemy import Connection

from keylatch.errors import StoreUnavailable
from keylatch.store import Absent, Store
from proxy import Proxy
from servers import PostgresServer

pytestmark = [pytest.mark.anyio, pytest.mark.long]
MORE_THAN_THE_POOL = 20
AT_ONCE = 5


@pytest.fixture
async def line(postgres: PostgresServer) -> AsyncIterator[Proxy]:
    """The network between the store and its server."""
    line = Proxy(postgres.port)
    await line.start()
    yield line
    await line.stop()


@pytest.fixture
def url(postgres: PostgresServer, line: Proxy) -> str:
    return postgres.new_database().replace(str(postgres.port), str(line.port))


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    store = Store(url)
    await store.open(0)
    await store.join("member", seconds=5)
    yield store
    await store.close()


async def test_whoever_asks_a_silent_server_is_told_in_time(store: Store, line: Proxy) -> None:
    """Every question ends as unavailable, and none of them keeps a place in the pool: when the
    network is sound again, so is the store."""
    assert (await store.poll("member", 0, seconds=5)).is_member
    with line.swallowing():
        for _ in range(MORE_THAN_THE_POOL // AT_ONCE):
            answers = await asyncio.gather(
                *(store.poll("member", 0, seconds=0.1) for _ in range(AT_ONCE)),
                return_exceptions=True,
            )
            assert [type(answer) for answer in answers] == [StoreUnavailable] * AT_ONCE
    assert (await store.poll("member", 0, seconds=5)).is_member
    assert isinstance(await store.find("key_unknown"), Absent)


async def test_connecting_to_a_silent_server_keeps_no_place(store: Store, line: Proxy) -> None:
    """More attempts than the pool has places, one after the other, each given up in time: when the
    network is sound again, the next one is answered at once."""
    line.cut()
    with line.swallowing():
        for _ in range(MORE_THAN_THE_POOL):
            with pytest.raises(StoreUnavailable):
                await store.poll("member", 0, seconds=0.05)
    assert (await store.poll("member", 0, seconds=0.5)).is_member


async def test_a_lease_does_not_queue_behind_look_ups(store: Store, line: Proxy) -> None:
    """Look-ups that fell into the silence wait it out; the lease is renewed, or the process joins
    again, as soon as it ends."""
    await store.find("key_unknown")
    with line.swallowing():
        stuck = [asyncio.create_task(store.find("key_unknown")) for _ in range(MORE_THAN_THE_POOL)]
        with pytest.raises(StoreUnavailable):
            await store.poll("member", 0, seconds=0.3)
        with pytest.raises(StoreUnavailable):
            await store.join("another", seconds=0.3)
    assert (await store.poll("member", 0, seconds=0.5)).is_member
    assert not all(task.done() for task in stuck)
    await asyncio.gather(*stuck, return_exceptions=True)


async def test_connections_that_died_meanwhile_do_not_show(
    store: Store, line: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that was restarted costs a second attempt, and nobody a refusal, however many idle
    connections died with it; and no library fills the log with tracebacks."""
    for _ in range(3):
        known = await asyncio.gather(*(store.find("key_unknown") for _ in range(AT_ONCE)))
        assert [type(one) for one in known] == [Absent] * AT_ONCE
        line.cut()
        assert isinstance(await store.find("key_unknown"), Absent)
        line.cut()
        assert (await store.poll("member", 0, seconds=5)).is_member
        line.cut()
    assert caplog.records == []


async def test_a_lock_is_not_kept_by_whoever_fell_silent(
    store: Store, url: str, line: Proxy, postgres: PostgresServer
) -> None:
    """The counter row is everybody's: a process that is cut off in the middle of a change lets
    go of it in two seconds, not when the server gives the line up."""
    others = Store(url.replace(str(line.port), str(postgres.port)))
    await others.open(0)
    with ExitStack() as silence:

        def change_and_fall_silent(connection: Connection) -> None:
            connection.exec_driver_sql("UPDATE keylatch_meta SET seq = seq + 1")
            silence.enter_context(line.swallowing())

        with pytest.raises(StoreUnavailable, match="in time"):
            await store._database.write(change_and_fall_silent, seconds=0.2)
        await others.renew((await others.changes(0)).epoch, 1)  # it needs the row
    await others.close()
