"""The store as a server for many hosts, over psycopg's asynchronous sockets.

A server may fall silent without closing its connections. psycopg, when cancelled, first asks the
server to cancel and waits for its answer; so work runs in a task of its own, and whoever has waited
long enough leaves it behind and cuts its connection.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, cast

import psycopg
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from keylatch.database import Question, Rows, Work, errors_translated
from keylatch.errors import StoreUnavailable

T = TypeVar("T")
Line = psycopg.AsyncConnection[Any]
Use = Callable[[AsyncConnection, Line], Awaitable[T]]

_READ_SECONDS: Final = 2.0
_WRITE_SECONDS: Final = 5.0
_IDLE_MILLISECONDS: Final = 2_000


class _LineLost(Exception):
    """A connection that had been open turned out to be dead, or was cut."""


class PostgreSQL:
    """A server; see `keylatch.database.Database`.

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
        self._under_way: dict[asyncio.Task[Any], list[Line]] = {}

    def _connecting(self, places: int, more: int) -> AsyncEngine:
        engine = create_async_engine(
            self._url,
            connect_args={
                "connect_timeout": 2,
                "tcp_user_timeout": 5_000,
                "application_name": "keylatch",
            },
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

    async def ask(
        self, question: Question, *, seconds: float | None = None, **parameters: Any
    ) -> Rows:
        text, fixed, _ = question.spelled(self._engine.dialect)
        values = {**fixed, **parameters}

        async def answer(connection: AsyncConnection, line: Line) -> Rows:
            # Around SQLAlchemy, whose share of a statement is several times the driver's.
            cursor = await line.execute(text.encode(), values)
            return await cursor.fetchall()

        engine = self._engine if seconds is None else self._urgent
        return await self._twice(engine, seconds or _READ_SECONDS, answer)

    async def read(self, work: Work[T], *, seconds: float | None = None) -> T:
        engine = self._engine if seconds is None else self._urgent
        return await self._twice(
            engine, seconds or _READ_SECONDS, lambda connection, _: connection.run_sync(work)
        )

    async def write(
        self, work: Work[T], *, durable: bool = True, seconds: float | None = None
    ) -> T:
        async def transact(connection: AsyncConnection, line: Line) -> T:
            async with line.transaction():
                return await connection.run_sync(work)

        engine = self._engine if seconds is None else self._urgent
        return await self._twice(engine, seconds or _WRITE_SECONDS, transact)

    async def _twice(self, engine: AsyncEngine, seconds: float, use: Use[T]) -> T:
        """Once more where the connection had died before: the server was restarted, say.

        All work may be repeated: it says what shall be so, and not what to add to what is.
        """
        with errors_translated(psycopg.Error, self._hint):
            try:
                return await self._once(engine, seconds, use)
            except _LineLost:
                with contextlib.suppress(_LineLost):
                    return await self._once(engine, seconds, use)
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

    def ask_now(self, question: Question, **parameters: Any) -> Rows | None:
        return None

    def mark_now(self) -> bytes | None:
        return None

    async def listen(self, channel: str, heard: Callable[[], None]) -> None:
        url = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
        try:
            line = await psycopg.AsyncConnection.connect(url, autocommit=True, connect_timeout=2)
            async with line:
                await line.execute(f'LISTEN "{channel}"')
                heard()
                async for _ in line.notifies():
                    heard()
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
        for engine in (self._engine, self._urgent):
            await engine.dispose()

    def before_fork(self) -> None:
        return None

    def after_fork(self) -> None:
        return None

    def forget(self) -> None:
        # Kept, never closed: closing would say goodbye on the parent's connections.
        self._inherited += [self._engine, self._urgent, self._under_way]
        self._open()


def _configure(raw: Any) -> None:
    # A process that is stopped or cut off in the middle of a transaction must not keep its locks:
    # the one on the counter row would stop every change.
    with contextlib.closing(raw.cursor()) as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_MILLISECONDS}")
    raw.commit()
