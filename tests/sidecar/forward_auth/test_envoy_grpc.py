"""Envoy with `deploy/envoy/envoy-grpc.yaml`: ext_authz calls the sidecar over gRPC."""

import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from keylatch_sidecar.forward_auth.ext_authz_grpc import SERVICE
from keylatch_sidecar.forward_auth.protobuf import CheckRequest, CheckResponse
from tests.sidecar.forward_auth import test_envoy
from tests.support.proxies import (
    DEPLOY,
    FaultInjector,
    Proxy,
    ProxyStack,
    SidecarProcess,
    assert_rate_limited,
    assert_unavailable,
    auth_header,
    echoed,
    header_dict,
    identity,
    identity_of,
    relay,
    running_proxy,
    values_of,
)
from tests.support.proxy_contract import SPELLINGS, TOO_MANY_BODY, ProxyContract
from tests.support.raw_http import exchange, send
from tests.support.servers import eventually, free_port


class GRPCSidecar(SidecarProcess):
    """One whose `port`, or Unix socket, is for gRPC; HTTP is at its `place`."""

    def __init__(self, folder: Path, place: Path | None = None, **settings: str) -> None:
        self._http = free_port()
        super().__init__(folder, place, **settings)

    def _listen_arguments(self) -> list[str]:
        self.place = f"http://127.0.0.1:{self._http}"
        where = ["--grpc-uds", str(self._uds)] if self._uds else ["--grpc-port", str(self.port)]
        return ["--port", str(self._http), *where]


KIND = dataclasses.replace(
    test_envoy.KIND,
    command=["-c", "{folder}/envoy-grpc.yaml", *test_envoy.KIND.command[2:]],
    check=["-c", "{folder}/envoy-grpc.yaml", *test_envoy.KIND.check[2:]],
    files=["envoy-grpc.yaml"],
    sidecar_address="127.0.0.1:8703",
    sidecar=GRPCSidecar,
)


class Oracle:
    """Gives the same response to every check, instead of the sidecar, and records the checks.

    Args:
        answer: a message, as it is on the wire, or an error.
    """

    def __init__(self, answer: bytes | grpc.StatusCode) -> None:
        self.questions: list[Any] = []
        self._answer = answer

    def check(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        self.questions.append(CheckRequest.FromString(message))
        if isinstance(self._answer, grpc.StatusCode):
            context.abort(self._answer, "an error")
        return self._answer


@contextlib.contextmanager
def answering(
    proxy: ProxyStack, answer: bytes | grpc.StatusCode, twin: Mapping[str, str] | None = None
) -> Iterator[tuple[Oracle, Proxy]]:
    """Another proxy, whose sidecar is an oracle."""
    oracle = Oracle(answer)
    methods: dict[str, Any] = {"Check": grpc.unary_unary_rpc_method_handler(oracle.check)}
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with running_proxy(KIND, proxy.app_url, port, twin) as other:
            yield oracle, other
    finally:
        server.stop(None).wait()


def written(**fields: Any) -> bytes:
    """An answer as the sidecar would write it."""
    message: bytes = CheckResponse(**fields).SerializeToString()
    return message


def denied(status: int, body: bytes = b"", **headers: bytes) -> bytes:
    options = [
        {"header": {"key": name.replace("_", "-").encode(), "value": value}, "append_action": 2}
        for name, value in headers.items()
    ]
    return written(
        status={"code": 7},
        denied_response={"status": {"code": status}, "headers": options, "body": body},
    )


class TestEnvoyOverGRPC(ProxyContract):
    """All that a proxy promises. What stands in for the sidecar must speak gRPC here."""

    def test_an_allow_without_identity_forwards_no_identity_of_the_client(
        self, proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy]
    ) -> None:
        """An empty message is an allow: the app gets no identity."""
        lies = [name + b": evil" for name in SPELLINGS]
        with answering(proxy, b"") as (_, other):
            seen = echoed(send(other.url, b"GET /v1/me", auth_header(proxy.full), *lies))
        assert identity(seen) == {}
        assert "evil" not in json.dumps(seen)

    def test_the_check_has_its_fields_and_no_other_of_the_client(
        self, proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy]
    ) -> None:
        """One check per request: the permission, the credential, method and path; no body."""
        head = [b"POST /v1/emails?permission=X HTTP/1.1", b"Host: test", b"Cookie: secret=1"]
        head += [auth_header(proxy.full), b"X-Forwarded-Method: GET", b"X-Keylatch-Require: X"]
        head += [b"Content-Length: 5", b"Connection: close", b"", b"hello"]
        with answering(proxy, grpc.StatusCode.INTERNAL) as (oracle, other):
            exchange(other.url, b"\r\n".join(head))
        (question,) = oracle.questions
        http = question.attributes.request.http
        assert (http.method, http.path) == (b"POST", b"/v1/emails?permission=X")
        (header,) = http.headers
        assert header.key == b"authorization"
        assert header.value == auth_header(proxy.full).partition(b": ")[2]
        (extension,) = question.attributes.context_extensions
        assert (extension.key, extension.value) == (b"permission", b"SENDING")
        message = question.SerializeToString()
        assert b"hello" not in message
        assert b"secret" not in message

    def test_a_sidecar_that_limits_a_key_is_understood(
        self, proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy]
    ) -> None:
        """429 and its `Retry-After` reach the client as they are; the app is not called."""
        count_before = proxy.app.request_count
        headers = {"content_type": b"application/json", "cache_control": b"no-store"}
        headers |= {"x_keylatch_error": b"rate_limited", "retry_after": b"7"}
        with answering(proxy, denied(429, TOO_MANY_BODY, **headers)) as (_, other):
            answered = send(other.url, b"GET /v1/me", auth_header(proxy.full))
        assert proxy.app.request_count == count_before
        assert_rate_limited(answered)
        assert header_dict(answered)[b"retry-after"] == b"7"

    def test_a_connection_that_closes_during_a_check_is_replaced(
        self, proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy]
    ) -> None:
        """Closed by the sidecar while a check is being sent: it is retried on a new one."""
        assert statuses(proxy, {}) == {200}


class LateClosingInjector:
    """Between Envoy and its sidecar: closes a connection at its second check, without a response.

    Args:
        port: of the sidecar.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                envoy, _ = self._listener.accept()
                threading.Thread(target=self._one, args=[envoy], daemon=True).start()

    def _one(self, envoy: socket.socket) -> None:
        with envoy, socket.create_connection(("127.0.0.1", self._port)) as sidecar:
            threading.Thread(target=relay, args=[sidecar, envoy], daemon=True).start()
            with contextlib.suppress(OSError), envoy.makefile("rb") as frames:
                sidecar.sendall(frames.read(24))  # the preface of HTTP/2 (RFC 9113 section 3.4)
                questions = 0
                while head := frames.read(9):  # length, type, flags, stream (section 4.1)
                    questions += head[3] == 1  # HEADERS
                    if questions == 2:
                        break
                    sidecar.sendall(head + frames.read(int.from_bytes(head[:3])))
                envoy.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def statuses(proxy: ProxyStack, mistake: Mapping[str, str]) -> set[int]:
    """The responses to twelve requests while connections are closed during checks."""
    injector = LateClosingInjector(proxy.sidecar.port)
    try:
        with running_proxy(KIND, proxy.app_url, injector.port, mistake) as other:
            return {
                send(other.url, b"GET /v1/me", auth_header(proxy.full)).status for _ in range(12)
            }
    finally:
        injector.close()


def test_without_the_retry_a_connection_that_ends_would_be_noticed(proxy: ProxyStack) -> None:
    """Why checks are retried: no proxy detects a closed connection before it writes."""
    assert statuses(proxy, {"num_retries: 1": "num_retries: 0"}) == {200, 503}


def test_a_new_route_is_closed_until_it_is_opened(proxy: ProxyStack) -> None:
    """A route without keylatch's settings needs FULL."""
    more = "- match: {path: /new}\n                          route: {cluster: app}\n"
    more += "                        - match: {path: /healthz}"
    with running_proxy(
        KIND, proxy.app_url, proxy.sidecar.port, {"- match: {path: /healthz}": more}
    ) as other:
        assert send(other.url, b"GET /new").status == 401
        assert send(other.url, b"GET /new", auth_header(proxy.sender)).status == 403
        assert echoed(send(other.url, b"GET /new", auth_header(proxy.full)))["path"] == "/new"


def test_without_the_default_permission_every_good_key_would_do(proxy: ProxyStack) -> None:
    """Why FULL is set for all routes: a check without a permission is weaker."""
    mistake = {"{permission: FULL}": "{mine: FULL}"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert send(other.url, b"GET /v1/me", auth_header(proxy.sender)).status == 200


def test_a_permission_without_a_word_is_no_permission(proxy: ProxyStack) -> None:
    """It leaves only FULL, on this route too."""
    with running_proxy(
        KIND, proxy.app_url, proxy.sidecar.port, {"permission: SENDING": 'permission: ""'}
    ) as p:
        assert send(p.url, b"POST /v1/emails", auth_header(proxy.sender)).status == 403
        assert send(p.url, b"POST /v1/emails", auth_header(proxy.full)).status == 200


def test_failing_open_would_allow_every_request(proxy: ProxyStack) -> None:
    """Why `failure_mode_allow` must not be set: while the sidecar is down, the app serves."""
    mistake = {"failure_mode_allow: false": "failure_mode_allow: true"}
    with running_proxy(KIND, proxy.app_url, free_port(), mistake) as other:
        assert send(other.url, b"GET /v1/me").status == 200
    with running_proxy(KIND, proxy.app_url, free_port()) as other:
        assert_unavailable(send(other.url, b"GET /v1/me"))


@pytest.mark.parametrize(
    "answer",
    [
        *(grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE),
        *(grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED),
        b"\xff\xff\xff",
        denied(200),
        denied(204, x_keylatch_key_id=b"key_1"),
        denied(302, location=b"/"),
        denied(500),
        denied(503),
        written(status={"code": 14}, denied_response={"status": {"code": 503}}),
    ],
    ids=str,
)
def test_no_other_answer_is_an_allow(proxy: ProxyStack, answer: bytes | grpc.StatusCode) -> None:
    """503, whatever it is, and the app is not called: above all what looks like its success."""
    count_before = proxy.app.request_count
    with answering(proxy, answer) as (_, other):
        assert_unavailable(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
    assert proxy.app.request_count == count_before


@pytest.mark.parametrize("code", [1, 2, 7, 16, 99])
def test_a_refusal_without_words_is_a_refusal(proxy: ProxyStack, code: int) -> None:
    """Nothing but 0 lets a request pass, not even beside the headers of an allow."""
    count_before = proxy.app.request_count
    for response in ({}, {"ok_response": {"headers_to_remove": [b"cookie"]}}):
        with answering(proxy, written(status={"code": code}, **response)) as (_, other):
            assert send(other.url, b"GET /v1/me", auth_header(proxy.full)).status == 403
    assert proxy.app.request_count == count_before


ALL_HEADERS = {"allowed_headers: {patterns: [{exact: authorization}]}": "clear_route_cache: false"}
BELIEVING = {
    "x[^a-z0-9]keylatch.*": "nothing",
    "headers_with_underscores_action: DROP_HEADER": "max_headers_count: 100",
}


@pytest.mark.parametrize("raw", ["false", "true"])
def test_an_envoy_that_sends_all_headers_accepts_no_forged_identity(
    proxy: ProxyStack, raw: str
) -> None:
    """For other configurations: if the sidecar gets names that an app could mistake for
    its own, it has them removed; Envoy writes over the others. What is public stays open to lies.
    """
    version = "transport_api_version: V3"
    mistakes = {**ALL_HEADERS, **BELIEVING}
    mistakes[version] = f"{version}\n                      encode_raw_headers: {raw}"
    lies = [name + b": evil" for name in SPELLINGS]
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistakes) as other:
        keyed = echoed(send(other.url, b"GET /v1/me", auth_header(proxy.full), *lies))
        public = echoed(send(other.url, b"GET /healthz", *lies))
        for second in (auth_header(proxy.full), b"Authorization: Basic eDp5"):
            assert send(other.url, b"GET /v1/me", auth_header(proxy.full), second).status == 401
    assert identity(keyed) == identity_of(proxy.full)
    assert "evil" not in json.dumps(keyed)
    assert identity(public)["x-keylatch-key-id"] != []
    assert values_of(keyed, "authorization") == []


ASKING = {
    "http2_protocol_options: {}": (
        "http2_protocol_options: {connection_keepalive: {interval: 0.01s, timeout: 5s}}"
    ),
    "num_retries: 1": "num_retries: 0",
}


def test_pings_close_no_connection(proxy: ProxyStack) -> None:
    """As often as an operator likes: no check is lost."""
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, ASKING) as other:
        answers = [send(other.url, b"GET /v1/me", auth_header(proxy.full)) for _ in range(100)]
    assert {answered.status for answered in answers} == {200}


def test_other_servers_would_close_connections_that_ping(proxy: ProxyStack) -> None:
    """Why the sidecar does not count pings: gRPC's default closes connections, losing checks."""
    with answering(proxy, b"", ASKING) as (_, other):
        eventually(lambda: send(other.url, b"GET /v1/me").status == 503)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("# 1. Ambiguous requests", "# 2."),
        ("use_remote_address: true", "route_config:"),
        ("# Public: an exact path.", "# The permission that a request needs."),
        ("failure_mode_allow: false", "allowed_headers:"),
        ("# 6. Rate limit per key", "clusters:"),
        ("- name: app\n      connect_timeout", ""),
    ],
)
def test_the_two_files_differ_only_in_the_check(start: str, end: str) -> None:
    """Settings that fail closed in one of them do so in the other."""
    parts = set()
    for name in ("envoy.yaml", "envoy-grpc.yaml"):
        text = (DEPLOY / "envoy" / name).read_text()
        assert (text.count(start), text.count(end) > 0) == (1, True)
        parts.add(text[text.index(start) :].partition(end or "\0")[0])
    assert len(parts) == 1
