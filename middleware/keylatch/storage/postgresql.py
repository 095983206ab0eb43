"""The store as a server for several hosts, over psycopg's asynchronous sockets.

Queries go through `libpq_pool`, reads and transactions through SQLAlchemy. A server may stop
answering without closing its connections. psycopg, when cancelled, first asks the server to cancel
and waits for its answer; so work runs in a task of its own, and at the time limit the caller leaves
that task and the sockets of its connections are shut down.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar, cast

import psycopg
from sqlalchemy import Connection, event
from sqlalchemy.dialects.postgresql import dialect as postgresql_dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from keylatch.errors import StoreUnavailable
from keylatch.storage.conninfo import connection_parameters
from keylatch.storage.database import Contended, Database, Query, Rows, Work, translate_errors
from keylatch.storage.hosts import Hosts
from keylatch.storage.libpq_pool import ConnectionPool

T = TypeVar("T")
PsycopgConnection = psycopg.AsyncConnection[Any]
Operation = Callable[[AsyncConnection, PsycopgConnection], Awaitable[T]]

_DIALECT: Final = postgresql_dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]
_ENGINE_URL: Final = "postgresql+psycopg://"  # the dialect only: `Hosts` connects
_READ_SECONDS: Final = 2.0
_STALE_SECONDS: Final = 0.5
_WRITE_SECONDS: Final = 5.0
_IDLE_MILLISECONDS: Final = 2_000
_BLOCKER_POLL_SECONDS: Final = 1.0
_MAX_CONNECTION_LOSSES: Final = 2
_MAX_CONFLICTS: Final = 8
# It sees no sessions of other roles, and so terminates none.
_TERMINATE_BLOCKERS: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = ANY (pg_blocking_pids(%s))
AND application_name IN ('keylatch', current_setting('application_name'))
AND wait_event = 'ClientRead' AND state_change < now() - interval '2 seconds'
"""
_OIDS: Final = """
SELECT oid::text, 'keylatch_meta'::regclass::oid::text FROM pg_database
WHERE datname = current_database()
"""
_CLUSTER: Final = "SELECT system_identifier::text FROM pg_control_system()"

log = logging.getLogger("keylatch")


class _ConnectionLost(Exception):
    """An open connection turned out to be closed, or was shut down."""


class PostgreSQL(Database):
    """A server; see `keylatch.storage.database.Database`.

    Args:
        url: `postgresql://…`, in any form that `keylatch.storage.conninfo` reads.
    """

    is_shared = True

    def __init__(self, url: str) -> None:
        parameters = connection_parameters(url)
        self._connect = Hosts(parameters).connect
        place = parameters.get("host") or "its default address"
        self._hint = f"is PostgreSQL up at {place}, and does the user exist?"
        self._inherited_from_parent: list[object] = []
        self._open()

    def _open(self) -> None:
        self._engine = self._create_engine(pool_size=5, max_overflow=10)
        # Leases have connections of their own. Else, while the server does not answer, they would
        # queue behind look-ups that wait for their time limit of two seconds, and every check would
        # get 503 meanwhile.
        self._lease_engine = self._create_engine(pool_size=1, max_overflow=2)
        self._lookup_pool = ConnectionPool(self._connect, max_size=8, stale_seconds=_STALE_SECONDS)
        self._lease_pool = ConnectionPool(self._connect_for_leases, max_size=4)
        self._tasks: dict[asyncio.Task[Any], list[PsycopgConnection]] = {}

    def _create_engine(self, pool_size: int, max_overflow: int) -> AsyncEngine:
        engine = create_async_engine(
            _ENGINE_URL,
            async_creator=self._connect,
            hide_parameters=True,
            pool_size=pool_size,
            max_overflow=max_overflow,
            pool_timeout=_READ_SECONDS,
            # Reads need no BEGIN and no ROLLBACK, and `write` begins its own transactions.
            isolation_level="AUTOCOMMIT",
            skip_autocommit_rollback=True,
            pool_reset_on_return=None,
        )
        # Before SQLAlchemy's own listener, which queries the version without a time limit.
        event.listen(engine.sync_engine, "connect", self._on_connect, insert=True)
        return engine

    def _on_connect(self, raw: Any, record: object) -> None:
        task = asyncio.current_task()
        if task is not None and task in self._tasks:
            self._tasks[task].append(raw.driver_connection)
        _configure(raw)

    async def _connect_for_leases(self) -> PsycopgConnection:
        connection = await self._connect()
        # A grant does not wait for a disk. A crash of the server can lose grants and
        # acknowledgements; then revocations wait longer, or for a member that has acknowledged.
        try:
            await connection.execute("SET synchronous_commit = off")
        except BaseException:  # a cancellation as well: no caller has the connection yet
            connection.pgconn.finish()
            raise
        return connection

    async def fetch(self, query: Query, *, seconds: float | None = None, **parameters: Any) -> Rows:
        text, fixed, order = query.compile_for(_DIALECT)
        named = {**fixed, **parameters}
        values = [str(named[name]).encode() for name in order]
        pool = self._lookup_pool if seconds is None else self._lease_pool
        with translate_errors(psycopg.Error, self._hint):
            return await pool.fetch(text, values, seconds or _READ_SECONDS)

    async def read(self, work: Work[T], *, seconds: float | None = None) -> T:
        return await self._run_with_retries(
            self._engine, seconds or _READ_SECONDS, lambda connection, _: connection.run_sync(work)
        )

    async def write(
        self,
        work: Work[T],
        *,
        durable: bool = True,
        seconds: float | None = None,
        is_urgent: bool = False,
    ) -> T:
        async def transact(connection: AsyncConnection, driver_connection: PsycopgConnection) -> T:
            watchdog = asyncio.create_task(
                self._terminate_blockers(driver_connection.info.backend_pid)
            )
            try:
                async with driver_connection.transaction():
                    return await connection.run_sync(work)
            finally:
                watchdog.cancel()

        engine = self._lease_engine if is_urgent else self._engine
        return await self._run_with_retries(engine, seconds or _WRITE_SECONDS, transact)

    async def _terminate_blockers(self, pid: int) -> None:
        """Every second, terminate the keylatch sessions that block a transaction and have been in
        `ClientRead` for more than two seconds: their process was stopped or cut off.

        `idle_in_transaction_session_timeout` does not end them in the middle of a pipeline: psycopg
        sends many rows without waiting for answers, and to the server that is no idle transaction.
        """
        while True:
            await asyncio.sleep(_BLOCKER_POLL_SECONDS)
            with contextlib.suppress(psycopg.Error):
                async with await self._connect() as connection:
                    terminated = await connection.execute(_TERMINATE_BLOCKERS, (pid,))
                    if terminated.rowcount:
                        log.warning(
                            "terminated %d stalled keylatch sessions that blocked a change",
                            terminated.rowcount,
                        )

    async def _run_with_retries(
        self, engine: AsyncEngine, seconds: float, operation: Operation[T]
    ) -> T:
        """Run an operation, once more if its connection was lost (the server was restarted), and up
        to eight times if it conflicts with another transaction.

        All work may be repeated: it sets values and adds nothing to them, or it recognises its
        earlier attempt, as a usage batch does.
        """
        losses = conflicts = 0
        with translate_errors(psycopg.Error, self._hint):
            while losses < _MAX_CONNECTION_LOSSES:
                try:
                    return await self._run_once(engine, seconds, operation)
                except _ConnectionLost:
                    losses += 1
                except (Contended, DBAPIError) as error:
                    conflicts += 1
                    if conflicts == _MAX_CONFLICTS or not _is_contended(error):
                        raise
        raise StoreUnavailable("the store closed the connection", self._hint)

    async def _run_once(self, engine: AsyncEngine, seconds: float, operation: Operation[T]) -> T:
        connections: list[PsycopgConnection] = []
        task = asyncio.create_task(
            self._run(engine, operation, connections), name="keylatch-postgresql"
        )
        self._tasks[task] = connections
        task.add_done_callback(self._on_done)
        # A timer, and not the caller, shuts the socket down: the caller may be cancelled.
        timer = asyncio.get_running_loop().call_later(seconds, self._shut_down_sockets, task)
        task.add_done_callback(lambda _: timer.cancel())
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done or task.cancelled():
            raise TimeoutError
        return task.result()

    async def _run(
        self, engine: AsyncEngine, operation: Operation[T], connections: list[PsycopgConnection]
    ) -> T:
        pool = engine.pool
        async with engine.connect() as connection:
            pooled = await connection.get_raw_connection()
            driver_connection = cast(PsycopgConnection, pooled.driver_connection)
            if driver_connection not in connections:  # it was open before
                connections.append(driver_connection)
            try:
                return await operation(connection, driver_connection)
            except (DBAPIError, psycopg.Error):
                if not driver_connection.closed:
                    raise
            finally:
                if driver_connection.closed or engine.pool is not pool:
                    await connection.invalidate()  # else its pool would keep it
        # The cause may have closed the idle connections as well.
        if engine.pool is pool:
            await engine.dispose()
        raise _ConnectionLost

    def _shut_down_sockets(self, task: asyncio.Task[Any]) -> None:
        connections = self._tasks.get(task, ())
        if not connections:  # connecting or queued: each keeps a slot for 2 s otherwise
            task.cancel()
        for connection in connections:
            # The socket and not the connection: libpq is in the middle of using that, and takes
            # the end of the stream for what it is.
            with (
                contextlib.suppress(psycopg.Error, OSError),
                socket.socket(fileno=os.dup(connection.fileno())) as duplicate,
            ):
                duplicate.shutdown(socket.SHUT_RDWR)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        del self._tasks[task]
        if not task.cancelled():
            task.exception()  # its caller gets it, or has left

    def pools(self) -> Mapping[str, int]:
        return {"checks": self._lookup_pool.under_way, "management": len(self._tasks)}

    async def identity(self) -> str:
        return await self.read(_identity)

    async def listen(self, channel: str, on_notification: Callable[[str], None]) -> None:
        try:
            connection = await self._connect()
            async with connection:
                await connection.execute(f'LISTEN "{channel}"')
                on_notification("")
                async for notification in connection.notifies():
                    on_notification(notification.payload)
        except psycopg.Error as error:
            raise StoreUnavailable(
                f"LISTEN on the store failed: {type(error).__name__}", self._hint
            ) from None

    async def close(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_READ_SECONDS)
        for task in tuple(self._tasks):
            self._shut_down_sockets(task)
        for pool in (self._lookup_pool, self._lease_pool):
            pool.close()
        for engine in (self._engine, self._lease_engine):
            await engine.dispose()

    def after_fork_in_child(self) -> None:
        # Kept, never closed: to close them would end the parent's sessions.
        self._inherited_from_parent += [self._engine, self._lease_engine, self._tasks]
        self._inherited_from_parent += [self._lookup_pool, self._lease_pool]
        self._open()


def _identity(connection: Connection) -> str:
    """The cluster, the database, and the table: each schema may have a store."""
    database, tables = connection.exec_driver_sql(_OIDS).one()
    cluster = ""
    # Without the permission to read the cluster's identifier, the oids have to do.
    with contextlib.suppress(DBAPIError), connection.begin_nested():
        cluster = connection.exec_driver_sql(_CLUSTER).scalar_one()
    return f"{cluster}/{database}/{tables}"


def _is_contended(error: Exception) -> bool:
    deadlock = psycopg.errors.DeadlockDetected
    return isinstance(error, Contended) or isinstance(getattr(error, "orig", None), deadlock)


def _configure(raw: Any) -> None:
    # A process that is stopped or cut off in the middle of a transaction must not keep its locks:
    # the lock on the sequence row would block every change.
    with contextlib.closing(raw.cursor()) as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_MILLISECONDS}")
    raw.commit()
