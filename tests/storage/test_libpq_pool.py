"""Queries to PostgreSQL: each gets its own answer, or an error, whatever the connection does."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import psycopg
import pytest

from keylatch.storage.libpq_pool import ConnectionPool
from proxy import Proxy
from tests.support.servers import PostgresServer, eventually

pytestmark = pytest.mark.anyio
ECHO = "SELECT $1::text"
SLOW_ECHO = "SELECT $1::text FROM pg_sleep(0.2)"
PATIENT = 10.0


@pytest.fixture
async def network(postgres: PostgresServer) -> AsyncIterator[Proxy]:
    """What lies between the lines and the server."""
    network = Proxy(postgres.port)
    await network.start()
    yield network
    await network.stop()


class CountingPool:
    """Lines to a server, and how many were opened."""

    def __init__(self, port: int, places: int = 2, stale_seconds: float | None = None) -> None:
        self.url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        self.opened = 0
        self.lines = ConnectionPool(self._connect, places, stale_seconds)

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        self.opened += 1
        return await psycopg.AsyncConnection.connect(self.url, autocommit=True)

    async def fetch(self, text: str, *values: bytes, seconds: float = PATIENT) -> object:
        return (await self.lines.fetch(text, values, seconds))[0][0]


@pytest.fixture
async def pool(network: Proxy) -> AsyncIterator[CountingPool]:
    pool = CountingPool(network.port)
    yield pool
    pool.lines.close()


async def test_one_connection_answers_callers_in_turn(pool: CountingPool) -> None:
    """It stays open, and its statements prepared; values come as the database types them."""
    assert [await pool.fetch(ECHO, b"%d" % n) for n in range(5)] == [str(n) for n in range(5)]
    assert await pool.fetch("SELECT $1::bigint + 1", b"41") == 42
    assert await pool.fetch("SELECT NULL") is None
    assert pool.opened == 1


async def test_many_who_ask_at_once_each_get_their_own(pool: CountingPool) -> None:
    """More of them than there are places."""
    answers = await asyncio.gather(*(pool.fetch(ECHO, b"%d" % n) for n in range(50)))
    assert answers == [str(n) for n in range(50)]
    assert pool.opened == 2


async def test_the_answer_of_a_cancelled_query_reaches_no_other_caller(pool: CountingPool) -> None:
    """A cancelled caller closes its connection: the next one does not get its answer. (It has
    no broken twin: libpq itself refuses a query before the last answer has been read.)"""
    await cancel_during(pool.fetch(SLOW_ECHO, b"mine"))
    assert await pool.fetch(SLOW_ECHO, b"yours") == "yours"


async def cancel_during(question: Coroutine[Any, Any, object]) -> None:
    """Cancel it when it has been sent, and let that sink in."""
    asking = asyncio.create_task(question)
    await asyncio.sleep(0.05)
    asking.cancel()
    await asyncio.wait([asking])


async def test_an_error_of_the_server_is_raised(pool: CountingPool) -> None:
    """And the next query is answered."""
    with pytest.raises(psycopg.Error, match="division by zero"):
        await pool.fetch("SELECT 1 / $1::int", b"0")
    assert await pool.fetch(ECHO, b"on") == "on"


async def test_a_query_larger_than_a_socket_takes_at_once(pool: CountingPool) -> None:
    """What is left of it is sent when there is room."""
    large = b"x" * 20_000_000
    assert await pool.fetch("SELECT length($1)", large) == len(large)


async def test_a_connection_that_is_lost_while_idle_costs_nothing(
    pool: CountingPool, network: Proxy
) -> None:
    """The event loop is notified; the next query uses a new connection."""
    await pool.fetch(ECHO, b"once")
    [(idle, _)] = pool.lines._idle
    network.reset_connections()
    await asyncio.to_thread(eventually, lambda: not idle.is_open)
    assert await pool.fetch(ECHO, b"again") == "again"


async def test_a_connection_that_is_lost_during_a_query_is_replaced(
    pool: CountingPool, network: Proxy
) -> None:
    """Once: the query is sent again on a new one."""
    await pool.fetch(ECHO, b"it is prepared")
    with network.held():
        asking = asyncio.create_task(pool.fetch(ECHO, b"again"))
        await asyncio.to_thread(eventually, lambda: bool(pool.lines._busy))
        network.reset_connections()
    assert await asking == "again"
    assert pool.opened == 2


async def test_a_session_that_is_ended_by_the_server_is_replaced(pool: CountingPool) -> None:
    """As at a restart, or by an operator's hand."""
    await pool.fetch(ECHO, b"it is idle")
    pid = await pool.fetch("SELECT pg_backend_pid()")
    asking = [asyncio.create_task(pool.fetch(SLOW_ECHO, b"here")) for _ in range(2)]
    await asyncio.sleep(0.05)
    async with await psycopg.AsyncConnection.connect(pool.url) as operator:
        await operator.execute("SELECT pg_terminate_backend(%s)", [pid])
    assert await asyncio.gather(*asking) == ["here", "here"]


async def test_a_silent_connection_is_not_trusted_for_long(
    network: Proxy,
) -> None:
    """It was idle when the network dropped it; the query is sent again on a new connection, long
    before its timeout, and the other idle connections are not used at all."""
    pool = CountingPool(network.port, stale_seconds=0.1)
    await asyncio.gather(*(pool.fetch(SLOW_ECHO, b"warm") for _ in range(2)))
    with network.blackholing():
        asking = asyncio.create_task(pool.fetch(ECHO, b"late"))
        await asyncio.sleep(0.05)
    assert await asking == "late"
    assert pool.opened == 3
    assert len(pool.lines._idle) == 1
    pool.lines.close()


async def test_a_silent_server_is_given_up_in_time(pool: CountingPool, network: Proxy) -> None:
    """Also while it is being connected to."""
    with network.blackholing():
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await pool.fetch(ECHO, b"hello", seconds=0.05)
    assert await pool.fetch(ECHO, b"hello") == "hello"


async def test_closing_the_pool_ends_waiting_callers(pool: CountingPool) -> None:
    """Closing the pool ends all waiting callers with an error."""
    asking = asyncio.create_task(pool.fetch("SELECT pg_sleep(60)"))
    await asyncio.to_thread(eventually, lambda: bool(pool.lines._busy))
    pool.lines.close()
    with pytest.raises(psycopg.OperationalError):
        await asking


async def test_a_query_whose_caller_has_left_is_cancelled(pool: CountingPool) -> None:
    """Else each would keep a process of the server, for as long as what it waits for takes."""
    with pytest.raises(TimeoutError):
        await pool.fetch("SELECT pg_sleep(600) -- left", seconds=0.1)
    async with await psycopg.AsyncConnection.connect(pool.url, autocommit=True) as observer:
        left = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '% -- left' AND state = 'active'"
        async with asyncio.timeout(PATIENT):
            while await (await observer.execute(left)).fetchone():  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.01)


async def test_a_connection_that_took_too_long_is_used_by_a_later_query(
    postgres: PostgresServer,
) -> None:
    """The first of several hosts does not answer: to get to the second takes longer than a lease
    lasts, and every attempt would end at the first one."""
    is_reached = asyncio.Event()
    attempts = 0

    async def connect() -> psycopg.AsyncConnection[Any]:
        nonlocal attempts
        attempts += 1
        await is_reached.wait()
        url = f"postgresql://postgres@127.0.0.1:{postgres.port}/postgres"
        return await psycopg.AsyncConnection.connect(url, autocommit=True)

    lines = ConnectionPool(connect, max_size=2)
    for _ in range(5):
        with pytest.raises(TimeoutError):
            await lines.fetch("SELECT 1", (), 0.01)
    is_reached.set()
    await asyncio.to_thread(eventually, lambda: len(lines._idle) == 2)
    assert await lines.fetch("SELECT 1", (), PATIENT) == [(1,)]
    assert attempts == 5
    lines.close()
