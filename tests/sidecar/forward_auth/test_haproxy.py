"""HAProxy with the files in `deploy/haproxy`: a short Lua action calls the sidecar."""

from typing import ClassVar

import pytest

from tests.support.proxies import (
    Kind,
    ProxyStack,
    assert_unavailable,
    auth_header,
    echoed,
    exchange_until_idle,
    identity,
    running_proxy,
    with_trailer,
)
from tests.support.proxy_contract import ProxyContract
from tests.support.raw_http import exchange, parse_response, send
from tests.support.servers import eventually

KIND = Kind(
    name="haproxy",
    program="haproxy",
    package="haproxy",
    command=["-db", "-f", "{folder}/haproxy.cfg"],
    check=["-c", "-q", "-dW", "-f", "{folder}/haproxy.cfg"],
    files=["haproxy.cfg", "keylatch.lua"],
    files_named=["/etc/haproxy/keylatch.lua"],
    sockets=["abns@keylatch"],
    unix_format="unix@{}",
    only_root=r"\s*(user|group) ",
    limited={"ge 1000": "ge 2"},
    unlimited={"ge 1000": "ge 1000000000"},
)


class TestHAProxy(ProxyContract):
    """All that a proxy promises; bodies need a length."""

    chunked_bodies: ClassVar[bool] = False
    passes_429: ClassVar[bool] = True


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../me",
        "/v1/..",
        "/./v1/me",
        "/v1/.",
        "/v1/%2e%2E/me",
        "/v1/.%2e/me",
        "/v1%2f..%2fme",
        "/v1/..;a=b/me",
        "/v1\\..\\me",
    ],
)
def test_dot_segments_never_get_to_the_app(proxy: ProxyStack, path: str) -> None:
    """400 for a FULL key too: HAProxy compares them as they came, and the app may resolve them."""
    assert proxy.request_refused(f"GET {path}".encode(), auth_header(proxy.full)).status == 400


ABSOLUTE = [
    b"GET http://test/healthz",
    b"GET http://test/v1/me",
    b"POST http://test/v1/emails",
    b"GET https://test/healthz",
    b"GET HTTP://test/healthz",
    b"GET http://test",
    b"GET http://test/?x=/healthz",
]


@pytest.mark.parametrize("start", ABSOLUTE)
def test_targets_in_absolute_form_never_get_to_the_app(proxy: ProxyStack, start: bytes) -> None:
    """400 for a FULL key too: HAProxy compares the path in it, and the app may read all of it."""
    assert proxy.request_refused(start).status == 400
    assert proxy.request_refused(start, auth_header(proxy.full), b"Content-Length: 0").status == 400


def test_without_the_rule_on_targets_the_app_would_get_them_as_they_are(proxy: ProxyStack) -> None:
    """Why it is there: what HAProxy took for a public path is another one to the app."""
    mistake = {"unless { url -m beg / }": "if FALSE"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        count_before = proxy.app.request_count
        send(other.url, b"GET http://test/healthz")
    assert proxy.app.request_count == count_before + 1


@pytest.mark.parametrize("path", ["/v1/a..b", "/v1/...", "/.well-known/x", "/v1/a.", "/v1/x?../y"])
def test_dots_that_are_no_segments_do(proxy: ProxyStack, path: str) -> None:
    """A file's name may have them."""
    assert proxy.request(f"GET {path}".encode(), auth_header(proxy.full)).status == 200


@pytest.mark.parametrize(
    "mistake",
    [
        {"local answer = ask(txn)": "error('a mistake')"},
        {"local answer = ask(txn)": "local answer = nil"},
        {"local answer = ask(txn)": "do return end"},
        {"txn.http:req_set_header(name, values[1])": "txn.http:no_such_thing()"},
    ],
)
def test_an_error_in_lua_allows_no_request(proxy: ProxyStack, mistake: dict[str, str]) -> None:
    """HAProxy continues with the next rule then, which refuses the request."""
    count_before = proxy.app.request_count
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert_unavailable(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
    assert proxy.app.request_count == count_before


def test_without_the_closing_rule_such_a_mistake_would_allow_every_request(
    proxy: ProxyStack,
) -> None:
    """Why it must not be deleted."""
    mistakes = {
        "local answer = ask(txn)": "error('a mistake')",
        "unless { var(txn.keylatch) -m str allowed public }": "if FALSE",
    }
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistakes) as other:
        assert send(other.url, b"GET /v1/me").status == 200


def test_without_the_rule_on_bodies_a_trailer_would_set_the_identity(proxy: ProxyStack) -> None:
    """Why bodies need a length: uvicorn with httptools takes a trailer for one more header."""
    mistake = {"if { req.hdr(transfer-encoding) -m found }": "if FALSE"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        seen = echoed(parse_response(exchange(other.url, with_trailer(proxy.full))))
    assert identity(seen)["x-keylatch-key-id"] == [proxy.full.record.id, "evil"]


def test_a_key_that_was_limited_is_served_again_without_a_pause(
    proxy: ProxyStack,
) -> None:
    """Requests that were refused do not count; else a busy client would be shut out for good."""
    short = {**KIND.limited, "http_req_rate(10s)": "http_req_rate(1s)"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, short) as other:

        def request_status() -> int:
            return send(other.url, b"GET /v1/me", auth_header(proxy.full)).status

        eventually(lambda: request_status() == 429)
        eventually(lambda: request_status() == 200)


def test_http_2_without_tls_is_no_way_around(proxy: ProxyStack) -> None:
    """Its bodies could have trailers without `Transfer-Encoding`."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    assert exchange_until_idle(proxy.running.port, preface + settings)[3:4] != settings[3:4]
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, {" proto h1": ""}) as other:
        assert exchange_until_idle(other.port, preface + settings)[3:4] == settings[3:4]
