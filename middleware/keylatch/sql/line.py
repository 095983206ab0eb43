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

from keylatch.sql.database import Rows

Connection = psycopg.AsyncConnection[Any]

_GOES: Final = ("57P", "08")
"""SQLSTATEs of a server that shuts down, has crashed, or was told to end this session."""


class LineLost(Exception):
    """It was closed, by whichever side, before it answered."""


class _Line:
    """One connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection  # it would close what it owns
        self._libpq = connection.pgconn
        self._libpq.nonblocking = 1
        self._loop = asyncio.get_running_loop()
        self._socket = self._libpq.socket
        self._prepared: dict[str, bytes] = {}
        self._rows: pq.abc.PGresult | None = None
        self._answer: asyncio.Future[pq.abc.PGresult | None] | None = None
        self._loop.add_reader(self._socket, self._hear)
        self.is_open = True

    async def ask(self, text: str, values: Sequence[bytes | None]) -> Rows:
        """The rows that answer a statement; its parameters are `$1`, `$2`, …

        Raises:
            LineLost: nothing was heard, or only that the server goes.
            psycopg.Error: what the server has against it.
        """
        name = self._prepared.get(text)
        try:
            if name is None:
                name = f"keylatch{len(self._prepared)}".encode()
                await self._sent(lambda: self._libpq.send_prepare(name, text.encode()))
                self._prepared[text] = name
            said = await self._sent(lambda: self._libpq.send_query_prepared(name, values))
        except BaseException:
            self.close()  # whatever is left of the answer must not be taken for the next one
            raise
        heard = Transformer(self._connection)
        heard.set_pgresult(said, set_loaders=True)
        return heard.load_rows(0, said.ntuples, tuple)

    async def _sent(self, send: Callable[[], None]) -> pq.abc.PGresult:
        if not self.is_open:
            raise LineLost
        self._answer = answer = self._loop.create_future()
        try:
            send()
            self._flush()
        except psycopg.OperationalError:
            raise LineLost from None
        said: pq.abc.PGresult | None = await answer
        if said is None or said.status not in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK):
            raise self._complaint(said)
        return said

    def _complaint(self, said: pq.abc.PGresult | None) -> Exception:
        if said is None or self._libpq.status == pq.ConnStatus.BAD:
            return LineLost()
        state = (said.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        if state.startswith(_GOES):
            return LineLost()
        what = said.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"an unknown error"
        return psycopg.DatabaseError(what.decode(errors="replace"))

    def _flush(self) -> None:
        if self.is_open and self._libpq.flush():  # the socket takes no more at the moment
            self._loop.add_writer(self._socket, self._flush_on)

    def _flush_on(self) -> None:
        self._loop.remove_writer(self._socket)
        try:
            self._flush()
        except psycopg.OperationalError:
            self.close()

    def _hear(self) -> None:
        try:
            self._libpq.consume_input()
            while self._answer is not None and not self._libpq.is_busy():
                said = self._libpq.get_result()
                if said is None:
                    self._tell(self._rows)
                else:
                    self._rows = said
        except psycopg.OperationalError:  # the server, or the network, has closed it
            self.close()

    def _tell(self, said: pq.abc.PGresult | None) -> None:
        answer, self._answer, self._rows = self._answer, None, None
        if answer is not None and not answer.done():
            answer.set_result(said)

    def close(self) -> None:
        """Hang up; whoever waits is told that the line is lost."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._libpq.finish()
        self._tell(None)


class Lines:
    """As many lines as are needed, up to a number of places; idle ones are kept.

    Args:
        connect: makes a connection that commits by itself.
        places: how many questions may be under way at once; the others wait for a place.
        stale_seconds: how long a line that was idle may be silent. It may have died without a
            word; then the question is asked again, on a new one. None: as long as the question may.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        places: int,
        stale_seconds: float | None = None,
    ) -> None:
        self._connect = connect
        self._places = asyncio.Semaphore(places)
        self._stale_seconds = stale_seconds
        self._idle: list[_Line] = []
        self._busy: set[_Line] = set()

    @property
    def under_way(self) -> int:
        """Questions that the server has not answered yet."""
        return len(self._busy)

    async def ask(self, text: str, values: Sequence[bytes | None], seconds: float) -> Rows:
        """The rows that answer a statement; it must be one that may be asked twice.

        Args:
            text: of the statement; its parameters are `$1`, `$2`, …
            values: of the parameters, in PostgreSQL's text format.
            seconds: how long to wait in all, for a place and a connection as well.

        Raises:
            TimeoutError, psycopg.Error: there was no answer, or an error.
        """
        async with asyncio.timeout(seconds), self._places:
            line = self._take_idle()
            if line is not None:
                try:
                    async with asyncio.timeout(self._stale_seconds):
                        return await self._asked(line, text, values)
                except (LineLost, TimeoutError):
                    self._drop_idle()  # what ended this one may have ended the others as well
            line = _Line(await self._connect())
            try:
                return await self._asked(line, text, values)
            except LineLost:
                raise psycopg.OperationalError("the server closed the connection") from None

    async def _asked(self, line: _Line, text: str, values: Sequence[bytes | None]) -> Rows:
        self._busy.add(line)
        try:
            return await line.ask(text, values)
        finally:
            self._busy.discard(line)
            if line.is_open:
                self._idle.append(line)

    def _take_idle(self) -> _Line | None:
        while self._idle:
            line = self._idle.pop()
            if line.is_open:
                return line
        return None

    def _drop_idle(self) -> None:
        idle, self._idle = self._idle, []
        for line in idle:
            line.close()

    def close(self) -> None:
        """Hang up; whoever still waits is told that the line is lost."""
        self._drop_idle()
        for line in tuple(self._busy):
            line.close()
