"""A pool of PostgreSQL connections for a few queries, one at a time per connection.

A connection whose server does not answer within the query's time limit is never used again, and the
server is asked to cancel the query: a poll that waits for a standby which is gone would keep a
server process for ever.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import psycopg

from keylatch.storage.database import Rows
from keylatch.storage.libpq_connection import (
    CONFLICTS,
    AnsweredByOther,
    ConnectionLost,
    LibpqConnection,
    PsycopgConnection,
)

IDLE_SECONDS: Final = 30.0
"""How long a connection stays open that nothing uses."""
_MAX_CONFLICTS: Final = 8


class ConnectionPool:
    """Up to `max_size` connections; idle ones are kept for a while, the last used one longest.

    Args:
        connect: opens a connection in autocommit mode.
        max_size: how many queries may run at once; the others wait.
        stale_seconds: the time limit on a connection that was idle, which may have been lost
            without notice; then the query is repeated on a new one. None: the query's own limit.
        idle_seconds: how long idle connections are kept.
        min_size: how many of them are kept longer.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[PsycopgConnection]],
        max_size: int,
        stale_seconds: float | None = None,
        idle_seconds: float = IDLE_SECONDS,
        min_size: int = 0,
    ) -> None:
        self._connect = connect
        self._max_size = max_size
        self._min_size = min_size
        self._slots = asyncio.Semaphore(max_size)
        self._stale_seconds = stale_seconds
        self._idle_seconds = idle_seconds
        self._idle: list[tuple[LibpqConnection, float]] = []
        self._idle_timer: asyncio.TimerHandle | None = None
        self._busy: set[LibpqConnection] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._opening: set[asyncio.Future[PsycopgConnection]] = set()

    @property
    def under_way(self) -> int:
        """Queries that the server has not answered yet."""
        return len(self._busy)

    @property
    def slots(self) -> asyncio.Semaphore:
        """What a query holds while it runs, and other work that counts as one."""
        return self._slots

    async def fetch(
        self,
        text: str,
        values: Sequence[bytes | None],
        seconds: float,
        read: Callable[[Rows], Rows] = lambda rows: rows,
    ) -> Rows:
        """The rows of a statement that may be run twice.

        Args:
            text: of the statement, with parameters `$1`, `$2`, …
            values: of the parameters, in PostgreSQL's text format.
            seconds: the time limit, including the wait for a connection.
            read: what the rows say; raises `ConnectionLost` if this connection must not be used.

        Raises:
            TimeoutError, psycopg.Error: no answer, or an error.
            AnsweredByOther: by a new connection as well.
        """
        async with asyncio.timeout(seconds), self._slots:
            connection = self._take_idle()
            if connection is not None:
                try:
                    async with asyncio.timeout(self._stale_seconds):
                        return await self._fetch_on(connection, text, values, read)
                except (ConnectionLost, TimeoutError):
                    self.close_idle()  # the cause may have closed the others as well
            connection = LibpqConnection(await self._open())
            try:
                return await self._fetch_on(connection, text, values, read)
            except AnsweredByOther:
                raise
            except ConnectionLost as lost:
                raise psycopg.OperationalError(lost.reason) from None

    async def _open(self) -> PsycopgConnection:
        """A new connection. A caller that does not wait for it leaves it to later ones: to find the
        primary among hosts that do not answer takes longer than one lease period."""
        opening = asyncio.ensure_future(self._connect())
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._opening.add(opening)
            opening.add_done_callback(self._on_opened)
            if len(self._opening) > self._max_size:
                opening.cancel()
            raise

    def _on_opened(self, opening: asyncio.Future[PsycopgConnection]) -> None:
        is_wanted = opening in self._opening
        self._opening.discard(opening)
        if opening.cancelled() or opening.exception() is not None:
            return  # the next query has the same error
        if is_wanted:
            self._keep(LibpqConnection(opening.result()))
        else:
            opening.result().pgconn.finish()

    def _stop_opening(self) -> None:
        openings, self._opening = self._opening, set()
        for opening in openings:
            opening.cancel()

    async def _fetch_on(
        self,
        connection: LibpqConnection,
        text: str,
        values: Sequence[bytes | None],
        read: Callable[[Rows], Rows],
    ) -> Rows:
        self._busy.add(connection)
        try:
            return read(await _repeat_conflicts(connection, text, values))
        except ConnectionLost:
            connection.close()
            raise
        except asyncio.CancelledError:
            self._end(connection)
            raise
        finally:
            self._busy.discard(connection)
            if connection.is_open:
                self._keep(connection)

    def _end(self, connection: LibpqConnection) -> None:
        task = asyncio.create_task(connection.cancel(), name="keylatch-cancel")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        task.add_done_callback(lambda _: connection.finish())

    def _keep(self, connection: LibpqConnection) -> None:
        loop = asyncio.get_running_loop()
        self._idle.append((connection, loop.time()))
        if self._idle_timer is None and len(self._idle) > self._min_size:
            self._idle_timer = loop.call_later(self._idle_seconds, self._close_unused)

    def _close_unused(self) -> None:
        self._idle_timer = None
        loop = asyncio.get_running_loop()
        while len(self._idle) > self._min_size:
            connection, since = self._idle[0]
            if since + self._idle_seconds > loop.time():
                self._idle_timer = loop.call_at(since + self._idle_seconds, self._close_unused)
                return
            del self._idle[0]
            connection.close()

    def _take_idle(self) -> LibpqConnection | None:
        while self._idle:
            connection, _ = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    def close_idle(self) -> None:
        """Close the connections that no query uses."""
        idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    def drop_connections(self) -> None:
        """Close all connections; a query that runs is repeated on a new one."""
        self._stop_opening()
        self.close_idle()
        for connection in tuple(self._busy):
            connection.close()

    def close(self) -> None:
        """Close all connections; waiting queries get `ConnectionLost`."""
        self.drop_connections()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        for task in self._ending:
            task.cancel()
        # A semaphore belongs to the event loop on which a task first waited for it.
        self._slots = asyncio.Semaphore(self._max_size)


async def _repeat_conflicts(
    connection: LibpqConnection, text: str, values: Sequence[bytes | None]
) -> Rows:
    # A role's or a database's default isolation level may be stricter than READ COMMITTED.
    for _ in range(_MAX_CONFLICTS - 1):
        with contextlib.suppress(*CONFLICTS):
            return await connection.fetch(text, values)
    return await connection.fetch(text, values)
