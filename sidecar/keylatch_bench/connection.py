"""A keep-alive connection to a sidecar, and the address of the sidecar.

A request has the fewest bytes that a proxy would send, and responses are parsed with httptools: a
slow load generator would measure itself. After a connection is lost the next check reconnects, and
its latency includes that.
"""

import asyncio
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httptools

from keylatch_bench.errors import BenchError
from keylatch_bench.load_generator import Credential, Outcome

LOST: Final = "connection lost"
UNREACHABLE: Final = "cannot connect"
_CONNECT_SECONDS: Final = 5.0
_CALL_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a sidecar: host and port of a URL, or a Unix socket."""

    host: str = "localhost"
    port: int = 80
    prefix: str = ""
    is_tls: bool = False
    uds: Path | None = None

    @classmethod
    def from_url(cls, url: str) -> "Address":
        """The address in a URL.

        Raises:
            BenchError: the URL is malformed or has more than an address.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise BenchError("that is not a URL", "like http://127.0.0.1:8700") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BenchError("that is not an HTTP URL", "like http://127.0.0.1:8700")
        if parts.username is not None or parts.query or parts.fragment:
            raise BenchError("the URL has more than an address", "like http://127.0.0.1:8700")
        is_tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if is_tls else 80), parts.path.rstrip("/"), is_tls)

    def __str__(self) -> str:
        if self.uds is not None:
            return f"unix:{self.uds}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.is_tls else ''}://{host}:{self.port}{self.prefix}"

    async def connect(self, protocol: asyncio.Protocol) -> None:
        """Connect the protocol.

        Raises:
            OSError: the connection failed.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_SECONDS):
            if self.uds is not None:
                await loop.create_unix_connection(lambda: protocol, str(self.uds))
                return
            context = ssl.create_default_context() if self.is_tls else None
            await loop.create_connection(lambda: protocol, self.host, self.port, ssl=context)


class _Stream(asyncio.Protocol):
    """One TCP connection; its responses go to the `Connection` that opened it."""

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self._parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport | None = None
        self.body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - all connections are streams
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._connection.disconnect(self, "not HTTP")

    def connection_lost(self, error: Exception | None) -> None:
        self._connection.disconnect(self, LOST)

    # httptools

    def on_message_begin(self) -> None:
        self.body.clear()

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        status, is_kept_alive = self._parser.get_status_code(), self._parser.should_keep_alive()
        self._connection.receive_response(status, self.body, is_kept_alive)


class Connection:
    """See `keylatch_bench.load_generator.Client`.

    Args:
        address: of the sidecar.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._host = f"Host: {address.host}\r\n".encode()
        self._path = f"GET {address.prefix}/verify HTTP/1.1\r\n".encode() + self._host
        self.request_headers = b""
        self._stream: _Stream | None = None
        self._on_outcome: Callable[[Outcome], None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._body: list[bytes] = []

    async def open(self) -> None:
        """Connect, unless it is connected.

        Raises:
            OSError: the connection failed.
        """
        if self._stream is None:
            stream = _Stream(self)
            await self._address.connect(stream)
            self._stream = stream

    @property
    def request_headers(self) -> bytes:
        """Header fields that this sidecar expects of proxies."""
        return self._request_headers

    @request_headers.setter
    def request_headers(self, lines: bytes) -> None:
        self._request_headers = lines
        self._check = self._path + lines

    def check(self, credential: Credential, on_outcome: Callable[[Outcome], None]) -> None:
        if credential.value:
            self._send(self._check + b"Authorization: %b\r\n\r\n" % credential.value, on_outcome)
        else:
            self._send(self._check + b"\r\n", on_outcome)

    def cancel(self) -> None:
        """Close the connection; the next check reconnects."""
        self._on_outcome = None
        if self._opening is not None:
            self._opening.cancel()
        self._abort()

    async def call(
        self, method: str, path: str, credential: bytes, content: Any = None, fields: str = ""
    ) -> tuple[int, bytes]:
        """Send another request; return status and body of the response.

        Raises:
            BenchError: there was no response.
        """
        body = b"" if content is None else json.dumps(content).encode()
        start = f"{method} {self._address.prefix}{path} HTTP/1.1\r\n".encode() + self._host
        start += b"Authorization: %b\r\n" % credential if credential else b""
        start += fields.encode()
        start += b"Content-Type: application/json\r\n" if body else b""
        request = start + b"Content-Length: %d\r\n\r\n" % len(body) + body
        response: asyncio.Future[tuple[Outcome, bytes]] = asyncio.get_running_loop().create_future()

        def set_response(outcome: Outcome) -> None:
            response.set_result((outcome, b"".join(self._body)))

        self._send(request, set_response)
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                outcome, answer = await response
        except TimeoutError:
            outcome, answer = f"no answer in {_CALL_SECONDS:g} s", b""
        finally:
            if not response.done() or response.cancelled():
                self.cancel()  # or a late response would be that of the next request
        if isinstance(outcome, str):
            raise BenchError(f"{self._address}: {outcome}", "does a sidecar listen there?")
        return outcome, answer

    def receive_response(self, status: int, body: list[bytes], is_kept_alive: bool) -> None:
        """Handle a complete response."""
        self._body = body
        if not is_kept_alive:
            self._abort()  # before the callback, which may send the next request
        self._complete(status)

    def disconnect(self, stream: _Stream, why: str) -> None:
        """Handle a lost or unusable connection."""
        if stream is self._stream:
            self._abort()
            self._complete(why)

    def _abort(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None and stream.transport is not None:
            stream.transport.abort()

    def _complete(self, outcome: Outcome) -> None:
        on_outcome, self._on_outcome = self._on_outcome, None
        if on_outcome is not None:
            on_outcome(outcome)

    def _send(self, request: bytes, on_outcome: Callable[[Outcome], None]) -> None:
        self._on_outcome = on_outcome
        if self._stream is not None and self._stream.transport is not None:
            self._stream.transport.write(request)
        else:
            self._opening = asyncio.create_task(self._reopen(request))

    async def _reopen(self, request: bytes) -> None:
        try:
            await self.open()
        except OSError:
            self._complete(UNREACHABLE)
            return
        if self._stream is not None and self._stream.transport is not None:
            self._stream.transport.write(request)
