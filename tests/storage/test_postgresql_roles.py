"""The roles of docs/postgresql-roles.md, created by its own statements on a real PostgreSQL."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from keylatch.core.decisions import Allow
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.errors import StoreUnavailable
from keylatch.settings import Settings
from keylatch.storage.store import Store
from tests.support.engines import wait_until
from tests.support.servers import PostgresServer

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[2] / "docs/postgresql-roles.md"
ROLES = ("keylatch_manager", "keylatch_checker", "keylatch_owner")
CREATE_ROLES, GRANT = re.findall(r"```sql\n(.+?)```", PAGE.read_text(), re.DOTALL)
MANY_CHANGES = 200_000

Connection = psycopg.Connection[tuple[Any, ...]]


def url_of(url: str, role: str) -> str:
    return url.replace("postgres@", f"keylatch_{role}@")


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    """An empty database, and the roles, which may do nothing yet with keylatch's tables."""
    url = postgres.new_database()
    with psycopg.connect(url, autocommit=True) as superuser:
        superuser.execute(CREATE_ROLES)
        yield url
        for role in ROLES:  # roles belong to the server, not to the database
            superuser.execute(f"DROP OWNED BY {role} CASCADE")
            superuser.execute(f"DROP ROLE {role}")


@pytest.fixture
def superuser(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def granted(url: str) -> None:
    """The tables, made by the owner, and the grants."""
    store = Store(url_of(url, "owner"))
    await store.open(0)
    await store.close()
    with psycopg.connect(url_of(url, "owner"), autocommit=True) as owner:
        owner.execute(GRANT)


def engine_of(url: str, role: str) -> Engine:
    return Engine(Settings.load(store=url_of(url, role), redis="", hasher="sha256", clients="on"))


@pytest.fixture
async def token(url: str, granted: None) -> AsyncIterator[Token]:
    """Of a key that a manager has created."""
    async with engine_of(url, "manager") as engine:
        yield (await (await engine.keyring()).create("acme", "a key")).token


async def is_allowed(engine: Engine, token: Token) -> bool:
    decision = await engine.authenticate([b"Bearer " + token.reveal().encode()])
    return isinstance(decision, Allow)


def is_true(superuser: Connection, query: str) -> Callable[[], Awaitable[bool]]:
    async def is_so() -> bool:
        [(answer,)] = superuser.execute(query).fetchall()
        return bool(answer)

    return is_so


OLD_USES_ARE_GONE = "SELECT count(*) = 0 FROM keylatch_usage WHERE day = 1"
USES_ARE_STORED = "SELECT count(*) > 0 FROM keylatch_usage WHERE outcome = 'allowed' AND day > 1"


@pytest.fixture
def busy_store(superuser: Connection, token: Token, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many changes that the log is pruned, and old uses that are deleted, without a wait."""
    monkeypatch.setattr("keylatch.engine._MAINTENANCE_SECONDS", 0.05)
    superuser.execute("UPDATE keylatch_meta SET seq = %s", (MANY_CHANGES,))
    superuser.execute("INSERT INTO keylatch_usage VALUES ('key_x', 1, 'allowed', 1)")


async def use_and_maintain(url: str, role: str, token: Token, superuser: Connection) -> None:
    """A process that checks, stores uses, and has done its housekeeping once."""
    async with engine_of(url, role) as engine:
        engine.store.audit_days = 400  # as in a sidecar
        assert await is_allowed(engine, token)
        await engine.ready()
        async with asyncio.timeout(60):
            await wait_until(is_true(superuser, USES_ARE_STORED))
            await wait_until(is_true(superuser, OLD_USES_ARE_GONE))


def pruned(superuser: Connection) -> int:
    [(number,)] = superuser.execute("SELECT pruned_seq FROM keylatch_meta").fetchall()
    return int(number)


@pytest.mark.usefixtures("busy_store")
async def test_a_role_that_only_checks_runs_in_silence(
    url: str, token: Token, superuser: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Leases, checks, uses and housekeeping leave no line in the log, however long the log of
    changes is; a manager prunes that."""
    caplog.clear()
    await use_and_maintain(url, "checker", token, superuser)
    assert [record.message for record in caplog.records] == []
    assert pruned(superuser) == 0
    async with engine_of(url, "manager"), asyncio.timeout(60):
        await wait_until(is_true(superuser, "SELECT pruned_seq > 0 FROM keylatch_meta"))
    assert pruned(superuser) == MANY_CHANGES - 100_000


@pytest.mark.usefixtures("busy_store")
async def test_each_right_is_needed(
    url: str, token: Token, superuser: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """The twin without one of them: the log names what is denied."""
    caplog.clear()
    superuser.execute("REVOKE UPDATE (last_used) ON keylatch_keys FROM keylatch_checker")
    async with engine_of(url, "checker") as engine:
        assert await is_allowed(engine, token)

        async def is_logged() -> bool:
            return "permission denied for table keylatch_keys" in caplog.text

        async with asyncio.timeout(60):
            await wait_until(is_logged)
    assert "usage counts wait for the store" in caplog.text


async def test_a_role_that_only_checks_changes_no_key(
    url: str, token: Token, superuser: Connection
) -> None:
    """Neither through keylatch nor with SQL can it create a key, or re-activate one."""
    async with engine_of(url, "checker") as engine:
        assert await is_allowed(engine, token)
        keyring = await engine.keyring()
        changes: list[Awaitable[object]] = [
            keyring.create("acme", "another"),
            keyring.delete("acme", token.key_id),
            keyring.change("acme", token.key_id, active=False),
        ]
        for change in changes:
            with pytest.raises(StoreUnavailable, match="permission denied"):
                await change
    statements = [
        "UPDATE keylatch_keys SET deleted_at = NULL",
        "UPDATE keylatch_keys SET hash = ''",
        "DELETE FROM keylatch_invalidations",
        "DELETE FROM keylatch_audit",
        "INSERT INTO keylatch_organizations VALUES ('x', true, 0)",
    ]
    with psycopg.connect(url_of(url, "checker"), autocommit=True) as checker:
        for statement in statements:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                checker.execute(statement)
    assert superuser.execute("SELECT count(*) FROM keylatch_keys").fetchall() == [(1,)]


async def test_a_manager_needs_no_owner(url: str, token: Token) -> None:
    """It revokes a key, and processes of the other role no longer accept it; it rotates the store's
    secrets."""
    async with engine_of(url, "checker") as checking, engine_of(url, "manager") as managing:
        assert await is_allowed(checking, token)
        keyring = await managing.keyring()
        changed = await keyring.delete("acme", token.key_id)
        assert changed is not None
        assert changed.receipt.acknowledged == changed.receipt.members == 3
        assert not await is_allowed(checking, token)
        await (await managing.store_secrets()).rotate()
        renewed = (await keyring.create("acme", "another")).token
        assert await is_allowed(checking, renewed)


IDLE = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ClientRead' AND usename = %s"


async def test_a_manager_sees_who_blocks_it(url: str, token: Token, superuser: Connection) -> None:
    """Sessions of a stalled process of the other role, to end them; not without membership."""

    def seen() -> bool:
        with psycopg.connect(url_of(url, "manager"), autocommit=True) as manager:
            [(count,)] = manager.execute(IDLE, ("keylatch_checker",)).fetchall()
        return bool(count)

    async with engine_of(url, "checker") as engine:
        assert await is_allowed(engine, token)
        assert seen()
        superuser.execute("REVOKE keylatch_checker FROM keylatch_manager")
        assert not seen()


async def test_without_tables_the_hint_names_the_owner(url: str) -> None:
    """A role without the right to create them is told who has to run what."""
    store = Store(url_of(url, "checker"))
    with pytest.raises(StoreUnavailable) as caught:
        await store.open(0)
    assert caught.value.message == "the store failed: permission denied for schema public"
    assert "run `keylatch migrate` as the owner of the tables" in caught.value.hint
    assert "docs/postgresql-roles.md" in caught.value.hint
    await store.close()
