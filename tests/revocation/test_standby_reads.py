"""KEYLATCH_STORE_READ: what a standby says of a key counts while it has no other history."""

import psycopg
import pytest

from keylatch.core.decisions import Allow, Deny, Reason
from keylatch.storage import postgresql
from keylatch.storage.authorization import Actor
from keylatch.storage.store import Found, Store
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer

pytestmark = pytest.mark.anyio


async def test_a_standby_with_changes_of_its_own_is_not_believed(
    make_engine: MakeEngine, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was promoted, and there the key is enabled. The primary has it disabled, and that counts.
    Without such changes the standby is believed."""
    monkeypatch.setattr(postgresql, "_STANDBY_SECONDS", 30.0)  # a slow machine is no failure
    url = postgres.new_database()
    async with make_engine(store=Store(url)) as engine:
        keyring = await engine.keyring()
        key, other = await keyring.create("acme", "a"), await keyring.create("acme", "b")
        await keyring.change("acme", key.record.id, active=False)
    server, _, name = url.rpartition("/")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE copy_of_{name} TEMPLATE {name}")
    standby = Store(f"{server}/copy_of_{name}")
    async with make_engine(store=Store(url, read_url=f"{server}/copy_of_{name}")) as engine:
        assert isinstance(await engine.authenticator.check_token(other.token), Allow)
        lookup = await engine._started()
        assert isinstance(await lookup._find_on_standby(other.token), Found)
        await standby.open(0)
        await standby.keys.change("acme", key.record.id, 1, {"active": True}, by=Actor("me"))
        await standby.close()
        assert await lookup._find_on_standby(other.token) is None
        assert await engine.authenticator.check_token(key.token) == Deny(Reason.DISABLED)
