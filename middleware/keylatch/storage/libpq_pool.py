"""A pool of PostgreSQL connections for prepared queries, one at a time per connection, over libpq.

Leases and look-ups run a few queries all the time, and what psycopg's Python does around a query
costs several times what libpq does. So a connection keeps its statements prepared and its socket
registered with the event loop: a query is one send and one read. psycopg connects and supplies
libpq.

The event loop notices that an idle connection was closed. A connection whose server does not answer
is closed at the query's time limit and never used again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer

from keylatch.storage.database import Rows

PsycopgConnection = psycopg.AsyncConnection[Any]

_DISCONNECT_STATES: Final = ("57P", "08")
"""SQLSTATEs of a server that shuts down, has crashed, or terminates this session."""


class ConnectionLost(Exception):
    """Either side closed the connection before the server answered."""


class LibpqConnection:
    """A connection that runs one query at a time."""

    def __init__(self, connection: PsycopgConnection) -> None:
        self._connection = connection  # kept: when it is collected, it closes `_libpq`
        self._libpq = connection.pgconn
        self._libpq.nonblocking = 1
        self._loop = asyncio.get_running_loop()
        self._socket = self._libpq.socket
        self._prepared: dict[str, bytes] = {}
        self._rows: pq.abc.PGresult | None = None
        self._waiter: asyncio.Future[pq.abc.PGresult | None] | None = None
        self._loop.add_reader(self._socket, self._on_readable)
        self.is_open = True

    async def fetch(self, text: str, values: Sequence[bytes | None]) -> Rows:
        """The rows of a statement with parameters `$1`, `$2`, …

        Raises:
            ConnectionLost: there was no answer, or the server ended the session.
            psycopg.Error: the server refused the statement.
        """
        name = self._prepared.get(text)
        try:
            if name is None:
                name = f"keylatch{len(self._prepared)}".encode()
                await self._send(lambda: self._libpq.send_prepare(name, text.encode()))
                self._prepared[text] = name
            result = await self._send(lambda: self._libpq.send_query_prepared(name, values))
        except BaseException:
            self.close()  # the rest of the answer must not be read as the next one's
            raise
        transformer = Transformer(self._connection)
        transformer.set_pgresult(result, set_loaders=True)
        return transformer.load_rows(0, result.ntuples, tuple)

    async def _send(self, send: Callable[[], None]) -> pq.abc.PGresult:
        if not self.is_open:
            raise ConnectionLost
        self._waiter = waiter = self._loop.create_future()
        try:
            send()
            self._flush()
        except psycopg.OperationalError:
            raise ConnectionLost from None
        result: pq.abc.PGresult | None = await waiter
        if result is None or result.status not in (
            pq.ExecStatus.COMMAND_OK,
            pq.ExecStatus.TUPLES_OK,
        ):
            raise self._error_of(result)
        return result

    def _error_of(self, result: pq.abc.PGresult | None) -> Exception:
        if result is None or self._libpq.status == pq.ConnStatus.BAD:
            return ConnectionLost()
        state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        if state.startswith(_DISCONNECT_STATES):
            return ConnectionLost()
        message = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"an unknown error"
        return psycopg.DatabaseError(message.decode(errors="replace"))

    def _flush(self) -> None:
        if self.is_open and self._libpq.flush():  # the socket's buffer is full
            self._loop.add_writer(self._socket, self._on_writable)

    def _on_writable(self) -> None:
        self._loop.remove_writer(self._socket)
        try:
            self._flush()
        except psycopg.OperationalError:
            self.close()

    def _on_readable(self) -> None:
        try:
            self._libpq.consume_input()
            while self._waiter is not None and not self._libpq.is_busy():
                result = self._libpq.get_result()
                if result is None:
                    self._set_result(self._rows)
                else:
                    self._rows = result
        except psycopg.OperationalError:  # the server, or the network, has closed it
            self.close()

    def _set_result(self, result: pq.abc.PGresult | None) -> None:
        waiter, self._waiter, self._rows = self._waiter, None, None
        if waiter is not None and not waiter.done():
            waiter.set_result(result)

    def close(self) -> None:
        """Close the connection; a waiting query gets `ConnectionLost`."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._libpq.finish()
        self._set_result(None)


class ConnectionPool:
    """Up to `max_size` connections; idle ones are kept.

    Args:
        connect: opens a connection in autocommit mode.
        max_size: how many queries may run at once; the others wait.
        stale_seconds: the time limit on a connection that was idle, which may have been lost
            without notice; then the query is repeated on a new one. None: the query's own limit.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[PsycopgConnection]],
        max_size: int,
        stale_seconds: float | None = None,
    ) -> None:
        self._connect = connect
        self._max_size = max_size
        self._slots = asyncio.Semaphore(max_size)
        self._stale_seconds = stale_seconds
        self._idle: list[LibpqConnection] = []
        self._busy: set[LibpqConnection] = set()

    @property
    def under_way(self) -> int:
        """Queries that the server has not answered yet."""
        return len(self._busy)

    async def fetch(self, text: str, values: Sequence[bytes | None], seconds: float) -> Rows:
        """The rows of a statement that may be run twice.

        Args:
            text: of the statement, with parameters `$1`, `$2`, …
            values: of the parameters, in PostgreSQL's text format.
            seconds: the time limit, including the wait for a connection.

        Raises:
            TimeoutError, psycopg.Error: no answer, or an error.
        """
        async with asyncio.timeout(seconds), self._slots:
            connection = self._take_idle()
            if connection is not None:
                try:
                    async with asyncio.timeout(self._stale_seconds):
                        return await self._fetch_on(connection, text, values)
                except (ConnectionLost, TimeoutError):
                    self._close_idle()  # the cause may have closed the others as well
            connection = LibpqConnection(await self._connect())
            try:
                return await self._fetch_on(connection, text, values)
            except ConnectionLost:
                raise psycopg.OperationalError("the server closed the connection") from None

    async def _fetch_on(
        self, connection: LibpqConnection, text: str, values: Sequence[bytes | None]
    ) -> Rows:
        self._busy.add(connection)
        try:
            return await connection.fetch(text, values)
        finally:
            self._busy.discard(connection)
            if connection.is_open:
                self._idle.append(connection)

    def _take_idle(self) -> LibpqConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    def _close_idle(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close all connections; waiting queries get `ConnectionLost`."""
        self._close_idle()
        for connection in tuple(self._busy):
            connection.close()
        # A semaphore belongs to the event loop on which a task first waited for it.
        self._slots = asyncio.Semaphore(self._max_size)
