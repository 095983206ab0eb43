"""The store as a server for several hosts, over psycopg's asynchronous sockets.

Queries go through `libpq_pool`, reads and transactions through SQLAlchemy (`work_pool`). Leases
have connections of their own. Else, while the server does not answer, they would queue behind
look-ups that wait for their time limit of two seconds, and every check would get 503 meanwhile.

The law of this file: no answer of a standby is believed, and nothing is set on a session. Every
query says what it needs itself, so it makes no difference whose session it is and which server a
pooler or balancer leads it to.

At rest a process has three connections: for leases, for look-ups and for LISTEN, which it does not
need with Redis; and for eight seconds after a change or a store of uses one for those. At most it
uses two each for leases, look-ups and changes, and the one for LISTEN.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

import psycopg
from sqlalchemy import ColumnElement, Text, case, cast, func, select
from sqlalchemy.dialects.postgresql import dialect as postgresql_dialect
from sqlalchemy.ext.asyncio import AsyncConnection

from keylatch.errors import StoreUnavailable
from keylatch.storage.blockers import Blockers
from keylatch.storage.connector import (
    NOT_REPLICATED,
    NOT_REPLICATED_HINT,
    STANDBY,
    Connector,
    PsycopgConnection,
)
from keylatch.storage.conninfo import connection_parameters
from keylatch.storage.database import (
    Database,
    Durability,
    OtherServer,
    Query,
    Rows,
    Work,
    translate_errors,
)
from keylatch.storage.libpq_connection import AnsweredByOther, ConnectionLost
from keylatch.storage.libpq_pool import ConnectionPool
from keylatch.storage.postgresql_dialect import PRIMARY_HINT, SERVER_STARTED
from keylatch.storage.transactions import transaction
from keylatch.storage.work_pool import WorkPool, shut_down_socket

T = TypeVar("T")

_DIALECT: Final = postgresql_dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]
_LOOKUP_SECONDS: Final = 2.0
_STALE_SECONDS: Final = 0.5
_WORK_SECONDS: Final = 5.0
_STANDBY_SECONDS: Final = 0.5
_STANDBY_PAUSE_SECONDS: Final = 5.0
_SERVER: Final = f"{PRIMARY_HINT}SELECT pg_is_in_recovery(), {SERVER_STARTED}"
_IDENTITY: Final = """
SELECT {cluster}, oid::text, 'keylatch_meta'::regclass::oid::text,
    pg_is_in_recovery(), {started}
FROM pg_database WHERE datname = current_database()
"""
_CLUSTER: Final = "(SELECT system_identifier::text FROM pg_control_system())"

_CHECKED: Final[tuple[ColumnElement[Any], ...]] = (
    func.pg_is_in_recovery(),
    cast(func.extract("epoch", func.pg_postmaster_start_time()), Text),
)
# A grant waits for a synchronous standby, if there is one: an old primary whose standby was
# promoted then grants no leases. `remote_write` suffices for that: a standby that was promoted
# receives nothing any more. Without one a grant waits for nothing: a crash of the server can lose
# grants and acknowledgements, and then revocations wait longer. Measured on loopback, the fastest
# tenth of 3,000 polls: 55 us with no added column, 59 us with these three; with a synchronous
# standby 80 us without waiting for it and 170 us with it.
_STANDBY_NAMES: Final = func.current_setting("synchronous_standby_names")
_OTHER_SERVER: Final = "another server answered than the one that grants leases"
_OTHER_DATABASE: Final = "KEYLATCH_STORE_DIRECT leads to another store than KEYLATCH_STORE"
_OTHER_DATABASE_HINT: Final = "both need the same server, database and search_path"
_LEASED: Final[tuple[ColumnElement[Any], ...]] = (
    *_CHECKED,
    select(
        func.set_config(
            "synchronous_commit",
            case((_STANDBY_NAMES == "", "off"), else_="remote_write"),
            True,
        )
    ).scalar_subquery(),
)


class PostgreSQL(Database):
    """A server; see `keylatch.storage.database.Database`.

    Args:
        url: `postgresql://…`, in any form that `keylatch.storage.conninfo` reads; may lead to a
            pooler.
        direct_url: leads to the same server without a pooler in transaction mode, for leases and
            notifications; empty: `url` does.
        read_url: leads to a standby that may answer look-ups; empty: there is none.
        durable: `replicated`: refuse changes while the server has no synchronous standby.
    """

    is_shared = True

    def __init__(
        self,
        url: str,
        direct_url: str = "",
        read_url: str = "",
        durable: Durability = "local",
    ) -> None:
        self._parameters = connection_parameters(url)
        self._direct_parameters = connection_parameters(direct_url) if direct_url else None
        self._read_parameters = None
        if read_url:
            self._read_parameters = connection_parameters(read_url, needs_primary=False)
        self.has_standby = bool(read_url)
        self._needs_replication = durable == "replicated"
        self._inherited_from_parent: list[object] = []
        self._durability: Durability = "local"
        self._open()

    def _open(self) -> None:
        self._connector = Connector(
            self._parameters,
            "KEYLATCH_STORE",
            needs_session=self._direct_parameters is None,
            needs_replication=self._needs_replication,
        )
        self._direct = self._connector
        if self._direct_parameters is not None:
            self._direct = Connector(
                self._direct_parameters, "KEYLATCH_STORE_DIRECT", needs_session=True
            )
        self._lookup_pool = ConnectionPool(
            self._connector.connect, max_size=2, min_size=1, stale_seconds=_STALE_SECONDS
        )
        self._lease_pool = ConnectionPool(self._direct.connect, max_size=2)
        self._work_pool = WorkPool(self._connector.connect, self._connector.hint, _WORK_SECONDS)
        self._lease_work_pool = WorkPool(self._direct.connect, self._direct.hint, _WORK_SECONDS)
        self._standby_pool: ConnectionPool | None = None
        if self._read_parameters is not None:
            standby = Connector(self._read_parameters, "KEYLATCH_STORE_READ", may_be_standby=True)
            self._standby_pool = ConnectionPool(standby.connect, max_size=2)
        self._standby_retry_at = 0.0
        self._blockers = Blockers(self._lease_pool.fetch)
        self.lease_server = ""
        self._listening: set[PsycopgConnection] = set()

    async def fetch(
        self,
        query: Query,
        *,
        seconds: float | None = None,
        is_grant: bool = False,
        **parameters: Any,
    ) -> Rows:
        pool, columns, read = self._lookup_pool, _CHECKED, self._read_looked_up
        hint = self._connector.hint
        if seconds is not None:
            pool, columns, hint = self._lease_pool, _LEASED, self._direct.hint
            read = partial(self._read_checked, columns=len(_LEASED), is_grant=is_grant)
        text, values = _bind(query, columns, parameters)
        limit = seconds or _LOOKUP_SECONDS
        try:
            with translate_errors(psycopg.Error, hint()):
                return await pool.fetch(PRIMARY_HINT + text, values, limit, read)
        except AnsweredByOther as error:
            raise OtherServer(error.reason, "is there more than one primary?") from None

    async def fetch_from_standby(self, query: Query, **parameters: Any) -> Rows | None:
        if self._standby_pool is None or time.monotonic() < self._standby_retry_at:
            return None
        text, values = _bind(query, (), parameters)
        try:
            return await self._standby_pool.fetch(text, values, _STANDBY_SECONDS) or None
        except (psycopg.Error, TimeoutError, OSError, StoreUnavailable):
            self._standby_retry_at = time.monotonic() + _STANDBY_PAUSE_SECONDS
            return None

    def _read_looked_up(self, rows: Rows) -> Rows:
        return self._read_checked(rows, columns=len(_CHECKED), is_grant=False)

    def _read_checked(self, rows: Rows, *, columns: int, is_grant: bool) -> Rows:
        """The rows without the last columns, which say who answered.

        Raises:
            ConnectionLost: not the primary, or another server than the one that grants the leases:
                answers of two servers contradict each other while one of them is the old primary.
        """
        # Every query returns a row at least; without one, nothing tells which server has answered.
        if not rows:
            raise ConnectionLost("the tables of the store are empty")
        is_standby, server, *_ = rows[0][-columns:]
        if is_standby is not False:
            raise ConnectionLost(STANDBY)
        if is_grant and server != self.lease_server:
            if self.lease_server:
                self._drop_connections()
            self.lease_server = server
        if self.lease_server and server != self.lease_server:
            raise AnsweredByOther(_OTHER_SERVER)
        return [row[:-columns] for row in rows]

    async def _will_grant_leases(self, server: str) -> bool:
        """Whether the members will poll this server, so that they learn of a change that is made
        there, and what it answers is the state that they know. After a restart or a failover it is
        not the one that granted the last lease."""
        if self.lease_server in ("", server):
            return True
        self._lease_pool.close_idle()  # the next poll goes where the URL leads now
        with contextlib.suppress(psycopg.Error, TimeoutError, OSError, StoreUnavailable):
            rows = await self._lease_pool.fetch(_SERVER, (), _LOOKUP_SECONDS)
            return rows == [(False, server)]
        return False

    def _drop_connections(self) -> None:
        """The lease is granted by another server than before: no connection stays that leads to
        the old one, which may be alive and accept changes."""
        self._lookup_pool.drop_connections()
        self._lease_pool.close_idle()
        for pool in (self._work_pool, self._lease_work_pool):
            pool.drop_connections()
        for connection in self._listening:
            shut_down_socket(connection)

    async def read(self, work: Work[T], *, seconds: float | None = None) -> T:
        async def run(connection: AsyncConnection, driver_connection: PsycopgConnection) -> T:
            cursor = await driver_connection.execute(_SERVER)
            [[is_standby, server]] = await cursor.fetchall()
            if is_standby:
                raise ConnectionLost(STANDBY)
            if not await self._will_grant_leases(server):
                raise ConnectionLost(_OTHER_SERVER)
            return await connection.run_sync(work)

        return await self._work_pool.run(seconds or _WORK_SECONDS, run)

    async def write(
        self,
        work: Work[T],
        *,
        durable: bool = True,
        seconds: float | None = None,
        is_urgent: bool = False,
    ) -> T:
        limit = seconds or _WORK_SECONDS
        connector = self._direct if is_urgent else self._connector

        async def run(connection: AsyncConnection, driver_connection: PsycopgConnection) -> T:
            server = connector.server
            assert server is not None, "known since the first connection"  # noqa: S101
            async with transaction(driver_connection, server, limit, durable=durable) as begun:
                if not is_urgent and not await self._will_grant_leases(begun.server):
                    raise ConnectionLost(_OTHER_SERVER)
                if durable and self._needs_replication and not begun.is_replicated:
                    raise StoreUnavailable(NOT_REPLICATED, NOT_REPLICATED_HINT)
                with self._blockers.terminated_for(begun.pid):
                    result = await connection.run_sync(work)
            if durable:
                self._durability = "replicated" if begun.is_replicated else "local"
            return result

        # At the start a connection is there, and nothing uses it.
        is_free = connector is self._connector and not self._work_pool.under_way
        if not is_urgent or is_free:
            return await self._work_pool.run(limit, run)
        with translate_errors(psycopg.Error, self._direct.hint()):
            async with asyncio.timeout(limit), self._lease_pool.slots:
                return await self._lease_work_pool.run(limit, run)

    def durability(self) -> Durability:
        return self._durability

    def pools(self) -> Mapping[str, int]:
        management = self._work_pool.under_way + self._lease_work_pool.under_way
        return {"checks": self._lookup_pool.under_way, "management": management}

    async def identity(self) -> str:
        self.lease_server = ""  # an opened store has no lease: an earlier one is over
        # With the connection of look-ups, which is open then: the first cold check must not wait
        # until it is, which takes seconds from another continent.
        identity = await self._identity_of(self._lookup_pool, self._connector)
        if self._direct is not self._connector:
            leased = await self._identity_of(self._lease_pool, self._direct)
            # Two roles may see different parts of it.
            if not all(map(_is_same, identity.split("/"), leased.split("/"))):
                raise StoreUnavailable(_OTHER_DATABASE, _OTHER_DATABASE_HINT)
        return identity

    async def _identity_of(self, pool: ConnectionPool, connector: Connector) -> str:
        """The cluster, the database, and the table: each schema may have a store."""
        with translate_errors(psycopg.Error, connector.hint()):
            with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
                return await self._fetch_identity(pool, _CLUSTER)
            return await self._fetch_identity(pool, "''")

    async def _fetch_identity(self, pool: ConnectionPool, cluster: str) -> str:
        text = PRIMARY_HINT + _IDENTITY.format(cluster=cluster, started=SERVER_STARTED)
        [names] = await pool.fetch(text, (), _WORK_SECONDS, self._read_looked_up)
        return "/".join(names)

    async def listen(self, channel: str, on_notification: Callable[[str], None]) -> None:
        try:
            connection = await self._direct.connect()
            self._listening.add(connection)
            try:
                async with connection:
                    await connection.execute(f'LISTEN "{channel}"')
                    on_notification("")
                    async for notification in connection.notifies():
                        on_notification(notification.payload)
            finally:
                self._listening.discard(connection)
        except psycopg.Error as error:
            raise StoreUnavailable(
                f"LISTEN on the store failed: {type(error).__name__}", self._direct.hint()
            ) from None

    async def close(self) -> None:
        for work_pool in (self._work_pool, self._lease_work_pool):
            await work_pool.close()
        self._blockers.close()
        for pool in (self._lookup_pool, self._lease_pool, self._standby_pool):
            if pool is not None:
                pool.close()

    def after_fork_in_child(self) -> None:
        # Kept, never closed: to close them would end the parent's sessions.
        self._inherited_from_parent += [self._work_pool, self._lease_work_pool, self._blockers]
        self._inherited_from_parent += [self._lookup_pool, self._lease_pool, self._standby_pool]
        self._inherited_from_parent += [self._listening]
        self._open()


def _is_same(one: str, other: str) -> bool:
    return not one or not other or one == other


def _bind(
    query: Query, columns: tuple[ColumnElement[Any], ...], parameters: Mapping[str, Any]
) -> tuple[str, list[bytes | None]]:
    text, fixed, order = query.compile_for(_DIALECT, *columns)
    named = {**fixed, **parameters}
    return text, [str(named[name]).encode() for name in order]
