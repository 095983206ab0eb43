"""A PostgreSQL connection over libpq, for queries that run often.

What psycopg's Python does around a query costs several times what libpq does. So a connection keeps
its statements prepared, unless a pooler may give it another session for every query, and its socket
registered with the event loop: a query is one send and one read. psycopg connects and supplies
libpq. The event loop notices that an idle connection was closed.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer

from keylatch.storage.database import Rows

PsycopgConnection = psycopg.AsyncConnection[Any]

CONFLICTS: Final = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)
"""Errors after which the connection is as good as before, and a query may be repeated on it."""
_CANCEL_SECONDS: Final = 2.0
_NEAR_SECONDS: Final = 0.02
_DISCONNECT_STATES: Final = ("57P", "08")
"""SQLSTATEs of a server that shuts down, has crashed, or terminates this session."""


class ConnectionLost(Exception):
    """Either side closed the connection before the server answered, or its answer cannot be used.

    Args:
        reason: for the caller whose second connection is lost as well.
    """

    def __init__(self, reason: str = "the server closed the connection") -> None:
        super().__init__(reason)
        self.reason = reason


class AnsweredByOther(ConnectionLost):
    """The connection leads to another server than it must."""


class LibpqConnection:
    """A connection that runs one query at a time.

    Args:
        connection: keeps statements prepared unless its `prepare_threshold` is None.
    """

    def __init__(self, connection: PsycopgConnection) -> None:
        self._connection = connection  # kept: when it is collected, it closes `_libpq`
        self._prepares = connection.prepare_threshold is not None
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
        try:
            result = await (self._run_prepared if self._prepares else self._run)(text, values)
        except CONFLICTS:
            raise  # the answer was read to its end
        except asyncio.CancelledError:
            self._leave()
            raise
        except BaseException:
            self.close()  # the rest of the answer must not be read as the next one's
            raise
        transformer = Transformer(self._connection)
        transformer.set_pgresult(result, set_loaders=True)
        return transformer.load_rows(0, result.ntuples, tuple)

    async def _run_prepared(self, text: str, values: Sequence[bytes | None]) -> pq.abc.PGresult:
        # To prepare a statement is a round trip of its own. It saves the server 0.1 ms each time,
        # so it is done where the server is near, and not for a statement that is run once.
        name = self._prepared.get(text)
        if name is None:
            began = self._loop.time()
            result = await self._run(text, values)
            if self._loop.time() - began < _NEAR_SECONDS:
                self._prepared[text] = b""
            return result
        if not name:
            name = f"keylatch{[*self._prepared].index(text)}".encode()
            await self._send(lambda: self._libpq.send_prepare(name, text.encode()))
            self._prepared[text] = name
        return await self._send(lambda: self._libpq.send_query_prepared(name, values))

    async def _run(self, text: str, values: Sequence[bytes | None]) -> pq.abc.PGresult:
        return await self._send(lambda: self._libpq.send_query_params(text.encode(), values))

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
        kind: type[psycopg.Error] = psycopg.DatabaseError
        with contextlib.suppress(KeyError):
            kind = psycopg.errors.lookup(state)
        return kind(message.decode(errors="replace"))

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
        if waiter is not None and not waiter.done() and not self._loop.is_closed():
            waiter.set_result(result)

    def close(self) -> None:
        """Close the connection; a waiting query gets `ConnectionLost`."""
        if self.is_open:
            self._leave()
            self._libpq.finish()
            self._set_result(None)

    def _leave(self) -> None:
        self.is_open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)

    async def cancel(self) -> None:
        """Ask the server to cancel the query whose caller has left."""
        with contextlib.suppress(psycopg.Error, OSError):
            await self._connection.cancel_safe(timeout=_CANCEL_SECONDS)

    def finish(self) -> None:
        """Close the connection after `cancel`."""
        self._libpq.finish()
