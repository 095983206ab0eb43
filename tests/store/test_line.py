"""Questions to PostgreSQL: each gets its own answer, or none, whatever becomes of the line."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import psycopg
import pytest
from sqlalchemy.engine import make_url

from keylatch.sql.line import Lines
from keylatch.sql.postgresql import PostgreSQL
from proxy import Proxy
from servers import PostgresServer, eventually

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


class Office:
    """Lines to a server, and how many were opened."""

    def __init__(self, port: int, places: int = 2, stale_seconds: float | None = None) -> None:
        self.url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        self.opened = 0
        self.lines = Lines(self._connect, places, stale_seconds)

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        self.opened += 1
        return await psycopg.AsyncConnection.connect(self.url, autocommit=True)

    async def ask(self, text: str, *values: bytes, seconds: float = PATIENT) -> object:
        return (await self.lines.ask(text, values, seconds))[0][0]


@pytest.fixture
async def office(network: Proxy) -> AsyncIterator[Office]:
    office = Office(network.port)
    yield office
    office.lines.close()


async def test_one_line_answers_whoever_asks_in_turn(office: Office) -> None:
    """It stays open, and its statements prepared; values come as the database types them."""
    assert [await office.ask(ECHO, b"%d" % n) for n in range(5)] == [str(n) for n in range(5)]
    assert await office.ask("SELECT $1::bigint + 1", b"41") == 42
    assert await office.ask("SELECT NULL") is None
    assert office.opened == 1


async def test_many_who_ask_at_once_each_get_their_own(office: Office) -> None:
    """More of them than there are places."""
    answers = await asyncio.gather(*(office.ask(ECHO, b"%d" % n) for n in range(50)))
    assert answers == [str(n) for n in range(50)]
    assert office.opened == 2


async def test_an_answer_that_nobody_waits_for_reaches_nobody_else(office: Office) -> None:
    """Whoever hangs up takes the line along: the next one does not hear what he had asked. (It has
    no broken twin: libpq itself refuses a question before the last answer has been read.)"""
    await hang_up_amid(office.ask(SLOW_ECHO, b"mine"))
    assert await office.ask(SLOW_ECHO, b"yours") == "yours"


async def hang_up_amid(question: Coroutine[Any, Any, object]) -> None:
    """Cancel it when it has been sent, and let that sink in."""
    asking = asyncio.create_task(question)
    await asyncio.sleep(0.05)
    asking.cancel()
    await asyncio.wait([asking])


async def test_what_the_server_has_against_a_question_is_told(office: Office) -> None:
    """And the next question is answered."""
    with pytest.raises(psycopg.Error, match="division by zero"):
        await office.ask("SELECT 1 / $1::int", b"0")
    assert await office.ask(ECHO, b"on") == "on"


async def test_a_question_larger_than_a_socket_takes_at_once(office: Office) -> None:
    """What is left of it is sent when there is room."""
    large = b"x" * 20_000_000
    assert await office.ask("SELECT length($1)", large) == len(large)


async def test_a_line_that_dies_while_nobody_asks_costs_nothing(
    office: Office, network: Proxy
) -> None:
    """The event loop hears of it; the next question goes over a new one."""
    await office.ask(ECHO, b"once")
    [idle] = office.lines._idle
    network.cut()
    await asyncio.to_thread(eventually, lambda: not idle.is_open)
    assert await office.ask(ECHO, b"again") == "again"


async def test_a_line_that_is_lost_amid_a_question_is_replaced(
    office: Office, network: Proxy
) -> None:
    """Once: the question is asked again on a new one."""
    await office.ask(ECHO, b"it is prepared")
    with network.held():
        asking = asyncio.create_task(office.ask(ECHO, b"again"))
        await asyncio.to_thread(eventually, lambda: bool(office.lines._busy))
        network.cut()
    assert await asking == "again"
    assert office.opened == 2


async def test_a_session_that_is_ended_by_the_server_is_replaced(office: Office) -> None:
    """As at a restart, or by an operator's hand."""
    await office.ask(ECHO, b"it is idle")
    pid = await office.ask("SELECT pg_backend_pid()")
    asking = [asyncio.create_task(office.ask(SLOW_ECHO, b"here")) for _ in range(2)]
    await asyncio.sleep(0.05)
    async with await psycopg.AsyncConnection.connect(office.url) as operator:
        await operator.execute("SELECT pg_terminate_backend(%s)", [pid])
    assert await asyncio.gather(*asking) == ["here", "here"]


async def test_a_line_that_fell_silent_is_not_trusted_for_long(
    network: Proxy,
) -> None:
    """It was idle when the network swallowed it; the question is asked again on a new line, long
    before its time is over, and the idle siblings are not asked at all."""
    office = Office(network.port, stale_seconds=0.1)
    await asyncio.gather(*(office.ask(SLOW_ECHO, b"warm") for _ in range(2)))
    with network.swallowing():
        asking = asyncio.create_task(office.ask(ECHO, b"late"))
        await asyncio.sleep(0.05)
    assert await asking == "late"
    assert office.opened == 3
    assert len(office.lines._idle) == 1
    office.lines.close()


async def test_a_silent_server_is_given_up_in_time(office: Office, network: Proxy) -> None:
    """Also while it is being connected to."""
    with network.swallowing():
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await office.ask(ECHO, b"hello", seconds=0.05)
    assert await office.ask(ECHO, b"hello") == "hello"


async def test_closed_lines_tell_whoever_waits(office: Office) -> None:
    """At the end of a process nobody is left hanging."""
    asking = asyncio.create_task(office.ask("SELECT pg_sleep(60)"))
    await asyncio.to_thread(eventually, lambda: bool(office.lines._busy))
    office.lines.close()
    with pytest.raises(psycopg.OperationalError):
        await asking


async def test_only_leases_wait_for_no_disk(postgres: PostgresServer) -> None:
    """What a crash may take back of them makes revokes wait longer; of a change it would take the
    revoke."""
    database = PostgreSQL(make_url(postgres.new_database()))
    shown = "SHOW synchronous_commit"
    assert await database._leasing.ask(shown, (), PATIENT) == [("off",)]
    assert await database._looking_up.ask(shown, (), PATIENT) == [("on",)]
    for seconds in (None, PATIENT):
        written = await database.write(
            lambda connection: connection.exec_driver_sql(shown).scalar(), seconds=seconds
        )
        assert written == "on"
    await database.close()
