"""Lines to PostgreSQL on which questions are asked, one at a time, prepared, in libpq's own words.

Leases and look-ups ask a handful of questions all the time, and what Python does around a question
costs several times what libpq does. So a line keeps its statements prepared and its socket watched
by the event loop: to ask is to send, and to hear is to read. psycopg connects and brings libpq.

A line that dies while nobody asks is noticed by the event loop. One that falls silent is cut by
whoever has waited long enough, and nothing is ever heard on it again.
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
"""SQLSTATEs of a server that shuts down, has crashed, or was told to end this session."""


class ConnectionLost(Exception):
    """It was closed, by whichever side, before it answered."""


class LibpqConnection:
    """One connection."""

    def __init__(self, connection: PsycopgConnection) -> None:
        self._connection = connection  # it would close what it owns
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
        """The rows that answer a statement; its parameters are `$1`, `$2`, …

        Raises:
            LineLost: nothing was heard, or only that the server goes.
            psycopg.Error: what the server has against it.
        """
        name = self._prepared.get(text)
        try:
            if name is None:
                name = f"keylatch{len(self._prepared)}".encode()
                await self._send(lambda: self._libpq.send_prepare(name, text.encode()))
                self._prepared[text] = name
            result = await self._send(lambda: self._libpq.send_query_prepared(name, values))
        except BaseException:
            self.close()  # whatever is left of the answer must not be taken for the next one
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
        if self.is_open and self._libpq.flush():  # the socket takes no more at the moment
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
        """Hang up; whoever waits is told that the line is lost."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._libpq.finish()
        self._set_result(None)


class ConnectionPool:
    """As many lines as are needed, up to a number of places; idle ones are kept.

    Args:
        connect: makes a connection that commits by itself.
        max_size: how many questions may be under way at once; the others wait for a place.
        stale_seconds: how long a line that was idle may be silent. It may have died without a
            word; then the question is asked again, on a new one. None: as long as the question may.
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
        """Questions that the server has not answered yet."""
        return len(self._busy)

    async def fetch(self, text: str, values: Sequence[bytes | None], seconds: float) -> Rows:
        """The rows that answer a statement; it must be one that may be asked twice.

        Args:
            text: of the statement; its parameters are `$1`, `$2`, …
            values: of the parameters, in PostgreSQL's text format.
            seconds: how long to wait in all, for a place and a connection as well.

        Raises:
            TimeoutError, psycopg.Error: there was no answer, or an error.
        """
        async with asyncio.timeout(seconds), self._slots:
            connection = self._take_idle()
            if connection is not None:
                try:
                    async with asyncio.timeout(self._stale_seconds):
                        return await self._fetch_on(connection, text, values)
                except (ConnectionLost, TimeoutError):
                    self._close_idle()  # what ended this one may have ended the others as well
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
        """Hang up; whoever still waits is told that the line is lost."""
        self._close_idle()
        for connection in tuple(self._busy):
            connection.close()
        # A semaphore belongs to the event loop on which a task first waited for it.
        self._slots = asyncio.Semaphore(self._max_size)
