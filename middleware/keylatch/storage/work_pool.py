"""Runs units of work on SQLAlchemy connections to PostgreSQL, each within a time limit.

A server may stop answering without closing its connections. psycopg, when cancelled, first asks the
server to cancel and waits for its answer; so work runs in a task of its own, and at the time limit
the caller leaves that task and the sockets of its connections are shut down.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, cast

import psycopg
from psycopg.errors import ReadOnlySqlTransaction
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from keylatch.errors import StoreUnavailable
from keylatch.storage.database import Contended, translate_errors
from keylatch.storage.libpq_connection import CONFLICTS, ConnectionLost
from keylatch.storage.postgresql_dialect import DRIVER_NAME

T = TypeVar("T")
PsycopgConnection = psycopg.AsyncConnection[Any]
Operation = Callable[[AsyncConnection, PsycopgConnection], Awaitable[T]]
Connect = Callable[[Callable[[PsycopgConnection], None]], Awaitable[PsycopgConnection]]

_MAX_CONNECTION_LOSSES: Final = 3
_MAX_CONFLICTS: Final = 8
_CLOSE_SECONDS: Final = 2.0
# Longer than a process that is in use waits before it stores uses again, and shorter than one that
# is not in use waits for its next maintenance of the store.
_IDLE_SECONDS: Final = 8.0


class WorkPool:
    """Up to two connections, of which one is kept while it is used often.

    Args:
        connect: opens a connection, which it passes to its argument before the first query.
        hint: what the operator should check when the server does not answer.
        wait_seconds: how long work waits for a connection.
        idle_seconds: how long a connection is kept that nothing uses.
    """

    def __init__(
        self,
        connect: Connect,
        hint: Callable[[], str],
        wait_seconds: float,
        idle_seconds: float = _IDLE_SECONDS,
    ) -> None:
        self._connect = connect
        self._hint = hint
        self._idle_seconds = idle_seconds
        self._tasks: dict[asyncio.Task[Any], list[PsycopgConnection]] = {}
        self._idle_timer: asyncio.TimerHandle | None = None
        self._disposals: set[asyncio.Task[None]] = set()
        self._engine: AsyncEngine = create_async_engine(
            URL.create(DRIVER_NAME),
            async_creator=self._create,
            hide_parameters=True,
            use_native_hstore=False,
            pool_size=1,
            max_overflow=1,
            pool_timeout=wait_seconds,
            # Reads need no BEGIN and no ROLLBACK, and transactions are begun explicitly.
            isolation_level="AUTOCOMMIT",
            skip_autocommit_rollback=True,
            pool_reset_on_return=None,
        )

    async def _create(self) -> PsycopgConnection:
        connections = self._tasks.get(cast("asyncio.Task[Any]", asyncio.current_task()), [])
        return await self._connect(connections.append)

    @property
    def under_way(self) -> int:
        """Units of work that have not ended, nor have their callers left them."""
        return len(self._tasks)

    async def run(self, seconds: float, operation: Operation[T]) -> T:
        """Run an operation, up to twice more if its connection was lost (the server was restarted,
        or is not the primary any more), and up to eight times if it conflicts with another
        transaction.

        All work may be repeated: it sets values and adds nothing to them, or it recognises its
        earlier attempt, as a usage batch does.
        """
        losses = conflicts = 0
        with translate_errors(psycopg.Error, self._hint()):
            while True:
                try:
                    return await self._run_once(seconds, operation)
                except ConnectionLost as lost:
                    losses += 1
                    if losses == _MAX_CONNECTION_LOSSES:
                        raise StoreUnavailable(
                            f"the store failed: {lost.reason}", self._hint()
                        ) from None
                except (Contended, DBAPIError) as error:
                    conflicts += 1
                    if conflicts == _MAX_CONFLICTS or not _is_contended(error):
                        raise

    async def _run_once(self, seconds: float, operation: Operation[T]) -> T:
        connections: list[PsycopgConnection] = []
        task = asyncio.create_task(self._run(operation, connections), name="keylatch-postgresql")
        self._tasks[task] = connections
        task.add_done_callback(self._on_done)
        # A timer, and not the caller, shuts the socket down: the caller may be cancelled.
        timer = asyncio.get_running_loop().call_later(seconds, self._shut_down, task)
        task.add_done_callback(lambda _: timer.cancel())
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done or task.cancelled():
            raise TimeoutError
        return task.result()

    async def _run(self, operation: Operation[T], connections: list[PsycopgConnection]) -> T:
        pool = self._engine.pool
        async with self._engine.connect() as connection:
            pooled = await connection.get_raw_connection()
            driver_connection = cast(PsycopgConnection, pooled.driver_connection)
            if driver_connection not in connections:  # it was open before
                connections.append(driver_connection)
            lost: ConnectionLost | None = None
            try:
                return await operation(connection, driver_connection)
            except ConnectionLost as error:
                lost = error
            except (DBAPIError, psycopg.Error) as error:
                lost = _loss(error, driver_connection)
                if lost is None:
                    raise
            finally:
                if lost or driver_connection.closed or self._engine.pool is not pool:
                    await connection.invalidate()  # else its pool would keep it
        # The cause may have closed the idle connections as well.
        if self._engine.pool is pool:
            await self._engine.dispose()
        raise lost

    def _shut_down(self, task: asyncio.Task[Any]) -> None:
        connections = self._tasks.get(task, ())
        if not connections:  # connecting or queued: each keeps a slot for 2 s otherwise
            task.cancel()
        for connection in connections:
            shut_down_socket(connection)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        del self._tasks[task]
        if not task.cancelled():
            task.exception()  # its caller gets it, or has left
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._idle_timer = task.get_loop().call_later(self._idle_seconds, self._close_idle)

    def _close_idle(self) -> None:
        self._idle_timer = None
        if not self._tasks:
            disposal = asyncio.create_task(self._engine.dispose(), name="keylatch-idle")
            self._disposals.add(disposal)
            disposal.add_done_callback(self._disposals.discard)

    def drop_connections(self) -> None:
        """Close all connections; work that runs is repeated on a new one."""
        for task in tuple(self._tasks):
            for connection in self._tasks[task]:
                shut_down_socket(connection)
        if not self._tasks:
            self._close_idle()

    async def close(self) -> None:
        """Close all connections, once the work that runs has ended or two seconds have passed."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)
        for task in tuple(self._tasks):
            self._shut_down(task)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._disposals:
            await asyncio.wait(self._disposals)
        await self._engine.dispose()


def shut_down_socket(connection: PsycopgConnection) -> None:
    """End a connection that a task uses."""
    # The socket and not the connection: libpq is in the middle of using that, and takes the end of
    # the stream for what it is.
    with (
        contextlib.suppress(psycopg.Error, OSError),
        socket.socket(fileno=os.dup(connection.fileno())) as duplicate,
    ):
        duplicate.shutdown(socket.SHUT_RDWR)


def _loss(error: Exception, connection: PsycopgConnection) -> ConnectionLost | None:
    """What an error means for its connection; None: it is still good."""
    if connection.closed:
        return ConnectionLost()
    cause = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(cause, ReadOnlySqlTransaction):  # a standby, or the URL's host has become one
        return ConnectionLost(str(cause).splitlines()[0])
    return None


def _is_contended(error: Exception) -> bool:
    return isinstance(error, Contended) or isinstance(getattr(error, "orig", None), CONFLICTS)
