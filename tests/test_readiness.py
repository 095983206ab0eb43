"""Readiness: 503 while no key could be checked, and which component is the reason.

On PostgreSQL a process needs a store that answers and a lease. The twin asks the store alone, as
`SELECT 1` would.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from keylatch.core.decisions import Allow, Decision, Deny, Reason
from keylatch.engine import Engine
from keylatch.errors import StoreUnavailable
from tests.support.clock import Clock
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer, eventually
from tests.support.sidecars import sidecar_on

Connection = psycopg.Connection[tuple[Any, ...]]

GRANT_NOTHING = "ALTER TABLE keylatch_members RENAME TO other_members"
GRANT_AGAIN = "ALTER TABLE other_members RENAME TO keylatch_members"


@pytest.fixture
def store_url(postgres: PostgresServer) -> str:
    return postgres.new_database()


@pytest.fixture
def admin(store_url: str) -> Iterator[Connection]:
    """A session in the store's database."""
    with psycopg.connect(store_url, autocommit=True) as connection:
        yield connection


async def is_ready(engine: Engine) -> bool:
    try:
        async with asyncio.timeout(30):
            await engine.ready()
    except StoreUnavailable:
        return False
    return True


@pytest.mark.anyio
async def test_a_process_without_a_lease_is_not_ready(
    make_engine: MakeEngine, clock: Clock, admin: Connection
) -> None:
    """The store answers and grants nothing: every check is 503, and the process is not ready. The
    twin would be."""
    engine = make_engine()
    token = (await (await engine.keyring()).create("acme", "a key")).token

    async def check() -> Decision:
        return await engine.authenticate([b"Bearer " + token.reveal().encode()])

    assert await is_ready(engine)
    assert isinstance(await check(), Allow)
    admin.execute(GRANT_NOTHING)
    clock.tick(60)  # no lease lasts as long
    assert await check() == Deny(Reason.UNAVAILABLE)
    assert not await is_ready(engine)
    await engine.store.ping()  # the twin: the store answers
    states = {component.name: component.state for component in engine.components()}
    assert (states["store"], states["lease"]) == ("ok", "unavailable")
    admin.execute(GRANT_AGAIN)
    assert await is_ready(engine)
    assert isinstance(await check(), Allow)
    await engine.stop()


@pytest.mark.anyio
async def test_a_process_with_a_lease_is_ready(make_engine: MakeEngine, admin: Connection) -> None:
    """While its lease lasts, checks are answered, whatever the store grants then."""
    engine = make_engine(lease="60")
    assert await is_ready(engine)
    admin.execute(GRANT_NOTHING)
    assert await is_ready(engine)
    admin.execute(GRANT_AGAIN)
    await engine.stop()


@pytest.mark.anyio
@pytest.mark.long
async def test_readiness_waits_for_no_lease(
    make_engine: MakeEngine, clock: Clock, admin: Connection
) -> None:
    """A store that grants too late is none: the answer comes before a lease period of a minute is
    over."""
    engine = make_engine(lease="60")
    assert await is_ready(engine)
    with admin.transaction():
        admin.execute("LOCK TABLE keylatch_members")
        clock.tick(120)
        assert not await is_ready(engine)
    await engine.stop()


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.message for each in caplog.records if each.message.startswith("error: ")]


def test_a_start_without_a_lease_names_the_lease(
    store_url: str, make_engine: MakeEngine, admin: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """On `/readyz` and, once, in the log; the twin said that all components are ok or off."""

    async def set_up() -> None:
        async with make_engine():
            pass

    asyncio.run(set_up())
    admin.execute(GRANT_NOTHING)
    with sidecar_on(store_url, Clock()) as sidecar, sidecar.probe() as probe:
        for _ in range(3):
            answer = probe.get("/readyz")
            assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
            components = answer.json()["components"]
            assert (components["store"]["state"], components["store"]["reason"]) == ("ok", "")
            assert components["lease"]["state"] == "unavailable"
            assert components["lease"]["reason"].startswith("no lease: the store grants none")
        assert len(errors(caplog)) == 1
        assert 'relation "keylatch_members" does not exist' in errors(caplog)[0]
        admin.execute(GRANT_AGAIN)
        eventually(lambda: probe.get("/readyz").status_code == 200)
        assert probe.get("/readyz").json()["components"]["lease"]["state"] == "ok"
    assert [each.message for each in caplog.records].count("keylatch has started") == 1


def test_a_start_without_tables_names_the_store(
    store_url: str, admin: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """A role that may not create tables, in an empty database: the store answers and cannot be
    opened. The hint says who has to do what."""
    admin.execute("DROP ROLE IF EXISTS newcomer")
    admin.execute("CREATE ROLE newcomer LOGIN")
    url = store_url.replace("postgres@", "newcomer@")
    with sidecar_on(url, Clock()) as sidecar, sidecar.probe() as probe:
        for _ in range(3):
            components = probe.get("/readyz").json()["components"]
            assert components["store"]["state"] == "unavailable"
            assert components["store"]["reason"].startswith("the store cannot be opened")
            assert components["lease"]["state"] == "unavailable"
    assert errors(caplog) == ["error: the store failed: permission denied for schema public"]
    hints = [each.message for each in caplog.records if each.message.startswith("hint: ")]
    assert "run `keylatch migrate` as the owner of the tables" in hints[0]
    admin.execute("DROP ROLE newcomer")
