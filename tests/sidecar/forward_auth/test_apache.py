"""Apache httpd with the files in `deploy/apache`: a Lua hook calls the sidecar."""

import contextlib
import json
import os
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.proxies import (
    FaultInjector,
    Kind,
    ProxyStack,
    assert_same_refusal,
    assert_unavailable,
    auth_header,
    echoed,
    exchange_until_idle,
    faulty_proxy,
    header_dict,
    identity,
    identity_of,
    running_proxy,
    values_of,
)
from tests.support.proxy_contract import NAMED, PATIENCE_SECONDS, ProxyContract
from tests.support.raw_http import exchange, parse_response, send
from tests.support.servers import eventually, require_program

KIND = Kind(
    name="apache",
    program="apache2",
    package="apache2",
    command=["-f", "{folder}/apache.conf", "-D", "FOREGROUND"],
    check=["-f", "{folder}/apache.conf", "-S"],  # `-t` has something to say when all is well
    files=["apache.conf", "keylatch.lua"],
    folders=["/var/log/apache2"],
    files_named=["/etc/apache2/keylatch.lua", "/run/apache2.pid"],
    unix_format="{}",
    only_root=r"(User|Group) ",
)
ALLOW = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + NAMED + b"\r\n"


@pytest.fixture(scope="module", autouse=True)
def _luasocket() -> None:
    found = next(Path("/usr/lib").glob("**/lua/5.3/socket/core.so"), None)
    require_program(str(found) if found else None, "lua-socket")


class TestApache(ProxyContract):
    """All that a proxy promises."""

    passes_429: ClassVar[bool] = True


def also(*lines: str) -> dict[str, str]:
    """More lines for the configuration, as an operator may add them."""
    return {"ServerName localhost": "\n".join(["ServerName localhost", *lines])}


def module(name: str) -> str:
    """The line that loads one of Debian's modules."""
    return f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so"


ONE_PROCESS = also("ServerLimit 1", "StartServers 1", "MaxRequestWorkers 25")


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("/v1/../me", "/me"),
        ("/v1/%2e%2E/me", "/me"),
        ("//v1//me", "/v1/me"),
        ("/v1/./me", "/v1/me"),
        ("/v1/a%2Fb", "/v1/a%2Fb"),
        ("/v1/a%20b%3Fc", "/v1/a%20b%3Fc"),
        ("/v1/a..b;c=d", "/v1/a..b;c=d"),
        ("http://other.test/v1/me", "/v1/me"),
    ],
)
def test_the_app_gets_one_spelling_of_a_path(proxy: ProxyStack, path: str, seen: str) -> None:
    """Dots and double slashes are gone, and a slash that is encoded stays so. For a FULL key only:
    another spelling than the table's needs FULL."""
    assert echoed(proxy.request(f"GET {path}".encode(), auth_header(proxy.full)))["path"] == seen


@pytest.mark.parametrize(
    "mistake",
    [
        {"local path = r.unparsed_uri": "local path = r.no_such_thing"},
        {
            "local function ask(question)": "local function ask(question) error('a mistake') end\n"
            "local function no_more(question)"
        },
        {
            "local function ask(question)": "local function ask(question) return {} end\n"
            "local function no_more(question)"
        },
        {
            "local function ask(question)": "local function ask(question) error() end\n"
            "local function no_more(question)"
        },
        {"local PATIENCE_SECONDS = 1": "local PATIENCE_SECONDS = nil"},
    ],
)
def test_a_mistake_in_lua_is_503(proxy: ProxyStack, mistake: dict[str, str]) -> None:
    """In the words of a sidecar that is down; for longer than there are threads to use up."""
    count_before = proxy.app.request_count
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        for _ in range(60):
            assert_unavailable(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
    assert proxy.app.request_count == count_before


@pytest.mark.parametrize(
    "mistake",
    [
        {"function keylatch(r)": "function keylatch(r"},
        {"function keylatch(r)": "function another(r)"},
        {'require "socket.unix"': 'require "no.such.module"'},
        {"return refuse(r, verdict)": "error('a mistake')"},
    ],
)
def test_a_lua_that_cannot_run_closes_everything(
    proxy: ProxyStack, mistake: dict[str, str]
) -> None:
    """500, as without LuaSocket: public routes too."""
    count_before = proxy.app.request_count
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        for _ in range(60):
            assert send(other.url, b"GET /v1/me").status == 500
    assert proxy.app.request_count == count_before


def test_a_new_virtual_host_is_closed_until_it_is_opened(proxy: ProxyStack) -> None:
    """The hooks are the whole server's, whatever host and path are added."""
    lines = ["<VirtualHost *>", "ServerName new.test", "</VirtualHost>"]
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, also(*lines)) as other:
        assert send(other.url, b"GET /new").status == 401
        assert send(other.url, b"GET /new", auth_header(proxy.sender)).status == 403
        assert echoed(send(other.url, b"GET /new", auth_header(proxy.full)))["path"] == "/new"


def test_two_credentials_come_as_one_that_is_refused(proxy: ProxyStack) -> None:
    """Apache joins them with a comma: the sidecar gets both."""
    with faulty_proxy(proxy) as (injector, other), injector.responding(ALLOW):
        send(other.url, b"GET /", b"Authorization: Bearer one", b"authorization: Bearer two")
    (question,) = injector.requests
    assert b"\r\nAuthorization: Bearer one, Bearer two\r\n" in question
    assert proxy.sidecar.decision(b"Authorization: Bearer one, Bearer two").status == 401


@pytest.mark.parametrize(
    "fields",
    [
        [b"Connection: close", b"Connection: X-Keylatch-Key-Id"],
        [b"Connection: X-Keylatch-Key-Id", b"Connection: close"],
        [b"Connection: close,X-Keylatch-Key-Id,x-keylatch-permission"],
        [b"Connection: close,, keep-alive ,\tX-Keylatch-Key-Id"],
        [b"Connection: close, X-Keylatch-Key-Id", b"Proxy-Connection: X-Keylatch-Key-Id"],
    ],
)
def test_no_connection_header_removes_an_identity(proxy: ProxyStack, fields: list[bytes]) -> None:
    """However often it comes."""
    lines = [b"GET /v1/me HTTP/1.1", b"Host: test", auth_header(proxy.full), *fields, b"", b""]
    seen = echoed(parse_response(exchange(proxy.url, b"\r\n".join(lines))))
    assert identity(seen) == identity_of(proxy.full)


def test_with_the_clients_connection_header_it_would(proxy: ProxyStack) -> None:
    """Why it is rewritten: mod_proxy removes what it names, even what the hook has set."""
    mistake = {"clean_connection(r)\n    if PUBLIC": "if PUBLIC"}
    mistake = {"    clean_connection(r)": ""}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        lines = [b"GET /v1/me HTTP/1.1", b"Host: test", auth_header(proxy.full)]
        lines += [b"Connection: close, X-Keylatch-Key-Id", b"", b""]
        seen = echoed(parse_response(exchange(other.url, b"\r\n".join(lines))))
    assert "x-keylatch-key-id" not in identity(seen)


def test_the_clients_own_addresses_do_not_arrive(proxy: ProxyStack) -> None:
    """Apache would add its own to them."""
    lies = [b"X-Forwarded-For: 6.6.6.6", b"X_Forwarded_For: 6.6.6.6", b"X-Forwarded-Proto: https"]
    lies += [b"X-Forwarded-Host: evil.test", b"X-Forwarded-Server: evil.test"]
    for start in (b"GET /v1/me", b"GET /healthz"):
        seen = echoed(proxy.request(start, auth_header(proxy.full), *lies))
        assert values_of(seen, "x-forwarded-for") == ["127.0.0.1"]
        assert values_of(seen, "x-forwarded-proto") == ["http"]
        assert "evil" not in str(seen)
        assert "6.6.6.6" not in str(seen)


def test_mod_headers_would_delete_the_sidecars_headers(proxy: ProxyStack) -> None:
    """Why the hook strips by itself: a plain `RequestHeader unset` runs after it. `early` is before
    it, but knows no patterns."""
    unset = "RequestHeader unset X-Keylatch-Key-Id"
    for when, names in (("", set()), (" early", {"x-keylatch-key-id"})):
        mistake = also(module("headers"), unset + when)
        with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
            seen = echoed(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
        assert identity(seen).keys() & {"x-keylatch-key-id"} == names


def test_an_error_document_changes_no_answer(proxy: ProxyStack) -> None:
    """Neither the app's nor the sidecar's."""
    documents = also("ErrorDocument 401 mine", "ErrorDocument 403 mine", "ErrorDocument 503 mine")
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, documents) as other:
        refused = send(other.url, b"GET /v1/me")
        of_the_app = send(other.url, b"GET /status/401", auth_header(proxy.full))
        forbidden = send(other.url, b"GET /v1/me", auth_header(proxy.sender))
    assert_same_refusal(refused, proxy.sidecar.decision())
    assert_same_refusal(forbidden, proxy.sidecar.decision(auth_header(proxy.sender)))
    assert header_dict(of_the_app)[b"x-echo"] == b"the app"
    assert b"mine" not in of_the_app.body


def test_a_cache_would_give_one_callers_answer_to_another(proxy: ProxyStack) -> None:
    """Why the files have no mod_cache: the key, which would tell it not to, is gone by then."""
    cache = [module("cache"), module("cache_socache"), module("socache_shmcb")]
    cache += ["CacheEnable socache /", "CacheSocache shmcb", "CacheQuickHandler off"]
    with running_proxy(
        KIND, proxy.app_url, proxy.sidecar.port, also(*cache, "CacheIgnoreNoLastMod On")
    ) as other:
        echoed(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
        seen = echoed(send(other.url, b"GET /v1/me", auth_header(proxy.sidecar.create())))
    assert identity(seen) == identity_of(proxy.full)


UNASKED = [
    # An error before the first hook, whose page is a path of the app.
    (["ErrorDocument 400 /v1/errors"], b"GET /%2e%2e/../x", {"x-keylatch-key-id": ["evil"]}),
    # Its refusal, over which something else has a say.
    ([module("access_compat"), '<Location "/">', "Satisfy Any", "</Location>"], b"GET /v1/me", {}),
]


@pytest.mark.parametrize(("lines", "start", "_"), UNASKED)
def test_unchecked_requests_are_refused(
    proxy: ProxyStack, lines: list[str], start: bytes, _: dict[str, list[str]]
) -> None:
    """By the second hook, which Apache runs for every request."""
    count_before = proxy.app.request_count
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, also(*lines)) as other:
        assert send(other.url, start, b"X-Keylatch-Key-Id: evil").status in (400, 500)
    assert proxy.app.request_count == count_before


@pytest.mark.parametrize(("lines", "start", "known"), UNASKED)
def test_without_the_second_hook_it_would_get_to_the_app(
    proxy: ProxyStack, lines: list[str], start: bytes, known: dict[str, list[str]]
) -> None:
    """Why it must not be deleted: not even the client's identity headers would be removed."""
    count_before = proxy.app.request_count
    mistake = {"LuaHookFixups": "# LuaHookFixups"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, also(*lines) | mistake) as other:
        answered = send(other.url, start, b"X-Keylatch-Key-Id: evil")
    assert proxy.app.request_count == count_before + 1
    assert identity(json.loads(answered.body[answered.body.rindex(b'{"method"') :])) == known


@pytest.mark.parametrize(
    ("mistake", "status"), [({}, 401), ({"and is_idle(old)": "", "elseif old": "elseif nil"}, 200)]
)
def test_an_unexpected_response_is_given_to_no_client(
    proxy: ProxyStack, mistake: dict[str, str], status: int
) -> None:
    """On a persistent connection it would be the next answer: why connections are checked."""
    injector = FaultInjector(proxy.sidecar.port)
    twin = ONE_PROCESS | mistake
    try:
        with running_proxy(KIND, proxy.app_url, injector.port, twin) as other:
            with injector.responding(ALLOW + ALLOW, closes_after_next_request=True):
                echoed(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
            assert send(other.url, b"GET /v1/me").status == status
    finally:
        injector.close()


def test_a_sidecar_that_dribbles_means_503_in_time(proxy: ProxyStack) -> None:
    """A byte now and then is no reason to wait for more than a second."""

    def dribble() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                while not over.wait(0.2):
                    connection.sendall(b"H")

    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=dribble, daemon=True).start()
        with running_proxy(KIND, proxy.app_url, listener.getsockname()[1]) as other:
            began = time.monotonic()
            assert_unavailable(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
            assert time.monotonic() - began < PATIENCE_SECONDS / 4
            over.set()


def test_a_reload_loses_no_request_and_reads_the_lua_again(proxy: ProxyStack) -> None:
    """Requests are answered meanwhile; after it the routes are the new ones."""
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port) as other:
        lua = other.folder / "keylatch.lua"
        for _ in range(8):
            assert send(other.url, b"GET /new").status == 401
        lua.write_text(lua.read_text().replace('["/healthz"] = true', '["/new"] = true'))
        os.kill(int((other.folder / "apache2.pid").read_text()), signal.SIGUSR1)
        with ThreadPoolExecutor(4) as pool:
            asking = [
                pool.submit(send, other.url, b"GET /", auth_header(proxy.full)) for _ in range(60)
            ]
            assert {request.result().status for request in asking} == {200}
        eventually(lambda: send(other.url, b"GET /new").status == 200)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def fields(*pairs: tuple[bytes, bytes]) -> bytes:
    """Header fields, of less than 127 bytes each, as HPACK has them without its tables."""
    words = [(bytes([len(name)]) + name, bytes([len(value)]) + value) for name, value in pairs]
    return b"".join(b"\0" + name + value for name, value in words)


def spoken(port: int, *more: tuple[bytes, bytes]) -> bytes:
    """The body of the answer to a request over HTTP/2, with a trailer that forges an identity."""
    start = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/v1/emails")]
    start += [(b":authority", b"test"), *more]
    request = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
    request += frame(1, 4, 1, fields(*start)) + frame(0, 0, 1, b"hello")
    request += frame(1, 5, 1, fields((b"x-keylatch-key-id", b"evil")))
    received, body = exchange_until_idle(port, request), b""
    while received:
        length = int.from_bytes(received[:3])
        if received[3] == 0:
            body += received[9 : 9 + length]
        received = received[9 + length :]
    return body


def test_http_2_is_judged_alike(proxy: ProxyStack) -> None:
    """With mod_http2, as an operator may load it: identity, refusals, and trailers."""
    http_2 = also(module("http2"), "Protocols h2c http/1.1")
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, http_2) as other:
        lie = (b"x_keylatch_key_id", b"evil")
        key = (b"authorization", auth_header(proxy.sender).partition(b": ")[2])
        seen = json.loads(spoken(other.port, key, lie))
        assert (identity(seen), seen["length"]) == (identity_of(proxy.sender), 5)
        count_before = proxy.app.request_count
        assert spoken(other.port, lie) == proxy.sidecar.decision().body
        assert proxy.app.request_count == count_before
