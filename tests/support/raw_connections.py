"""Raw connections to a server of one protocol: what is sent, and what comes until they end."""

import asyncio
import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from keylatch_sidecar.http_server.http_methods import AnyMethod
from keylatch_sidecar.http_server.limits import HEAD_BYTES, Limits
from tests.support.servers import serving

HOST = b" HTTP/1.1\r\nHost: test\r\n"
GET = b"GET /" + HOST + b"\r\n"
CHUNKED = b"POST /" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
WITH_BODY = b"POST /" + HOST + b"Content-Length: 9\r\n\r\n"
HOUR = 3600.0
PATIENT = Limits(HEAD_BYTES, HOUR, HOUR, HOUR, HOUR)


class Patient(AnyMethod):
    """Only bytes are limited."""

    limits = PATIENT


def hasty(**limits: Any) -> type[AnyMethod]:
    """A protocol whose named times are short, and all others an hour; it looks all the time."""
    chosen = {**{name: getattr(PATIENT, name) for name in PATIENT.__slots__}, **limits}

    class Hasty(AnyMethod):
        limits = Limits(**{**chosen, "sweep_seconds": 0.01})

    return Hasty


@dataclass
class App:
    """Answers every request with its method, and reads bodies where configured."""

    is_reading: bool = True
    received: list[str] = field(default_factory=list)
    may_answer: threading.Event | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        while self.is_reading:
            message = await receive()
            self.received.append(message["type"])
            if not message.get("more_body"):
                break
        if self.may_answer is not None:
            await asyncio.to_thread(self.may_answer.wait)
        body = scope["method"].encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def lifespan(receive: Receive, send: Send) -> None:
    for step in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{step}.complete"})


@contextlib.contextmanager
def connected(
    http: Any, app: ASGIApp | None = None
) -> Iterator[tuple[socket.socket, "tuple[str, int]"]]:
    """A connection to a server of this protocol, and its address."""
    with serving(app or App(), http=http, ws="none") as url:
        address = (urlsplit(url).hostname or "", urlsplit(url).port or 0)
        with socket.create_connection(address) as line:
            line.settimeout(30)
            yield line, address


def rest_of(line: socket.socket) -> bytes:
    """All that comes until the connection ends, in whatever way."""
    pieces = []
    with contextlib.suppress(ConnectionError):
        while piece := line.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def answers_to(line: socket.socket, count: int) -> list[int]:
    """The status of so many answers with small bodies, of a connection that may stay open."""
    received = b""
    while len(statuses(received)) < count or not received.endswith((b"GET", b"POST", b"}")):
        piece = line.recv(65536)
        assert piece, "the connection ended"
        received += piece
    return statuses(received)


def statuses(raw: bytes) -> list[int]:
    return [int(part[1:4]) for part in raw.split(b"HTTP/1.1")[1:]]


def is_silent(line: socket.socket, seconds: float) -> bool:
    """Whether the connection is open for so long and nothing comes."""
    readable, _, _ = select.select([line], [], [], seconds)
    return not readable
