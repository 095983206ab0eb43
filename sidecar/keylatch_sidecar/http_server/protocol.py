"""One HTTP connection with limits on the size and the duration of requests.

uvicorn on httptools limits neither. The law of this file: a request that is answered at once costs
no timer; `Connections` checks all connections once a second. A client's time runs only while it is
the client's turn: to send a head, a body or the next request, or to read a response.
"""

import asyncio
import math
from enum import Enum
from typing import ClassVar, Final

import httptools

from keylatch_sidecar.http_server.connections import Connections
from keylatch_sidecar.http_server.limits import Limits
from keylatch_sidecar.http_server.rejections import INVALID, TOO_LARGE, TOO_SLOW, Rejection
from keylatch_sidecar.http_server.upgrades import UpgradeIgnoring

PIECE_BYTES: Final = 4096
"""The most that the parser gets at once: it does not report an incomplete header field, and copies
the start of the field with each further piece."""


class Phase(Enum):
    """Where in a request the parser is."""

    IDLE = "between requests"
    HEAD = "head"
    BODY = "body"
    CLOSING = "closing; received bytes are discarded"


# Constants, because every request needs them and an attribute of an Enum costs as much as a call.
BETWEEN: Final = Phase.IDLE
_HEAD: Final = Phase.HEAD
_BODY: Final = Phase.BODY
_CLOSING: Final = Phase.CLOSING


class HeadTooLarge(Exception):
    """Ends the parsing of a request."""


class LimitedProtocol(UpgradeIgnoring):
    """uvicorn's protocol with limits; subclasses may set `limits`."""

    limits: ClassVar[Limits] = Limits()

    phase: Phase = BETWEEN
    turn_started_at = 0.0
    """The loop's time at which the client's turn began."""
    _timed_phase: Phase = BETWEEN
    """The phase in which that turn began."""
    _unread_since: float | None = None
    """The loop's time since which the client has not read a response; None: it reads."""
    _closing_since: float | None = None
    _overhead_bytes = 0
    """Bytes of the head; then bytes after it that are neither body nor required chunk syntax."""
    _chunk_bytes = 0
    """Bytes of the chunk that is being parsed."""
    _buffered = b""
    """Bytes after a request that waits for the response to the request before it."""
    _rejection: Rejection | None = None

    # Called by asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.turn_started_at = self.loop.time()
        self._connections = Connections.of_server(self.server_state, self.limits)
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self.pipeline or self._buffered or self._rejection is not None:
            self._buffer(data)
        elif len(data) <= PIECE_BYTES:
            self._parse(data)
        else:
            self._parse_in_pieces(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_since = None

    # Called by the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.phase = _HEAD

    def on_headers_complete(self) -> None:
        # A head that ends within the second piece is not counted.
        if self._overhead_bytes > 0 and self._head_bytes() > self.limits.head_bytes:
            raise HeadTooLarge
        if self.is_upgrade:
            return
        super().on_headers_complete()
        self.phase = _BODY
        self._overhead_bytes = -PIECE_BYTES

    def on_body(self, body: bytes) -> None:
        self._overhead_bytes -= len(body)
        self._chunk_bytes += len(body)
        super().on_body(body)

    def on_chunk_header(self) -> None:
        self._chunk_bytes = 0

    def on_chunk_complete(self) -> None:
        self._overhead_bytes -= len(b"%x\r\n\r\n" % self._chunk_bytes)

    def on_message_complete(self) -> None:
        if self.phase is _HEAD:  # the head of an upgrade, which will be parsed again
            return
        super().on_message_complete()
        self._overhead_bytes = -PIECE_BYTES
        self.phase = self._timed_phase = BETWEEN
        if self.cycle.response_complete:
            self.turn_started_at = self.loop.time()

    # Called by uvicorn

    def on_response_complete(self) -> None:
        """As uvicorn's, but without a timer for each response, and without reading while requests
        are queued: one read can contain 14,000 small requests."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self.turn_started_at = self.loop.time()
        if self._buffered or self._rejection is not None:
            self._resume()
        elif not self.pipeline:
            self.flow.resume_reading()

    # Called by `Connections`

    @property
    def eviction_rank(self) -> tuple[int, float] | None:
        """The order in which connections are closed when file descriptors run out, lowest first:
        connections without a request yet, then idle ones, then those whose client delays a request
        or a response. None: not evictable, because a complete request is being answered."""
        if self.transport.is_closing():
            return None
        if not self._is_responding:
            return int(self.cycle is not None), self.turn_started_at
        if self._unread_since is not None:
            return 2, self._unread_since
        return (2, self.turn_started_at) if self.phase is _BODY and not self.pipeline else None

    def close_if_timed_out(self, now: float) -> None:
        """Close the connection if the client has used up its time."""
        if self.transport.is_closing():  # with bytes that the client has not read
            self._closing_since = self._closing_since or now
            self._abort_if_overdue(self._closing_since, now)
        elif self._unread_since is not None:
            self._abort_if_overdue(self._unread_since, now)
        elif self.flow.read_paused:
            self.turn_started_at = now
        elif now - self.turn_started_at > self._timeout_seconds():
            self._close_timed_out()

    # Receiving

    @property
    def is_pipelined(self) -> bool:
        """Whether new bytes must wait for the responses to earlier requests."""
        return bool(self.pipeline or self._buffered or self._rejection is not None)

    def start_turn(self) -> None:
        """Begin the client's turn to send a head or a body, unless it has already begun."""
        if self._timed_phase is not self.phase:
            self._timed_phase, self.turn_started_at = self.phase, self.loop.time()

    def _parse_in_pieces(self, data: bytes) -> None:
        for at in range(0, len(data), PIECE_BYTES):
            if self.pipeline:
                self._buffer(data[at:])
                return
            if not self._parse(data[at : at + PIECE_BYTES]):
                return

    def _parse(self, piece: bytes) -> bool:
        """Parse, and return whether the connection accepts more."""
        if self.phase is BETWEEN:
            self._overhead_bytes = 0
        try:
            for _ in range(self.feed_data(piece)):
                self._connections.upgrades.add()
        except httptools.HttpParserError as error:
            is_large = isinstance(error.__context__, HeadTooLarge)
            self._reject(TOO_LARGE if is_large else INVALID)
            return False
        if self.phase is not BETWEEN:
            self.start_turn()
            self._overhead_bytes += len(piece)
            if self._overhead_bytes > self.limits.head_bytes:
                self._reject(TOO_LARGE)
                return False
        return True

    def _buffer(self, data: bytes) -> None:
        if self._rejection is None:
            self._buffered += data
            self.flow.pause_reading()
            return
        self._overhead_bytes += len(data)
        if self._overhead_bytes > self.limits.linger_bytes:
            self.transport.abort()

    def _resume(self) -> None:
        if self.pipeline:
            return
        if self._buffered:
            buffered, self._buffered = self._buffered, b""
            self.data_received(buffered)
        if self._rejection is not None and not self._is_responding:
            self._send_and_close(self._rejection)
        elif not self.pipeline:
            self.flow.resume_reading()

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    # Closing

    @property
    def _is_responding(self) -> bool:
        cycle = self.cycle
        return cycle is not None and not (cycle.response_complete or cycle.disconnected)

    def _timeout_seconds(self) -> float:
        """The limit for the client's current turn."""
        if self.phase is _HEAD:
            return self.limits.head_seconds
        if self.phase is _BODY:
            return self.limits.body_seconds
        if self.phase is _CLOSING:
            return self.limits.linger_seconds
        if self._is_responding:
            return math.inf
        return self.limits.head_seconds if self.cycle is None else self.limits.idle_seconds

    def _close_timed_out(self) -> None:
        if self.phase is _CLOSING:
            self.transport.abort()
        elif self.phase is BETWEEN:
            self.transport.close()
        else:
            self._reject(TOO_SLOW)

    def _abort_if_overdue(self, since: float, now: float) -> None:
        if now - since > self.limits.answer_seconds:
            self.transport.abort()

    def _reject(self, rejection: Rejection) -> None:
        """Answer the request that is being received, in its turn, and close the connection."""
        if self._rejection is not None:
            return
        self._connections.rejected.add(rejection.status)
        self._rejection, self._buffered, self._overhead_bytes = rejection, b"", 0
        cycle = self.cycle
        if self.phase is _BODY and cycle.response_complete:
            self.transport.close()  # answered, and only the rest of the body was missing
        elif self.phase is _BODY and (self.pipeline or cycle.response_started):
            self.transport.abort()  # its response has begun, or must wait for another one
        else:
            if self.phase is _BODY:  # the app, which waits for the body, gets http.disconnect
                cycle.disconnected = True
                cycle.message_event.set()
            if not self._is_responding:
                self._send_and_close(rejection)

    def _send_and_close(self, rejection: Rejection) -> None:
        self.phase, self.turn_started_at = _CLOSING, self.loop.time()
        self.flow.resume_reading()
        self.transport.write(rejection.wire)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()
