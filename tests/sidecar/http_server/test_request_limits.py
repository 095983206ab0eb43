"""What one client may take of the sidecar with requests: bytes, time, and lines of the log.

uvicorn's own protocol, which has none of these limits, is the broken twin of each.
"""

import contextlib
import logging
import socket
import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from keylatch_sidecar.http_server.limits import HEAD_BYTES
from keylatch_sidecar.http_server.protocol import PIECE_BYTES
from tests.support.raw_connections import (
    CHUNKED,
    GET,
    HOST,
    WITH_BODY,
    App,
    Patient,
    answers_to,
    connected,
    hasty,
    is_silent,
    lifespan,
    rest_of,
    statuses,
)
from tests.support.raw_http import parse_response
from tests.support.servers import eventually

pytestmark = pytest.mark.long  # each starts a server

# Bytes

FIELD = b"a: " + b"x" * 100 + b"\r\n"
OVER = HEAD_BYTES + 2 * PIECE_BYTES
"""Where every request is refused at the latest: a piece counts when it is parsed."""
ENDLESS = {
    "many fields": (b"GET /" + HOST, FIELD),
    "small fields": (b"GET /" + HOST, b"a:\r\n"),
    "one value": (b"GET /" + HOST + b"a: ", b"x"),
    "one name": (b"GET /" + HOST, b"x"),
    "a path": (b"GET /", b"x"),
    "a query": (b"GET /verify?", b"permission=A&"),
    "an unknown method's path": (b"FOO /", b"x"),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", FIELD),
    "one trailer": (CHUNKED + b"1\r\nx\r\n0\r\na: ", b"x"),
    "a chunk's extension": (CHUNKED + b"1;a=", b"x"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_request_that_does_not_end_is_refused(kind: str) -> None:
    """431 when 64 KiB are counted, and two pieces of 4 KiB later at most, whatever grows."""
    start, more = ENDLESS[kind]
    with connected(Patient) as (line, _):
        line.sendall(start + more * (OVER // len(more) + 1))
        answer = parse_response(rest_of(line))
    assert answer.status == 431
    assert answer.body == (
        b'{"error":"request_header_fields_too_large","error_description":'
        b'"The request line and the header fields are too large"}'
    )
    assert dict(answer.headers)[b"content-length"] == b"%d" % len(answer.body)


@pytest.mark.parametrize("kind", ["many fields", "one value", "a path", "trailers"])
def test_uvicorns_own_protocol_takes_what_does_not_end(kind: str) -> None:
    """The broken twin: sixteen times as much, and it waits for more."""
    start, more = ENDLESS[kind]
    with connected(HttpToolsProtocol) as (line, _):
        line.sendall(start + more * (16 * HEAD_BYTES // len(more)))
        assert is_silent(line, 0.3)


def head_of(size: int) -> bytes:
    """A request whose target and fields count so many bytes, each field with four between."""
    fields = b"Host: test\r\na: "
    used = len(b"/") + len(b"Hosttest") + 4 + len(b"a") + 4
    return b"GET / HTTP/1.1\r\n" + fields + b"x" * (size - used) + b"\r\n\r\n"


@pytest.mark.parametrize("ahead", [b"", GET])
def test_64_kib_are_within_the_limit(ahead: bytes) -> None:
    """And one byte more is not, also behind another request."""
    with connected(Patient) as (line, address):
        line.sendall(ahead + head_of(HEAD_BYTES))
        expected = [200] * (1 + len(ahead) // len(GET))
        assert answers_to(line, len(expected)) == expected
        with socket.create_connection(address) as another:
            another.sendall(ahead + head_of(HEAD_BYTES + 1))
            assert statuses(rest_of(another))[-1:] == [431]


def test_bodies_count_for_nothing() -> None:
    """A hundred requests with bodies, in chunks and with lengths, on one connection: what the app
    may read is for the app to say."""
    chunks = b"".join(b"%x\r\n" % len(FIELD) + FIELD + b"\r\n" for _ in range(2_000))
    request = CHUNKED + chunks + b"0\r\n\r\n"
    with connected(Patient) as (line, _):
        for _ in range(3):
            line.sendall(request)
            assert line.recv(65536).startswith(b"HTTP/1.1 200")
        line.sendall(b"POST /" + HOST + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000)
        assert line.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_client_that_goes_on_sending_reads_the_error_all_the_same() -> None:
    """The connection is not reset while half a megabyte more is on its way."""
    with connected(Patient) as (line, _):
        line.sendall(b"GET /" + HOST + b"a: " + b"x" * OVER)
        for _ in range(64):
            line.sendall(b"x" * 8192)
        assert statuses(rest_of(line)) == [431]


def test_the_answers_to_requests_before_it_come_first() -> None:
    """In the order of the requests, also if they take their time; then the error, then the end."""
    app = App(may_answer=threading.Event())
    with connected(Patient, app) as (line, _):
        line.sendall(GET * 3 + b"GET /" + HOST + b"a: " + b"x" * OVER)
        eventually(lambda: len(app.received) == 1)
        cast(threading.Event, app.may_answer).set()
        assert statuses(rest_of(line)) == [200, 200, 200, 431]


# Requests that wait


class Counted:
    """Notes how many requests wait behind the one that is answered."""

    most: ClassVar[int] = 0

    def _start_asgi_task(self, *given: Any) -> None:
        Counted.most = max(Counted.most, len(self.pipeline))  # type: ignore[attr-defined]
        super()._start_asgi_task(*given)  # type: ignore[misc]


class CountedWithin(Counted, Patient):
    pass


class CountedTwin(Counted, HttpToolsProtocol):
    pass


def most_waiting(http: Any, requests: int) -> int:
    Counted.most = 0
    with connected(http) as (line, _):
        sender = threading.Thread(target=line.sendall, args=(GET * requests,))
        sender.start()
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < requests:
            received += line.recv(65536)
        sender.join()
    return Counted.most


def test_few_requests_of_a_connection_wait_at_once() -> None:
    """All 20,000 that are sent at once are answered, and no more than fit into a piece wait: the
    others are bytes. uvicorn's own protocol makes a request of each as soon as it is read."""
    requests = 20_000
    in_a_piece = PIECE_BYTES // len(GET) + 1
    assert most_waiting(CountedWithin, requests) <= in_a_piece
    assert most_waiting(CountedTwin, requests) > 10 * in_a_piece


def test_bodies_of_requests_that_wait_arrive() -> None:
    """A request behind another, its body cut anywhere."""
    whole = (WITH_BODY + b"some body") * 50 + GET
    for size in (1, 7, 64, 1000):
        with connected(Patient) as (line, _):
            for at in range(0, len(whole), size):
                line.sendall(whole[at : at + size])
            assert answers_to(line, 51) == [200] * 51


# Time


@pytest.mark.parametrize("start", [b"G", b"F", b"GET", b"GET / HTTP/1.1\r\n", GET + b"GET /"])
def test_a_head_has_to_arrive_in_time(start: bytes) -> None:
    """408 to what has begun; requests before it are answered."""
    with connected(hasty(head_seconds=0.1)) as (line, _):
        line.sendall(start)
        raw = rest_of(line)
    assert statuses(raw) == [200] * start.count(GET) + [408]
    assert raw.endswith(
        b'{"error":"request_timeout","error_description":"The request did not arrive in time"}'
    )


def test_time_is_counted_from_the_first_byte() -> None:
    """A byte now and then gains nothing."""
    with connected(hasty(head_seconds=0.3)) as (line, _):
        with contextlib.suppress(ConnectionError):
            for byte in GET[:-1]:
                line.sendall(bytes([byte]))
                if not is_silent(line, 0.05):
                    break
        assert statuses(rest_of(line)) == [408]


def test_a_silent_client_gets_no_response() -> None:
    """A connection on which nothing was ever sent is closed."""
    with connected(hasty(head_seconds=0.1)) as (line, _):
        assert rest_of(line) == b""


def test_a_body_has_to_arrive_in_time() -> None:
    """408, and the app that waits for it gets http.disconnect."""
    app = App()
    with connected(hasty(body_seconds=0.1), app) as (line, _):
        line.sendall(WITH_BODY + b"some")
        assert statuses(rest_of(line)) == [408]
    assert app.received[-1] == "http.disconnect"


def test_a_body_that_no_app_reads_has_to_arrive_in_time_as_well() -> None:
    """The request is answered, and the connection closed without a second answer."""
    with connected(hasty(body_seconds=0.1), App(is_reading=False)) as (line, _):
        line.sendall(WITH_BODY + b"some")
        assert statuses(rest_of(line)) == [200]


def test_a_connection_may_be_idle_for_so_long() -> None:
    """Between two requests; then it is closed."""
    with connected(hasty(idle_seconds=0.1)) as (line, _):
        line.sendall(GET)
        assert statuses(rest_of(line)) == [200]


@pytest.mark.parametrize("start", [b"", b"GET /", WITH_BODY + b"some"])
def test_uvicorns_own_protocol_waits(start: bytes) -> None:
    """The broken twin, whose one limit is for idle connections."""
    with connected(HttpToolsProtocol) as (line, _):
        line.sendall(start)
        assert is_silent(line, 0.3)


def test_the_time_of_an_app_is_its_own() -> None:
    """A request that is complete is answered, however long that takes."""
    app = App(may_answer=threading.Event())
    short = dict.fromkeys(("head", "body", "idle", "answer", "linger"), 0.05)
    protocol = hasty(**{f"{name}_seconds": seconds for name, seconds in short.items()})
    with connected(protocol, app) as (line, _):
        line.sendall(WITH_BODY + b"some body")
        eventually(lambda: "http.request" in app.received)
        assert is_silent(line, 0.3)
        cast(threading.Event, app.may_answer).set()
        assert statuses(rest_of(line)) == [200]


@dataclass
class Streaming:
    """Answers with 32 MiB, more than the kernel takes of an answer that is not read."""

    is_over: threading.Event = field(default_factory=threading.Event)
    size: ClassVar[int] = 32 * 1024 * 1024

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(self.size // 65536):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await send({"type": "http.response.body"})
        self.is_over.set()


def test_an_answer_has_to_be_read() -> None:
    """A client that does not read is cut off; one that does has the whole answer."""
    app = Streaming()
    with connected(hasty(answer_seconds=0.1), app) as (line, _):
        line.sendall(GET)
        eventually(app.is_over.is_set)
        assert len(rest_of(line)) < app.size
    with connected(Patient, app) as (line, _):
        line.sendall(b"GET /" + HOST + b"Connection: close\r\n\r\n")
        assert len(rest_of(line)) > app.size


def test_uvicorns_own_protocol_waits_for_a_reader() -> None:
    """The broken twin: its app waits as long as the client likes."""
    app = Streaming()
    with connected(HttpToolsProtocol, app) as (line, _):
        line.sendall(GET)
        assert not app.is_over.wait(0.5)


# Methods


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("method", [b"FOO", b"GET", b"G", b"GETS", b"M-SEARCH", b"PROPFIND", b"!"])
def test_a_method_arrives_in_pieces(method: bytes, size: int) -> None:
    """Any one, on one connection with others, blank lines before it included."""
    with connected(Patient) as (line, _):
        for each in (method, b"GET", method, b"BAR"):
            request = b"\r\n" + each + b" /" + HOST + b"\r\n"
            for at in range(0, len(request), size):
                line.sendall(request[at : at + size])
            answer = b""
            while not answer.endswith(b"\r\n\r\n" + each):
                answer += line.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "nonsense",
    [
        b"FOO\r\n\r\n",
        b"G@T / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00 \r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"x" * 65 + b" / HTTP/1.1\r\n\r\n",
        b"FOO nowhere HTTP/1.1\r\n\r\n",
        b"FOO / HTTP/3.1\r\n\r\n",
    ],
)
def test_what_is_no_request_is_400(nonsense: bytes) -> None:
    """In the house's form, and the connection ends."""
    with connected(Patient) as (line, _):
        line.sendall(nonsense)
        answer = parse_response(rest_of(line))
    assert (answer.status, answer.body) == (
        400,
        b'{"error":"invalid_request","error_description":"Invalid HTTP request received."}',
    )


# Lines of the log


def lines_of(caplog: pytest.LogCaptureFixture, times: int, request: bytes, http: Any) -> int:
    """How many lines so many such requests write."""
    with connected(http) as (line, address):
        caplog.clear()
        for _ in range(times):
            with socket.create_connection(address) as line:
                line.settimeout(30)
                line.sendall(request)
                line.recv(65536)
    return len([each for each in caplog.records if each.levelno >= logging.WARNING])


UPGRADE = b"GET /" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.mark.parametrize("request_", [b"x\r\n\r\n", UPGRADE], ids=["no HTTP", "an upgrade"])
def test_a_hundred_requests_write_seven_lines_at_most(
    caplog: pytest.LogCaptureFixture, request_: bytes
) -> None:
    """Where uvicorn's own protocol writes one or two for each."""
    assert lines_of(caplog, 100, request_, Patient) <= 7
    assert lines_of(caplog, 100, request_, HttpToolsProtocol) >= 100
