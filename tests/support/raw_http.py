"""What goes over the wire, byte by byte: requests as they are written, answers as they come.

No HTTP client is in between, because clients refuse to send what attackers send.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message

Header = tuple[bytes, bytes]


@dataclass(frozen=True)
class RawResponse:
    """An answer: its status, its header fields in alphabetical order, and its body."""

    status: int
    headers: tuple[Header, ...]
    body: bytes


def expected_response(
    status: int, headers: Sequence[Header] | Mapping[bytes, bytes], body: bytes
) -> RawResponse:
    """An answer to compare with; `content-length` counts the body if it is not given."""
    fields = list(headers.items() if isinstance(headers, Mapping) else headers)
    if b"content-length" not in dict(fields):
        fields.append((b"content-length", str(len(body)).encode()))
    return RawResponse(status, tuple(sorted(fields)), body)


def exchange(server: str | Path, request: bytes) -> bytes:
    """Write a request to a URL's host or to a Unix socket; all that comes back until it closes."""
    if isinstance(server, Path):
        connection = socket.socket(socket.AF_UNIX)
        address: Any = str(server)
    else:
        connection = socket.socket()
        address = (urlsplit(server).hostname, urlsplit(server).port)
    with connection:
        connection.settimeout(60)
        connection.connect(address)
        with contextlib.suppress(ConnectionError):  # it may answer and close before it has all
            connection.sendall(request)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                received += piece
        return received


def send(server: str | Path, start: bytes, *fields: bytes) -> RawResponse:
    """Send a request line and header fields as they are, and read the one answer."""
    lines = [start + b" HTTP/1.1", b"Host: test", *fields, b"Connection: close", b"", b""]
    return parse_response(exchange(server, b"\r\n".join(lines)))


def parse_response(raw: bytes) -> RawResponse:
    """Take an answer apart, without the `connection` field, which is the server's own affair."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    fields = [tuple(line.split(b": ", 1)) for line in lines]
    headers = sorted((name, value) for name, value in fields if name.lower() != b"connection")
    return RawResponse(int(status.split(b" ")[1]), tuple(headers), body)


async def asgi_request(
    app: ASGIApp, path: str = "/", headers: Sequence[Header] = (), **scope: Any
) -> RawResponse:
    """Call an ASGI app in this process, with header values that no server would hand over."""
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        messages.append(message)

    await app(http_scope(path, headers, **scope), receive, send)
    start, *bodies = messages
    return RawResponse(
        start["status"],
        tuple(sorted(start["headers"])),
        b"".join(message.get("body", b"") for message in bodies),
    )


def http_scope(path: str = "/", headers: Sequence[Header] = (), **more: Any) -> dict[str, Any]:
    """A scope as the ASGI specification wants it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        **more,
    }


@contextlib.asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[list[Message]]:
    """An app's life as a server leads it; yields what the app says, as far as it has said it."""
    to_app: asyncio.Queue[Message] = asyncio.Queue()
    sent: list[Message] = []
    has_sent = asyncio.Event()

    async def send(message: Message) -> None:
        sent.append(message)
        has_sent.set()

    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    app_task = asyncio.ensure_future(app(scope, to_app.get, send))
    app_task.add_done_callback(lambda _: has_sent.set())
    await to_app.put({"type": "lifespan.startup"})
    await has_sent.wait()
    try:
        yield sent
    finally:
        await to_app.put({"type": "lifespan.shutdown"})
        await app_task
