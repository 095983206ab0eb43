"""The store in memory: its one connection."""

import gc
import sqlite3

import pytest

from keylatch.storage.memory import Memory

pytestmark = pytest.mark.anyio


async def test_a_store_in_memory_closes_its_connection_when_it_is_collected() -> None:
    """Python 3.13 and later warn of a connection that is collected while it is open."""
    memory = Memory()
    connection = await memory.read(lambda unit: unit.connection.driver_connection)
    assert isinstance(connection, sqlite3.Connection)
    assert connection.execute("SELECT 1").fetchone() == (1,)
    del memory
    gc.collect()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")
