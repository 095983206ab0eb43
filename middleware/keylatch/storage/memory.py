"""A store in this process's memory, for tests of apps: its keys are lost with the process.

It is SQLite, so it behaves as the store on a file does; work runs at once, in the caller's thread.
"""

import secrets
import sqlite3
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import StaticPool, create_engine, event

from keylatch.errors import StoreUnavailable
from keylatch.storage.database import Database, Query, Rows, Work, translate_errors

T = TypeVar("T")


class Memory(Database):
    """One connection, one transaction at a time; see `keylatch.storage.database.Database`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._identity = secrets.token_hex(16)
        self._engine = create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        # Python 3.13 and later warn of a connection that is collected while it is open.
        weakref.finalize(self, self._engine.dispose)
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))

    async def fetch(self, query: Query, *, seconds: float | None = None, **parameters: Any) -> Rows:
        return self.fetch_nowait(query, **parameters)

    async def read(self, work: Work[T], *, seconds: float | None = None) -> T:
        return self._run(work)

    async def write(
        self,
        work: Work[T],
        *,
        durable: bool = True,
        seconds: float | None = None,
        is_urgent: bool = False,
    ) -> T:
        return self._run(work)

    def fetch_nowait(self, query: Query, **parameters: Any) -> Rows:
        return self._run(
            lambda connection: [
                tuple(row) for row in connection.execute(query.statement, parameters)
            ]
        )

    def _run(self, work: Work[T]) -> T:
        with (
            self._lock,
            translate_errors(sqlite3.Error, "the store is in memory"),
            self._engine.begin() as connection,
        ):
            return work(connection)

    async def identity(self) -> str:
        return self._identity

    async def listen(self, channel: str, on_notification: Callable[[str], None]) -> None:
        raise StoreUnavailable(
            "a store in memory has no LISTEN", "one process uses it, so it needs none"
        )


def _configure(raw: sqlite3.Connection, record: object) -> None:
    raw.isolation_level = None  # sqlite3 must not begin transactions on its own
    raw.execute("PRAGMA foreign_keys = ON")
