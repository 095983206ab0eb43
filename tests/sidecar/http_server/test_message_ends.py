"""Where a request ends: what comes in a body is no request, and what comes behind it no field.

uvicorn's own protocol is the broken twin.
"""

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from keylatch_sidecar.http_server.limits import HEAD_BYTES
from tests.support.raw_connections import (
    CHUNKED,
    GET,
    HOST,
    Patient,
    answers_to,
    connected,
    is_silent,
    lifespan,
    rest_of,
    statuses,
)
from tests.support.servers import eventually, free_port, require_program, serving

pytestmark = pytest.mark.long  # each starts a server

Seen = tuple[str, str, bytes]


@dataclass
class Recorder:
    """An app that notes each request's method, path, body and names of fields."""

    seen: list[Seen] = field(default_factory=list)
    names: list[set[bytes]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.seen.append((scope["method"], scope["path"], body))
        self.names.append({name for name, _ in scope["headers"]})
        answer = scope["method"].encode()
        length = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": answer})


# Upgrades

SMUGGLED = b"GET /smuggled" + HOST + b"\r\n"
BODIES = {
    "a request": SMUGGLED,
    "a request after blank lines": b"\r\n" * 20 + SMUGGLED + b"\r\n" * 20,
    "more than a piece": SMUGGLED * 500,
    "nothing": b"",
}
UPGRADE = b"Upgrade: websocket\r\n"
UPGRADES = {
    "websocket": b"Connection: Upgrade\r\n" + UPGRADE,
    "h2c, as of curl": b"Upgrade: h2c\r\nHTTP2-Settings: A\r\n"
    b"Connection: Upgrade, HTTP2-Settings\r\n",
    "any protocol, another case": b"CONNECTION: uPGRADE\r\nuPGRADE: any/1\r\n",
    "among others": b"Connection: keep-alive, Upgrade\r\n" + UPGRADE,
    "several fields": b"Connection: keep-alive\r\nConnection: upgrade\r\n" + UPGRADE * 2,
    "before it": UPGRADE + b"Connection: upgrade\r\n",
    "of no protocol": b"Connection: upgrade\r\nUpgrade:\r\n",
}
LAST = b"GET /last" + HOST + b"Connection: close\r\n\r\n"


def framed(body: bytes, *, is_chunked: bool) -> tuple[bytes, bytes]:
    """The field that says where a body ends, and the body as it is sent."""
    if not is_chunked:
        return b"Content-Length: %d\r\n\r\n" % len(body), body
    halves = [half for half in (body[: len(body) // 2], body[len(body) // 2 :]) if half]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(half), half) for half in halves)
    return b"Transfer-Encoding: chunked\r\n\r\n", chunks + b"0\r\n\r\n"


def seen_of(http: Any, *packets: bytes) -> tuple[list[Seen], list[int]]:
    """What an app gets of packets that arrive one by one, and the answers until the end."""
    app = Recorder()
    with connected(http, app) as (line, _):
        with contextlib.suppress(ConnectionError):
            for packet in packets:
                line.sendall(packet)
                is_silent(line, 0.03)
        return app.seen, statuses(rest_of(line))


def cuts(head: bytes, rest: bytes) -> list[tuple[bytes, ...]]:
    """The same bytes in one packet, cut behind the head, in its last line, and in a name."""
    whole, at = head + rest, head.lower().find(b"upgrade:") + 3
    return [
        (whole,),
        (head, rest),
        (head[:-2], whole[len(head) - 2 :]),
        (whole[:at], whole[at : len(head) + 5], whole[len(head) + 5 :]),
    ]


@pytest.mark.long
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize(
    ("method", "upgrade", "body"),
    [
        *((b"POST", upgrade, "a request") for upgrade in UPGRADES),
        *((b"POST", "websocket", body) for body in BODIES if body != "a request"),
        *((method, "websocket", "a request") for method in (b"GET", b"CONNECT", b"FOO")),
    ],
)
def test_an_upgrade_is_ignored_and_the_body_is_read(
    method: bytes, upgrade: str, body: str, is_chunked: bool
) -> None:
    """RFC 9110 section 7.8: two requests are two answers, however their bytes arrive."""
    frame, sent = framed(BODIES[body], is_chunked=is_chunked)
    head = method + b" /first" + HOST + UPGRADES[upgrade] + frame
    first = (method.decode(), "/first", BODIES[body])
    for packets in cuts(head, sent + LAST):
        assert seen_of(Patient, *packets) == ([first, ("GET", "/last", b"")], [200, 200])


def test_uvicorns_own_protocol_reads_the_body_as_a_request() -> None:
    """The broken twin: of a request with `Upgrade`, and of one with CONNECT."""
    length, body = framed(SMUGGLED, is_chunked=False)
    for start in (b"POST /first" + HOST + UPGRADES["websocket"], b"CONNECT /first" + HOST):
        seen, _ = seen_of(HttpToolsProtocol, start + length, body + LAST)
        assert ("GET", "/smuggled", b"") in seen


@pytest.mark.parametrize("method", [b"POST", b"CONNECT"])
def test_an_upgrade_behind_another_request_is_ignored_as_well(method: bytes) -> None:
    """Which is parsed while that one is being answered; many of them in one packet."""
    length, body = framed(SMUGGLED, is_chunked=False)
    many = (method + b" /first" + HOST + UPGRADES["websocket"] + length + body) * 20
    first = (method.decode(), "/first", SMUGGLED)
    expected = [("GET", "/", b""), *[first] * 20, ("GET", "/last", b"")]
    assert seen_of(Patient, GET + many + LAST) == (expected, [200] * 22)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /first HTTP/1.0\r\nConnection: keep-alive, Upgrade\r\n" + UPGRADE,
        b"POST /first" + HOST + b"Connection: close, Upgrade\r\n" + UPGRADE,
    ],
    ids=["HTTP/1.0", "close"],
)
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_a_connection_that_ends_after_a_request_ends_after_its_body(
    head: bytes, is_chunked: bool
) -> None:
    """One answer; the app has the whole body, and nothing behind it."""
    frame, body = framed(SMUGGLED, is_chunked=is_chunked)
    for packets in cuts(head + frame, body + LAST):
        assert seen_of(Patient, *packets) == ([("POST", "/first", SMUGGLED)], [200])


@pytest.mark.parametrize(
    "frame",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nContent-Length: 5\r\n",
        b"Content-Length: 4, 4\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Connection:\r\n upgrade\r\n",
        b"Upgrade : h2c\r\n",
    ],
)
def test_an_upgrade_of_unclear_length_is_400(frame: bytes) -> None:
    """And nothing behind it is parsed."""
    head = b"POST /first" + HOST + UPGRADES["websocket"] + frame + b"\r\n"
    assert seen_of(Patient, head, SMUGGLED) == ([], [400])


def test_a_large_head_with_an_upgrade_counts_once() -> None:
    """Nearly 64 KiB are within the limit, with a body of any size and a large head behind it."""
    large = b"a: " + b"x" * (HEAD_BYTES - 500) + b"\r\n"
    length, body = framed(b"x" * 200_000, is_chunked=False)
    head = b"POST /first" + HOST + UPGRADES["websocket"] + large + length
    seen, answers = seen_of(Patient, head + body + b"GET /last" + HOST + large + LAST[-21:])
    assert ([path for _, path, _ in seen], answers) == (["/first", "/last"], [200, 200])


NGINX = """\
error_log {folder}/error.log; pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
    fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
    upstream sidecar {{ server {upstream}; keepalive 1; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://sidecar; proxy_http_version 1.1; proxy_request_buffering off;
            proxy_set_header Connection $http_connection;
            proxy_set_header Upgrade $http_upgrade;
        }}
    }}
}}
"""


@contextlib.contextmanager
def behind_nginx(http: Any, app: Recorder, folder: Path) -> Iterator[tuple[str, int]]:
    """An nginx that passes upgrades on and uses one connection for all."""
    with serving(app, http=http, ws="none") as url:
        port, configuration = free_port(), folder / "nginx.conf"
        upstream = urlsplit(url).netloc
        configuration.write_text(NGINX.format(folder=folder, upstream=upstream, port=port))
        program = require_program(shutil.which("nginx", path="/usr/sbin:/usr/bin"), "nginx")
        command = [program, "-c", str(configuration), "-p", str(folder), "-g", "daemon off;"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: is_open(port) or process.poll() is not None)
            yield "127.0.0.1", port
        finally:
            process.terminate()
            process.wait()


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def seen_behind_nginx(http: Any, folder: Path) -> list[Seen]:
    app = Recorder()
    length, body = framed(SMUGGLED, is_chunked=False)
    with behind_nginx(http, app, folder) as address:
        for _ in range(3):
            with socket.create_connection(address) as line:
                line.settimeout(30)
                line.sendall(b"POST /first" + HOST + UPGRADES["among others"] + length)
                is_silent(line, 0.1)
                with contextlib.suppress(ConnectionError):
                    line.sendall(body)
                line.recv(65536)
                is_silent(line, 0.1)
    return app.seen


@pytest.mark.long
def test_an_upgrade_behind_nginx_is_one_request(tmp_path: Path) -> None:
    """On a connection that nginx keeps for the requests of all clients. The broken twin
    answers before the body, which it does not take for one."""
    assert seen_behind_nginx(Patient, tmp_path) == [("POST", "/first", SMUGGLED)] * 3
    assert ("POST", "/first", SMUGGLED) not in seen_behind_nginx(HttpToolsProtocol, tmp_path)


# Chunks and trailers

EXTENDED = b"1;a=" + b"x" * 50_000 + b"\r\nx\r\n"
END = b"0\r\n\r\n"
TOO_MUCH = {
    "40 large extensions": EXTENDED * 40,
    "many small extensions": (b"1;a=" + b"x" * 40 + b"\r\nx\r\n") * 3000,
    "leading zeros": (b"0" * 60 + b"1\r\nx\r\n") * 3000,
    "an extension and trailers": EXTENDED + b"0\r\n" + (b"a: " + b"x" * 100 + b"\r\n") * 500,
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_extensions_and_trailers_are_limited_per_request(kind: str) -> None:
    """64 KiB of them in all, however many chunks they belong to; the twin has no such limit."""
    assert sent_while_read(Patient, CHUNKED + TOO_MUCH[kind]) == [431]
    whole = CHUNKED + TOO_MUCH[kind] + (b"\r\n" if "trailers" in kind else END)
    assert sent_while_read(HttpToolsProtocol, whole + LAST) == [200, 200]


def sent_while_read(http: Any, sent: bytes) -> list[int]:
    def send_all() -> None:
        with contextlib.suppress(ConnectionError):
            line.sendall(sent)

    with connected(http, Recorder()) as (line, _):
        sender = threading.Thread(target=send_all)
        sender.start()
        received = rest_of(line)
        sender.join()
        return statuses(received)


def test_what_chunks_need_counts_for_nothing() -> None:
    """A body of 50,000 chunks of a byte; and each request has a limit of its own."""
    small, large = b"1\r\nx\r\n" * 50_000 + END, EXTENDED + b"0\r\n\r\n"
    with connected(Patient) as (line, _):
        for body in (small, large, large, large):
            line.sendall(CHUNKED + body)
            assert answers_to(line, 1) == [200]
        line.sendall((CHUNKED + large) * 3 + b"GET /" + HOST + b"a: " + b"x" * 60_000 + b"\r\n\r\n")
        assert answers_to(line, 4) == [200] * 4


@pytest.mark.parametrize("is_behind", [False, True], ids=["alone", "behind another"])
@pytest.mark.parametrize("name", [b"authorization", b"x-api-key", b"x-keylatch-key-id"])
def test_trailers_are_no_fields_of_the_request(name: bytes, is_behind: bool) -> None:
    """RFC 9110 section 6.5.1: a credential in a trailer is ignored. The twin accepts it."""
    trailer = b"1\r\nx\r\n0\r\n" + name.title() + b": Bearer of news\r\nanother: x\r\n\r\n"
    expected = {b"host", b"transfer-encoding"}
    assert names_of(Patient, GET * is_behind + CHUNKED + trailer + LAST)[is_behind] == expected
    if is_behind:
        names = names_of(HttpToolsProtocol, GET + CHUNKED + trailer + LAST)
        assert names[1] == {*expected, name, b"another"}


def names_of(http: Any, sent: bytes) -> list[set[bytes]]:
    app = Recorder()
    with connected(http, app) as (line, _):
        line.sendall(sent)
        rest_of(line)
    return app.names
