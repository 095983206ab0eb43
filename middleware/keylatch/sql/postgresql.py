"""The store as a server for many hosts, over psycopg's asynchronous sockets.

Questions go over `line`, reads and transactions through SQLAlchemy. A server may fall silent
without closing its connections. psycopg, when cancelled, first asks the server to cancel and waits
for its answer; so work runs in a task of its own, and whoever has waited long enough leaves it
behind and cuts its connection.
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
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from keylatch.errors import StoreUnavailable
from keylatch.sql.database import Contended, Question, Rows, Work, errors_translated
from keylatch.sql.line import Lines

T = TypeVar("T")
Line = psycopg.AsyncConnection[Any]
Use = Callable[[AsyncConnection, Line], Awaitable[T]]

_DIALECT: Final = postgresql_dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]
_SESSION: Final[dict[str, Any]] = {
    "connect_timeout": 2,
    "tcp_user_timeout": 5_000,
    "application_name": "keylatch",
}
_READ_SECONDS: Final = 2.0
_STALE_SECONDS: Final = 0.5
_WRITE_SECONDS: Final = 5.0
_IDLE_MILLISECONDS: Final = 2_000
_PATIENCE_SECONDS: Final = 1.0
_MAX_LOST: Final = 2
_MAX_CONTENDED: Final = 8
# Of other roles' connections it sees nothing, and so ends none.
_END_WHO_BLOCKS: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = ANY (pg_blocking_pids(%s)) AND application_name = 'keylatch'
AND wait_event = 'ClientRead' AND state_change < now() - interval '2 seconds'
"""
_OIDS: Final = """
SELECT oid::text, 'keylatch_meta'::regclass::oid::text FROM pg_database
WHERE datname = current_database()
"""
_CLUSTER: Final = "SELECT system_identifier::text FROM pg_control_system()"

log = logging.getLogger("keylatch")


class _LineLost(Exception):
    """A connection that had been open turned out to be dead, or was cut."""


class PostgreSQL:
    """A server; see `keylatch.sql.database.Database`.

    Args:
        url: `postgresql://…`
    """

    is_shared = True
    warnings: tuple[str, ...] = ()

    def __init__(self, url: URL) -> None:
        self._url = url.set(drivername="postgresql+psycopg")
        self._hint = f"is PostgreSQL up at {url.host or 'its socket'}, and does the user exist?"
        self._inherited: list[object] = []
        self._open()

    def _open(self) -> None:
        self._engine = self._connecting(places=5, more=10)
        # Leases have places of their own. Else, after a silence, they would queue behind look-ups
        # that wait out their two seconds, and every check would be 503 for as long.
        self._urgent = self._connecting(places=1, more=2)
        self._looking_up = Lines(self._connect, places=8, stale_seconds=_STALE_SECONDS)
        self._leasing = Lines(self._connect_for_leases, places=4)
        self._under_way: dict[asyncio.Task[Any], list[Line]] = {}

    def _connecting(self, places: int, more: int) -> AsyncEngine:
        engine = create_async_engine(
            self._url,
            connect_args=_SESSION,
            hide_parameters=True,
            pool_size=places,
            max_overflow=more,
            pool_timeout=_READ_SECONDS,
            # Questions and reads need no BEGIN and no ROLLBACK, and transactions bring their own.
            isolation_level="AUTOCOMMIT",
            skip_autocommit_rollback=True,
            pool_reset_on_return=None,
        )
        # First of all listeners: SQLAlchemy's own asks what server this is, and may wait for ever.
        event.listen(engine.sync_engine, "connect", self._connected, insert=True)
        return engine

    def _connected(self, raw: Any, record: object) -> None:
        task = asyncio.current_task()
        if task is not None and task in self._under_way:
            self._under_way[task].append(raw.driver_connection)
        _configure(raw)

    async def _connect(self) -> Line:
        url = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
        return await psycopg.AsyncConnection.connect(url, autocommit=True, **_SESSION)

    async def _connect_for_leases(self) -> Line:
        line = await self._connect()
        # Nobody waits for a disk to be granted a lease. What a crash takes back are grants and
        # acknowledgements; then revokes wait longer, or for somebody who knows already.
        try:
            await line.execute("SET synchronous_commit = off")
        except BaseException:  # cancelled as well: no caller has it yet
            line.pgconn.finish()
            raise
        return line

    async def ask(
        self, question: Question, *, seconds: float | None = None, **parameters: Any
    ) -> Rows:
        text, fixed, order = question.spelled(_DIALECT)
        named = {**fixed, **parameters}
        values = [str(named[name]).encode() for name in order]
        lines = self._looking_up if seconds is None else self._leasing
        with errors_translated(psycopg.Error, self._hint):
            return await lines.ask(text, values, seconds or _READ_SECONDS)

    async def read(self, work: Work[T], *, seconds: float | None = None) -> T:
        return await self._repeated(
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
        async def transact(connection: AsyncConnection, line: Line) -> T:
            ending = asyncio.create_task(self._end_who_blocks(line.info.backend_pid))
            try:
                async with line.transaction():
                    return await connection.run_sync(work)
            finally:
                ending.cancel()

        engine = self._urgent if is_urgent else self._engine
        return await self._repeated(engine, seconds or _WRITE_SECONDS, transact)

    async def _end_who_blocks(self, pid: int) -> None:
        """End connections that keep a transaction waiting for a lock, and have themselves waited
        two seconds for their own process: it was stopped, or cut off, amid what it said.

        The time limit of `_configure` does not see them if more was to follow at once: psycopg
        sends many rows without waiting for answers, and to the server that is no idle transaction.
        """
        while True:
            await asyncio.sleep(_PATIENCE_SECONDS)
            with contextlib.suppress(psycopg.Error):
                async with await self._connect() as line:
                    ended = await line.execute(_END_WHO_BLOCKS, (pid,))
                    if ended.rowcount:
                        log.warning("a process fell silent amid a change: it lost its locks")

    async def _repeated(self, engine: AsyncEngine, seconds: float, use: Use[T]) -> T:
        """Once more where the connection had died before: the server was restarted, say. And some
        times where another transaction was faster.

        All work may be repeated: it says what shall be so, and not what to add to what is; or it
        knows itself again, as a tally does.
        """
        lost = contended = 0
        with errors_translated(psycopg.Error, self._hint):
            while lost < _MAX_LOST:
                try:
                    return await self._once(engine, seconds, use)
                except _LineLost:
                    lost += 1
                except (Contended, DBAPIError) as error:
                    contended += 1
                    if contended == _MAX_CONTENDED or not _is_contended(error):
                        raise
        raise StoreUnavailable("the store closed the connection", self._hint)

    async def _once(self, engine: AsyncEngine, seconds: float, use: Use[T]) -> T:
        used: list[Line] = []
        task = asyncio.create_task(self._run(engine, use, used), name="keylatch-postgresql")
        self._under_way[task] = used
        task.add_done_callback(self._done)
        # A timer and not the waiter cuts the connection: the waiter may be cancelled.
        timer = asyncio.get_running_loop().call_later(seconds, self._cut, task)
        task.add_done_callback(lambda _: timer.cancel())
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done or task.cancelled():
            raise TimeoutError
        return task.result()

    async def _run(self, engine: AsyncEngine, use: Use[T], used: list[Line]) -> T:
        pool = engine.pool
        async with engine.connect() as connection:
            pooled = await connection.get_raw_connection()
            line = cast(Line, pooled.driver_connection)
            if line not in used:  # it was there before
                used.append(line)
            try:
                return await use(connection, line)
            except (DBAPIError, psycopg.Error):
                if not line.closed:
                    raise
            finally:
                if line.closed or engine.pool is not pool:
                    await connection.invalidate()  # or its pool would keep it
        # What killed this connection may have killed its idle siblings as well.
        if engine.pool is pool:
            await engine.dispose()
        raise _LineLost

    def _cut(self, task: asyncio.Task[Any]) -> None:
        lines = self._under_way.get(task, ())
        if not lines:  # still connecting, or waiting for a place: each keeps one for 2 s otherwise
            task.cancel()
        for line in lines:
            # The socket and not the connection: libpq is in the middle of using that, and takes
            # the end of the stream for what it is.
            with (
                contextlib.suppress(psycopg.Error, OSError),
                socket.socket(fileno=os.dup(line.fileno())) as plug,
            ):
                plug.shutdown(socket.SHUT_RDWR)

    def _done(self, task: asyncio.Task[Any]) -> None:
        del self._under_way[task]
        if not task.cancelled():
            task.exception()  # its caller has it, or has left

    def pools(self) -> Mapping[str, int]:
        return {"checks": self._looking_up.under_way, "management": len(self._under_way)}

    def ask_now(self, question: Question, **parameters: Any) -> Rows | None:
        return None

    def mark_now(self) -> bytes | None:
        return None

    async def identity(self) -> str:
        return await self.read(_identity)

    async def listen(self, channel: str, heard: Callable[[str], None]) -> None:
        try:
            line = await self._connect()
            async with line:
                await line.execute(f'LISTEN "{channel}"')
                heard("")
                async for notified in line.notifies():
                    heard(notified.payload)
        except psycopg.Error as error:
            raise StoreUnavailable(
                f"the store's bell is silent: {type(error).__name__}", self._hint
            ) from None

    async def tidy(self) -> None:
        return None

    async def close(self) -> None:
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=_READ_SECONDS)
        for task in tuple(self._under_way):
            self._cut(task)
        for lines in (self._looking_up, self._leasing):
            lines.close()
        for engine in (self._engine, self._urgent):
            await engine.dispose()

    def before_fork(self) -> None:
        return None

    def after_fork(self) -> None:
        return None

    def forget(self) -> None:
        # Kept, never closed: closing would say goodbye on the parent's connections.
        self._inherited += [self._engine, self._urgent, self._under_way]
        self._inherited += [self._looking_up, self._leasing]
        self._open()


def _identity(connection: Connection) -> str:
    """The cluster, the database in it, and the tables in that: schemas may hold one store each."""
    database, tables = connection.exec_driver_sql(_OIDS).one()
    cluster = ""
    # Where this role may not ask for the cluster, the oids alone have to do.
    with contextlib.suppress(DBAPIError), connection.begin_nested():
        cluster = connection.exec_driver_sql(_CLUSTER).scalar_one()
    return f"{cluster}/{database}/{tables}"


def _is_contended(error: Exception) -> bool:
    deadlock = psycopg.errors.DeadlockDetected
    return isinstance(error, Contended) or isinstance(getattr(error, "orig", None), deadlock)


def _configure(raw: Any) -> None:
    # A process that is stopped or cut off in the middle of a transaction must not keep its locks:
    # the one on the counter row would stop every change.
    with contextlib.closing(raw.cursor()) as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_MILLISECONDS}")
    raw.commit()
