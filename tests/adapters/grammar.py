"""One grammar on every server: the same bytes sent to seven real servers, and one answer.

    python -m tests.adapters.grammar

The law of this file: what is expected is written down, byte for byte, in one table. A cell is the
answer of `bad-inputs.md`, or the table names what this one server does instead, and why; nothing
forgives a server in general, so one that changes its mind in a new version is noticed. Where a
server refuses by itself (`Own`), the app was never called.
"""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Final, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from keylatch.core.tokens import MacKeys
from keylatch.engine import Engine
from keylatch.settings import Settings
from tests.support.raw_http import Header, RawResponse, exchange, expected_response
from tests.support.servers import eventually, free_port

ROOT = Path(__file__).parents[2]

# What may come back


@dataclass(frozen=True)
class Passed:
    """The app was called and said this: whose key, bytes of body, header names with x."""

    key: str | None = "good"
    body_bytes: int = 0
    x: tuple[str, ...] = ()


@dataclass(frozen=True)
class Own:
    """The server refused by itself, with this status."""

    status: int


Expected: TypeAlias = RawResponse | Passed | Own

NO_ANSWER: Final = RawResponse(0, (), b"")


def refusal(status: int, error: bytes, words: bytes, challenge: bytes) -> RawResponse:
    """A refusal as `bad-inputs.md` has it."""
    body = b'{"error":"' + error + b'","error_description":"' + words + b'"}'
    headers = {
        b"content-type": b"application/json",
        b"cache-control": b"no-store",
        b"x-keylatch-error": error,
        b"www-authenticate": b'Bearer realm="keylatch"' + challenge,
    }
    return expected_response(status, headers, body)


def refused(status: int, error: bytes, words: bytes, scope: bytes = b"") -> RawResponse:
    """A refusal whose challenge names its error."""
    return refusal(status, error, words, b', error="' + error + b'"' + scope)


ONE_HEADER: Final = b"Send exactly one Authorization header of the form: Bearer <key>"
A0: Final = refusal(401, b"unauthorized", b"Send an API key: Authorization: Bearer <key>", b"")
A1: Final = refused(400, b"invalid_request", ONE_HEADER)
A2: Final = refused(401, b"invalid_token", b"The API key is not valid")
A3: Final = refused(403, b"insufficient_scope", b"The API key may not do this", b', scope="FULL"')
GOOD: Final = Passed()
SENDING: Final = Passed("sending")
NO_PRINCIPAL: Final = Passed(None)

# Who answers


@dataclass(frozen=True)
class Server:
    """A server, how it is started, and the packages that it takes."""

    name: str
    app: str
    command: str
    packages: tuple[str, ...]


H11: Final = Server(
    "uvicorn h11",
    "asgi",
    "uvicorn tests.support.worker_grammar:{app} --port {port} --http h11",
    ("uvicorn", "h11"),
)
HTTPTOOLS: Final = Server(
    "uvicorn httptools",
    "asgi",
    "uvicorn tests.support.worker_grammar:{app} --port {port} --http httptools",
    ("uvicorn", "httptools"),
)
HYPERCORN: Final = Server(
    "hypercorn",
    "asgi",
    "hypercorn tests.support.worker_grammar:{app} --bind 127.0.0.1:{port}",
    ("hypercorn",),
)
GRANIAN: Final = Server(
    "granian",
    "asgi",
    "granian tests.support.worker_grammar:{app} --port {port} --interface asgi",
    ("granian",),
)
GRANIAN_WSGI: Final = Server(
    "granian WSGI",
    "wsgi",
    "granian tests.support.worker_grammar:{app} --port {port} --interface wsgi",
    ("granian",),
)
GUNICORN: Final = Server(
    "gunicorn",
    "wsgi",
    "gunicorn tests.support.worker_grammar:{app} --bind 127.0.0.1:{port}",
    ("gunicorn",),
)
WAITRESS: Final = Server(
    "waitress",
    "wsgi",
    "waitress --listen 127.0.0.1:{port} tests.support.worker_grammar:{app}",
    ("waitress",),
)
SERVERS: Final = (H11, HTTPTOOLS, HYPERCORN, GRANIAN, GRANIAN_WSGI, GUNICORN, WAITRESS)

# What is sent

Answers: TypeAlias = Expected | tuple[Expected, ...]
Exceptions: TypeAlias = Mapping[Server, Answers]

TOKEN_BYTES: Final = len("kl_live_") + 12 + len("_") + 41
KEY: Final = b"Authorization: Bearer {good}"
SMALL_KEY: Final = b"Authorization: Bearer {sending}"
UNKNOWN_KEY: Final = b"Authorization: Bearer letmein"
EVIL: Final = b": key_evil"


@dataclass(frozen=True)
class Case:
    """What is sent on one connection, and what comes back.

    Args:
        name: says what is special about it.
        requests: one after the other, without waiting; `{good}` is replaced by the good key.
        expected: one answer, or one for each request.
        but: what single servers do instead.
        why: the reason of these exceptions.
        continued: sent when the server has said `100 Continue`.
    """

    name: str
    requests: bytes | tuple[bytes, ...]
    expected: Answers
    but: Exceptions = field(default_factory=dict)
    why: str = ""
    continued: bytes = b""

    def on(self, server: Server) -> tuple[Expected, ...]:
        """What this server answers."""
        answers = self.but.get(server, self.expected)
        return answers if isinstance(answers, tuple) else (answers,)

    @property
    def sent(self) -> tuple[bytes, ...]:
        """The requests, one by one."""
        return self.requests if isinstance(self.requests, tuple) else (self.requests,)


def http(
    start: bytes,
    *fields: bytes,
    body: bytes = b"",
    version: bytes = b"HTTP/1.1",
    last: bool = True,
) -> bytes:
    """A request, after which the server closes the connection if it is the last one."""
    ending = (b"Connection: close",) if last else ()
    return b"\r\n".join([start + b" " + version, b"Host: test", *fields, *ending, b"", body])


def get(*fields: bytes, last: bool = True) -> bytes:
    return http(b"GET /", *fields, last=last)


def value(text: bytes) -> bytes:
    """A request with this value of `Authorization`."""
    return get(b"Authorization: " + text)


def post(*fields: bytes, body: bytes, last: bool = True) -> bytes:
    length = len(body.replace(b"{good}", b"k" * TOKEN_BYTES))
    return http(b"POST /", b"Content-Length: %d" % length, *fields, body=body, last=last)


def chunked(*fields: bytes, body: bytes, last: bool = True) -> bytes:
    return http(b"POST /", b"Transfer-Encoding: chunked", *fields, body=body, last=last)


def padded(size: int) -> bytes:
    """A good key in a value of this many bytes."""
    return b"Bearer" + b" " * (size - len(b"Bearer") - TOKEN_BYTES) + b"{good}"


def on(answers: Answers, *servers: Server) -> dict[Server, Answers]:
    """The same exception for several servers."""
    return dict.fromkeys(servers, answers)


HELLO: Final = b"5\r\nhello\r\n0\r\n\r\n"

NO_PIPELINE: Final = "its sync workers answer one request on a connection and close it"
LF_ENDS_A_LINE: Final = "the others end a line at a bare LF, which RFC 9112 section 2.2 allows"
NO_CONTROLS: Final = "they refuse control characters in a value"
EMPTIED: Final = "it hands over an empty value in place of bytes that are not ASCII"
FOLDED: Final = "the others join obsolete folds, as RFC 9112 section 5.2 lets them"
TARGET: Final = "they leave the target as it is: it is no path, and nothing is public there"

GOOD_KEYS: Final = (
    Case("a good key", get(KEY), GOOD),
    Case("field name in lower case", get(b"authorization: Bearer {good}"), GOOD),
    Case("field name in upper case", get(b"AUTHORIZATION: Bearer {good}"), GOOD),
    Case("scheme in lower case", value(b"bearer {good}"), GOOD),
    Case("scheme in mixed case", value(b"bEARER {good}"), GOOD),
    Case("no blank behind the colon", get(b"Authorization:Bearer {good}"), GOOD),
    Case("several spaces", value(b"Bearer     {good}"), GOOD),
    Case("spaces and tabs around", value(b"\t  Bearer {good} \t "), GOOD),
    Case("a value of 512 bytes", value(padded(512)), GOOD),
    Case("OPTIONS with a key", http(b"OPTIONS /", KEY), GOOD),
    Case("HEAD with a key", http(b"HEAD /", KEY), GOOD),
    Case("HTTP/1.0", http(b"GET /", KEY, version=b"HTTP/1.0"), GOOD),
    Case(
        "HTTP/1.1 without Host",
        b"GET / HTTP/1.1\r\n" + KEY + b"\r\nConnection: close\r\n\r\n",
        GOOD,
        on(Own(400), H11, HYPERCORN),
        "h11 demands a Host (RFC 9112 section 3.2)",
    ),
    Case("target in absolute form", http(b"GET http://test/", KEY), GOOD),
)

NO_KEYS: Final = (
    Case("no Authorization", get(), A0),
    Case("empty", get(b"Authorization:"), A0),
    Case("blank", value(b" \t "), A0),
    Case("Basic", value(b"Basic dXNlcjpwYXNz"), A0),
    Case("a key without a scheme", value(b"{good}"), A0),
    Case("key in the query", http(b"GET /?access_token={good}"), A0),
    Case("key in a cookie", get(b"Cookie: Authorization=Bearer {good}"), A0),
    Case("key in the body", post(body=b"access_token={good}"), A0),
    Case("Proxy-Authorization", get(b"Proxy-Authorization: Bearer {good}"), A0),
    Case("HTTP_AUTHORIZATION", get(b"HTTP_AUTHORIZATION: Bearer {good}"), A0),
    Case("OPTIONS without a key", http(b"OPTIONS /"), A0),
    Case("OPTIONS *", http(b"OPTIONS *"), A0),
    Case("HTTP/1.0 without a key", http(b"GET /", version=b"HTTP/1.0"), A0),
    Case(
        "key in a trailer",
        chunked(body=b"5\r\nhello\r\n0\r\n" + KEY + b"\r\n\r\n"),
        A0,
        {HTTPTOOLS: Passed(body_bytes=5)},
        "it puts trailers among the headers (against RFC 9110 section 6.5.1), before the app runs",
    ),
)

MALFORMED: Final = (
    Case("two equal fields", get(KEY, KEY), A1),
    Case("two unequal fields", get(KEY, SMALL_KEY), A1),
    Case("Basic field, then Bearer", get(b"Authorization: Basic dXNlcjpwYXNz", KEY), A1),
    Case("Bearer field, then Basic", get(KEY, b"authorization: Basic dXNlcjpwYXNz"), A1),
    Case("empty field, then Bearer", get(b"Authorization:", KEY), A1),
    Case("Bearer field, then empty", get(KEY, b"Authorization:"), A1),
    Case("two keys, comma", value(b"Bearer {good},Bearer {good}"), A1),
    Case("two keys, comma and space", value(b"Bearer {good}, Bearer {sending}"), A1),
    Case("comma behind", value(b"Bearer {good},"), A1),
    Case("comma before", value(b",Bearer {good}"), A1),
    Case("two keys, space", value(b"Bearer {good} {good}"), A1),
    Case("Bearer alone", value(b"Bearer"), A1),
    Case("tab as separator", value(b"Bearer\t{good}"), A1),
    Case("space and tab as separator", value(b"Bearer \t{good}"), A1),
    Case("quoted key", value(b'Bearer "{good}"'), A1),
    Case("quoted value", value(b"'Bearer {good}'"), A1),
    Case("percent-encoded key", value(b"Bearer %41{good}"), A1),
    Case("semicolon behind", value(b"Bearer {good};"), A1),
    Case("a value of 513 bytes", value(padded(513)), A1),
    Case("8 KiB of Basic", value(b"Basic " + b"a" * 8000), A1),
    Case(
        "more than 8 KiB",
        value(b"Bearer " + b"a" * 8192),
        A1,
        {GUNICORN: Own(431)},
        "its limit is 8190 bytes for a field",
    ),
    Case(
        "2 MiB",
        value(b"Bearer " + b"a" * 2**21),
        A1,
        {H11: Own(400)} | on(Own(431), HYPERCORN, GRANIAN, GRANIAN_WSGI, GUNICORN, WAITRESS),
        "only httptools has no limit of its own",
    ),
)

FOREIGN_BYTES: Final = (
    Case("0x80 behind", value(b"Bearer {good}\x80"), A1, {GRANIAN_WSGI: A0}, EMPTIED),
    Case("0xFF before", value(b"\xffBearer {good}"), A1, {GRANIAN_WSGI: A0}, EMPTIED),
    Case("Latin-1 NBSP as separator", value(b"Bearer\xa0{good}"), A1, {GRANIAN_WSGI: A0}, EMPTIED),
    Case("UTF-8 NBSP before", value(b"\xc2\xa0Bearer {good}"), A1, {GRANIAN_WSGI: A0}, EMPTIED),
    Case("Latin-1 NEL behind", value(b"Bearer {good}\x85"), A1, {GRANIAN_WSGI: A0}, EMPTIED),
    *(
        Case(
            name,
            value(text),
            A1,
            on(Own(400), HTTPTOOLS, GRANIAN, GRANIAN_WSGI, GUNICORN, WAITRESS),
            NO_CONTROLS,
        )
        for name, text in (("DEL behind", b"Bearer {good}\x7f"), ("ESC", b"Bearer \x1b{good}"))
    ),
    Case("vertical tab before", value(b"\x0bBearer {good}"), Own(400)),
    Case("\\f as separator", value(b"Bearer\x0c{good}"), Own(400)),
    Case("NUL behind", value(b"Bearer {good}\x00"), Own(400)),
    Case("NUL in another field", get(KEY, b"X-First: \x00"), Own(400)),
    Case("bare CR as separator", value(b"Bearer\r{good}"), Own(400)),
    Case("bare CR behind", value(b"Bearer {good}\r"), Own(400)),
    Case("space before the colon", get(b"Authorization : Bearer {good}"), Own(400)),
    Case("tab before the colon", get(b"Authorization\t: Bearer {good}"), Own(400)),
)

LINES: Final = (
    Case("bare LF as separator", value(b"Bearer\n{good}"), Own(400)),
    Case(
        "key behind a bare LF",
        get(b"X-First: 1\n" + KEY),
        Passed(x=("x-first",)),
        on(Own(400), HTTPTOOLS, GUNICORN, WAITRESS),
        LF_ENDS_A_LINE,
    ),
    Case(
        "second key behind a bare LF",
        get(KEY + b"\n" + KEY),
        A1,
        on(Own(400), HTTPTOOLS, GUNICORN, WAITRESS),
        LF_ENDS_A_LINE,
    ),
    Case(
        "identity behind a bare LF",
        get(KEY, b"X-First: 1\nX-Keylatch-Key-Id" + EVIL),
        Passed(x=("x-first",)),
        on(Own(400), HTTPTOOLS, GUNICORN, WAITRESS),
        LF_ENDS_A_LINE,
    ),
    Case(
        "fold as separator",
        value(b"Bearer\r\n {good}"),
        GOOD,
        on(Own(400), HTTPTOOLS, GRANIAN, GRANIAN_WSGI, GUNICORN),
        FOLDED,
    ),
    Case(
        "fold with a tab as separator",
        value(b"Bearer\r\n\t{good}"),
        GOOD,
        on(Own(400), HTTPTOOLS, GRANIAN, GRANIAN_WSGI, GUNICORN) | {WAITRESS: A1},
        FOLDED + "; waitress keeps the tab, h11 makes it a space",
    ),
    Case(
        "fold before",
        get(b"Authorization:\r\n Bearer {good}"),
        GOOD,
        on(Own(400), HTTPTOOLS, GRANIAN, GRANIAN_WSGI, GUNICORN),
        FOLDED,
    ),
    Case(
        "fold that hides the field",
        get(b"X-First: 1\r\n " + KEY),
        A0,
        on(Own(400), HTTPTOOLS, GRANIAN, GRANIAN_WSGI, GUNICORN),
        FOLDED,
    ),
    Case(
        "fold with a second key",
        get(KEY + b",\r\n Bearer {good}"),
        A1,
        on(Own(400), HTTPTOOLS, GRANIAN, GRANIAN_WSGI, GUNICORN),
        FOLDED,
    ),
)

POSING: Final = (
    b"X-Keylatch-Key-Id",
    b"X_Keylatch_Key_Id",
    b"x-KEYLATCH_key-ID",
    b"x_keylatch-organization_id",
    b"X-Keylatch-",
)

IDENTITY: Final = (
    *(
        Case(name.decode(), get(KEY, b"X-First: 1", name + EVIL), Passed(x=("x-first",)))
        for name in POSING
    ),
    Case(
        "all of them, and a neighbour",
        get(KEY, *(name + EVIL for name in POSING), b"X-Keylatcher: 1"),
        Passed(x=("x-keylatcher",)),
    ),
    Case("hyphens, then underscores", get(KEY, POSING[0] + EVIL, POSING[1] + EVIL), GOOD),
    Case("underscores, then hyphens", get(KEY, POSING[1] + EVIL, POSING[0] + EVIL), GOOD),
    Case("identity without a key", get(POSING[0] + EVIL), A0),
    Case("identity on a public path", http(b"GET /healthz", POSING[1] + EVIL), NO_PRINCIPAL),
    Case(
        "identity in a trailer",
        chunked(KEY, body=b"5\r\nhello\r\n0\r\n" + POSING[0] + EVIL + b"\r\n\r\n"),
        Passed(body_bytes=5),
    ),
    Case(
        "identity in a late trailer",
        chunked(KEY, b"Expect: 100-continue", body=b""),
        Passed(body_bytes=5),
        continued=b"5\r\nhello\r\n0\r\n" + POSING[0] + EVIL + b"\r\n\r\n",
    ),
)

TOKENS: Final = (
    Case("a wrong CRC", value(b"Bearer {with a wrong CRC}"), A2),
    Case("an unknown id", value(b"Bearer {of an unknown id}"), A2),
    Case("a revoked key", value(b"Bearer {revoked}"), A2),
    Case("a key for another environment", value(b"Bearer {for another environment}"), A2),
    Case("no keylatch key", value(b"Bearer letmein"), A2),
    Case("a token of 505 bytes", value(b"Bearer " + b"a" * 505), A2),
    Case("SENDING key on a FULL route", get(SMALL_KEY), A3),
    Case("HEAD without a key", http(b"HEAD /"), A0),
    Case("HEAD, malformed", http(b"HEAD /", b"Authorization: Bearer"), A1),
    Case("HEAD with a revoked key", http(b"HEAD /", b"Authorization: Bearer {revoked}"), A2),
    Case("HEAD with a SENDING key", http(b"HEAD /", SMALL_KEY), A3),
)

BODIES: Final = (
    Case("a body", post(KEY, body=b"hello"), Passed(body_bytes=5)),
    Case(
        "a chunked body",
        chunked(KEY, body=b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"),
        Passed(body_bytes=11),
    ),
    Case("a chunked body without a key", chunked(body=HELLO), A0),
    Case("a chunked body of an unknown key", chunked(UNKNOWN_KEY, body=HELLO), A2),
    Case(
        "a chunked body with a length",
        chunked(KEY, b"Content-Length: 3", body=HELLO),
        Passed(body_bytes=5),
        on(Own(400), HTTPTOOLS, GUNICORN),
        "they refuse what RFC 9112 section 6.3 lets the others read as chunked",
    ),
    Case(
        "a broken chunk without a key",
        chunked(body=b"zz\r\nhello\r\n0\r\n\r\n"),
        A0,
        on(Own(400), H11, HTTPTOOLS, HYPERCORN, WAITRESS),
        "they look at the body before they call the app",
    ),
    Case("a request as the body of a request", post(body=get(KEY)), A0),
)

PIPELINES: Final = (
    Case(
        "good, then an unknown key",
        (get(KEY, last=False), get(UNKNOWN_KEY)),
        (GOOD, A2),
        {GUNICORN: GOOD},
        NO_PIPELINE,
    ),
    Case(
        "an unknown key, then good",
        (get(UNKNOWN_KEY, last=False), get(KEY)),
        (A2, GOOD),
        {GUNICORN: A2},
        NO_PIPELINE,
    ),
    Case(
        "good, then no key",
        (get(KEY, last=False), get()),
        (GOOD, A0),
        {GUNICORN: GOOD},
        NO_PIPELINE,
    ),
    Case(
        "two fields, then good",
        (get(KEY, KEY, last=False), get(KEY)),
        (A1, GOOD),
        {GUNICORN: A1},
        NO_PIPELINE,
    ),
    Case(
        "refused HEAD, then good",
        (http(b"HEAD /", last=False), get(KEY)),
        (A0, GOOD),
        {GUNICORN: A0},
        NO_PIPELINE,
    ),
    Case(
        "refused chunks, then good",
        (chunked(body=HELLO, last=False), get(KEY)),
        (A0, GOOD),
        {GUNICORN: A0},
        NO_PIPELINE,
    ),
    Case(
        "refused request in a body, then none",
        (post(body=get(KEY), last=False), get()),
        (A0, A0),
        {GUNICORN: A0},
        NO_PIPELINE,
    ),
)

PATHS: Final = (
    Case("public path", http(b"GET /healthz"), NO_PRINCIPAL),
    Case("public path, HEAD", http(b"HEAD /healthz"), NO_PRINCIPAL),
    Case("public path, query", http(b"GET /healthz?x=1"), NO_PRINCIPAL),
    Case("public path, an unknown key", http(b"GET /healthz", UNKNOWN_KEY), NO_PRINCIPAL),
    Case("public path, good key", http(b"GET /healthz", KEY), NO_PRINCIPAL),
    Case("public path, percent-encoded", http(b"GET /%68ealthz"), NO_PRINCIPAL),
    Case("public path, slash behind", http(b"GET /healthz/"), A0),
    Case("public path, upper case", http(b"GET /HEALTHZ"), A0),
    Case("public path, %00 behind", http(b"GET /healthz%00"), A0),
    Case("public path, %0a behind", http(b"GET /healthz%0a"), A0),
    Case("public path, semicolon", http(b"GET /healthz;x"), A0),
    Case("public path by dots", http(b"GET /x/../healthz"), A0),
    Case("away from a public path by dots", http(b"GET /docs/../secret"), A0),
    Case("public parameter", http(b"GET /docs/gr%C3%BC%C3%9Fe"), NO_PRINCIPAL),
    Case("public parameter with %2F", http(b"GET /docs/a%2Fb"), A0),
    Case(
        "public path, two slashes",
        http(b"GET //healthz"),
        A0,
        {WAITRESS: NO_PRINCIPAL},
        "it makes one slash of them, for the app as well",
    ),
    Case(
        "public path, fragment",
        http(b"GET /healthz#x"),
        NO_PRINCIPAL,
        on(A0, H11, HYPERCORN),
        TARGET,
    ),
    Case(
        "public path, absolute form",
        http(b"GET http://test/healthz"),
        NO_PRINCIPAL,
        on(A0, H11, HYPERCORN),
        TARGET,
    ),
    Case("SENDING route", http(b"POST /v1/emails", SMALL_KEY, b"Content-Length: 0"), SENDING),
    Case("SENDING parameter", http(b"GET /v1/emails/7", SMALL_KEY), SENDING),
    Case("SENDING parameter, HEAD", http(b"HEAD /v1/emails/7", SMALL_KEY), SENDING),
    Case("SENDING parameter, UTF-8", http(b"GET /v1/emails/gr%C3%BC%C3%9Fe", SMALL_KEY), SENDING),
    Case("SENDING parameter, no UTF-8", http(b"GET /v1/emails/%FF", SMALL_KEY), A3),
    Case("SENDING parameter, %0a behind", http(b"GET /v1/emails/7%0a", SMALL_KEY), A3),
    Case("SENDING parameter, %25", http(b"GET /v1/emails/7%2541", SMALL_KEY), A3),
    Case("public path, POST", http(b"POST /healthz", b"Content-Length: 0"), A0),
    Case("public path, OPTIONS", http(b"OPTIONS /healthz"), A0),
    Case("SENDING parameter, %2F", http(b"GET /v1/emails/7%2F8", SMALL_KEY), A3),
    Case("SENDING parameter, dots", http(b"GET /v1/emails/%2e%2e/keys", SMALL_KEY), A3),
    Case("SENDING parameter, DELETE", http(b"DELETE /v1/emails/7", SMALL_KEY), A3),
    Case(
        "SENDING parameter, another method in a header",
        http(b"DELETE /v1/emails/7", SMALL_KEY, b"X-HTTP-Method-Override: GET"),
        A3,
    ),
    Case(
        "SENDING parameter, get",
        http(b"get /v1/emails/7", SMALL_KEY),
        A3,
        on(Own(400), HTTPTOOLS, GUNICORN, WAITRESS) | {HYPERCORN: SENDING},
        "methods have a letter case; hypercorn makes it GET, for the app as well",
    ),
    Case("a path that is not ASCII", http(b"GET /v1/emails/\xff", SMALL_KEY), Own(400)),
)

CASES: Final = (
    *GOOD_KEYS,
    *NO_KEYS,
    *MALFORMED,
    *FOREIGN_BYTES,
    *LINES,
    *IDENTITY,
    *TOKENS,
    *BODIES,
    *PIPELINES,
    *PATHS,
)


def is_read_differently(case: Case) -> bool:
    """Whether a request of it passes on one server and is refused by keylatch on another."""
    by_request = zip_longest(*map(case.on, SERVERS), fillvalue=Own(0))
    return any(
        len({isinstance(each, Passed) for each in expected if not isinstance(each, Own)}) > 1
        for expected in by_request
    )


# Sending it

_START: Final = re.compile(rb"HTTP/1\.[01] (\d{3})[^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")
_OF_THE_SERVER: Final = (b"connection", b"date", b"server", b"via")


@dataclass(frozen=True)
class Keys:
    """A store with keys of every kind in a folder."""

    folder: Path
    tokens: Mapping[str, str] = field(repr=False)

    @classmethod
    def minted(cls, folder: Path) -> "Keys":
        """Make the store and the keys."""
        return cls(folder, asyncio.run(_mint(_store_in(folder))))

    @property
    def environ(self) -> dict[str, str]:
        """What a server has to know of them."""
        return {
            **os.environ,
            "KEYLATCH_STORE": _store_in(self.folder),
            "KEYLATCH_REDIS": "",
            "KEYLATCH_HASHER": "sha256",
            "KEYLATCH_ENVIRONMENT": "live",
        }

    def fill(self, request: bytes) -> bytes:
        """The request with keys in their places."""
        for name, token in self.tokens.items():
            request = request.replace(b"{" + name.encode() + b"}", token.encode())
        return request

    def expected(self, expected: Expected, method: bytes) -> RawResponse | Own:
        """The answer as it comes over the wire: without its body for HEAD."""
        if isinstance(expected, Own):
            return expected
        whole = self._said(expected) if isinstance(expected, Passed) else expected
        return replace(whole, body=b"") if method == b"HEAD" else whole

    def _said(self, passed: Passed) -> RawResponse:
        key_id = passed.key and "key_" + self.tokens[passed.key].split("_")[2]
        said = {"key_id": key_id, "body_bytes": passed.body_bytes, "x": passed.x}
        return expected_response(
            200, {b"content-type": b"application/json"}, json.dumps(said).encode()
        )


def _store_in(folder: Path) -> str:
    return f"sqlite:///{folder}/keys.db"


async def _mint(store_url: str) -> dict[str, str]:
    engine = Engine(Settings.load(store=store_url, redis="", hasher="sha256"))
    keyring = await engine.keyring()
    created = {
        "good": await keyring.create("default", "good"),
        "sending": await keyring.create("default", "sending", permission="SENDING"),
        "for another environment": await keyring.create("default", "test", environment="test"),
        "revoked": await keyring.create("default", "revoked"),
    }
    await keyring.delete("default", created["revoked"].record.id)
    own_keys = MacKeys((await engine.store.open(0)).mac_keys)
    await engine.stop()
    tokens = {name: each.token.reveal() for name, each in created.items()}
    tokens["of an unknown id"] = own_keys.mint("kl", "live").reveal()
    tokens["with a wrong CRC"] = tokens["good"][:-1] + ("x" if tokens["good"][-1] != "x" else "y")
    return tokens


@dataclass(frozen=True)
class Cell:
    """What one server made of one case."""

    case: Case
    server: Server
    expected: tuple[RawResponse | Own, ...]
    got: tuple[RawResponse, ...]
    calls: int

    @property
    def wrong(self) -> str:
        """What is wrong with it; empty if nothing is."""
        allowed = sum(isinstance(each, Passed) for each in self.case.on(self.server))
        if self.calls != allowed:
            return f"{self.case.name}: the app was called {self.calls} times, not {allowed}"
        if len(self.got) == len(self.expected) and all(map(_matches, self.got, self.expected)):
            return ""
        expected, got = (", then ".join(map(_in_full, each)) for each in (self.expected, self.got))
        return f"{self.case.name}: expected {expected}; got {got}"

    def __str__(self) -> str:
        return " + ".join(map(_in_short, self.got))


def _matches(got: RawResponse, expected: RawResponse | Own) -> bool:
    if isinstance(expected, Own):
        return got.status == expected.status and b"x-keylatch-error" not in dict(got.headers)
    return got == expected


def _in_full(got: RawResponse | Own) -> str:
    if isinstance(got, Own):
        return f"the server's own {got.status}"
    headers = b", ".join(map(b": ".join, got.headers))
    return f"{got.status} [{headers.decode('latin-1')}] {got.body.decode('latin-1')!r}"


def _in_short(got: RawResponse) -> str:
    error = dict(got.headers).get(b"x-keylatch-error")
    if error is not None:
        return f"{got.status} {error.decode()}"
    if got.status == 0:
        return "no HTTP" if got.body else "no answer"
    return "200" if got.status == 200 else f"own {got.status}"


def answers_in(received: bytes, methods: Sequence[bytes]) -> tuple[RawResponse, ...]:
    """Take apart what came on one connection; what is left over counts as one more answer."""
    found: list[RawResponse] = []
    while received:
        start = _START.match(received)
        if start is None:
            return (*found, RawResponse(0, (), received))
        headers = _headers(start[2])
        received = received[start.end() :]
        if start[1].startswith(b"1"):
            continue
        is_head = methods[len(found) : len(found) + 1] == [b"HEAD"]
        length = 0 if is_head else int(dict(headers).get(b"content-length", len(received)))
        found.append(RawResponse(int(start[1]), headers, received[:length]))
        received = received[length:]
    return tuple(found) or (NO_ANSWER,)


def _headers(lines: bytes) -> tuple[Header, ...]:
    """Header fields in alphabetical order, without those that are the server's own affair."""
    fields = [line.partition(b":") for line in lines.splitlines()]
    headers = [(name.lower(), value.strip()) for name, _, value in fields]
    return tuple(sorted(header for header in headers if header[0] not in _OF_THE_SERVER))


class Served:
    """A protected app on a running server."""

    def __init__(self, server: Server, keys: Keys, port: int, calls: Path) -> None:
        self._server = server
        self._keys = keys
        self._port = port
        self._calls = calls

    def is_ready(self) -> bool:
        return self._converse(http(b"GET /healthz")).startswith(b"HTTP/1.1 200")

    def run_case(self, case: Case) -> Cell:
        """Send a case and look at what comes back and whether the app was called."""
        before = self._calls.stat().st_size
        methods = [request.split(b" ")[0] for request in case.sent]
        received = self._converse(*map(self._keys.fill, (b"".join(case.sent), case.continued)))
        return Cell(
            case,
            self._server,
            tuple(map(self._keys.expected, case.on(self._server), methods)),
            answers_in(received, methods),
            self._calls.stat().st_size - before,
        )

    def _converse(self, request: bytes, continued: bytes = b"") -> bytes:
        """What comes back until the server closes; nothing where it does not answer or close."""
        with contextlib.suppress(OSError):
            if not continued:
                return exchange(f"http://127.0.0.1:{self._port}", request)
            with socket.create_connection(("127.0.0.1", self._port), timeout=10) as connection:
                connection.sendall(request)
                received = connection.recv(65536)
                connection.sendall(continued)
                while piece := connection.recv(65536):
                    received += piece
                return received
        return b""


@contextlib.contextmanager
def serving(server: Server, keys: Keys, app: str = "") -> Iterator[Served]:
    """The server with the app of `worker_grammar` that is meant for it, or with another one."""
    port = free_port()
    calls, log = keys.folder / f"{port}.calls", keys.folder / f"{port}.log"
    command = server.command.format(app=app or server.app, port=port).split()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=keys.environ | {"GRAMMAR_CALLS": str(calls)},
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
    try:
        served = Served(server, keys, port, calls)
        eventually(lambda: served.is_ready() or process.poll() is not None)
        assert process.poll() is None, f"{server.name} did not start: {log.read_text()}"
        yield served
    finally:
        process.terminate()
        process.wait(20)


# Showing it


def main() -> int:
    """Ask every server everything; 1 if a cell is wrong."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=230)
    with tempfile.TemporaryDirectory() as folder:
        cells = _all_cells(Keys.minted(Path(folder)), console)
    console.print(_table(cells))
    for case in CASES:
        if case.but:
            servers = ", ".join(server.name for server in case.but)
            console.print(f"[bold]{case.name}[/] on {servers}: {case.why}")
    wrong = [cell for cell in cells if cell.wrong]
    for cell in wrong:
        console.print(f"{cell.server.name}: {cell.wrong}", style="red", markup=False)
    excepted = sum(cell.server in cell.case.but for cell in cells)
    console.print(f"{len(cells):,} cells, {excepted} of them exceptions, {len(wrong)} wrong")
    return 1 if wrong else 0


def _all_cells(keys: Keys, console: Console) -> list[Cell]:
    cells = []
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(SERVERS) * len(CASES))
        for server in SERVERS:
            progress.update(task, description=server.name)
            with serving(server, keys) as served:
                for case in CASES:
                    cells.append(served.run_case(case))
                    progress.advance(task)
    return cells


def _table(cells: Sequence[Cell]) -> Table:
    table = Table(
        Column("case", no_wrap=True), *(server.name for server in SERVERS), box=SIMPLE_HEAD
    )
    for case in CASES:
        row = [cell for cell in cells if cell.case is case]
        table.add_row(case.name, *map(_shown, row))
    return table


def _shown(cell: Cell) -> str:
    if cell.wrong:
        return f"[red]{cell}[/]"
    return f"[yellow]{cell}[/]" if cell.server in cell.case.but else str(cell)


if __name__ == "__main__":
    sys.exit(main())
