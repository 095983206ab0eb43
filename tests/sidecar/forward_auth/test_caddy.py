"""Caddy with the files in `deploy/caddy`: reverse_proxy calls the sidecar."""

import json
import re
import socket
from collections.abc import Iterator
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

from keylatch.management.keyring import Created
from tests.support.proxies import (
    IDENTITY,
    FaultInjector,
    Kind,
    Proxy,
    ProxyStack,
    assert_unavailable,
    auth_header,
    config_errors,
    echoed,
    exchange_until_idle,
    faulty_proxy,
    identity,
    identity_of,
    running_proxy,
    values_of,
)
from tests.support.proxy_contract import BROKEN, ProxyContract
from tests.support.raw_http import RawResponse, exchange, parse_response, send
from tests.support.servers import eventually, free_port

KIND = Kind(
    name="caddy",
    program="caddy",
    package="caddy",
    command=["run", "--config", "{folder}/Caddyfile", "--adapter", "caddyfile"],
    check=["adapt", "--config", "{folder}/Caddyfile", "--adapter", "caddyfile", "--validate"],
    front="http://:8080",
    front_format="http://:{port}",
    files=["Caddyfile"],
    unix_format="unix/{}",
    environment={"XDG_CONFIG_HOME": "{folder}", "XDG_DATA_HOME": "{folder}"},
)
WITH_HTTP_2 = {"max_header_size": "protocols h1 h2c\nmax_header_size"}


class TestCaddy(ProxyContract):
    """The contract of all proxies; the sidecar gets more of a client's fields than it reads."""

    dropped_headers: ClassVar[frozenset[bytes]] = frozenset({b"cookie"})
    passes_429: ClassVar[bool] = True
    keeps_connections: ClassVar[bool] = False

    def test_it_has_no_complaint_about_its_files(self, proxy: ProxyStack) -> None:
        """Nor about their format: it says more than complaints, each with its level."""
        entries = [json.loads(line) for line in config_errors(proxy.kind).splitlines()]
        assert [line for line in entries if line["level"] != "info"] == []


@pytest.fixture
def fresh(proxy: ProxyStack) -> Iterator[tuple[FaultInjector, Proxy]]:
    """A fault injector that no idle connection bypasses."""
    with faulty_proxy(proxy) as made:
        yield made


def check_request(injector: FaultInjector, place: str, start: bytes, *lines: bytes) -> bytes:
    """The check that the sidecar gets for a request."""
    with injector.responding(BROKEN):
        request = [start + b" HTTP/1.1", b"Host: test", b"Connection: close", *lines]
        exchange(place, b"\r\n".join(request))
    (check,) = injector.requests
    return check


@pytest.mark.parametrize(
    "path", ["/v1/emails%3F", "/v1/emails%3F/../me", "/v1/emails%3Fx/%2e%2e/me"]
)
def test_a_table_of_decoded_paths_would_have_holes(proxy: ProxyStack, path: str) -> None:
    """Why the table compares what came: `{path}` is decoded, and the app gets it raw."""
    start, fields = f"POST {path}".encode(), (auth_header(proxy.sender), b"Content-Length: 0")
    assert proxy.request_refused(start, *fields).status == 403
    mistake = {'{http.request.orig_uri}"': '{http.request.uri.path}"'}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert echoed(send(other.url, start, *fields))["path"] == path


@pytest.mark.parametrize(
    "path", ["/v1/me/../../healthz", "/%68ealthz", "//healthz", "/HEALTHZ", "/v1/..%2fhealthz"]
)
def test_a_path_matcher_would_take_many_for_the_public_one(proxy: ProxyStack, path: str) -> None:
    """Why public routes are in the table: `path` cleans, decodes and folds; the app gets it raw."""
    assert proxy.request_refused(f"GET {path}".encode()).status == 401
    mistake = {'expression `{keylatch_permission} == "public"`': "path /healthz"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert echoed(send(other.url, f"GET {path}".encode()))["path"] == path


@pytest.mark.parametrize(
    "path", ["/healthz{nothing}", "{nothing}/healthz", "/{http.request.method}/../healthz"]
)
def test_placeholders_of_a_client_are_never_filled_in(
    proxy: ProxyStack, fresh: tuple[FaultInjector, Proxy], path: str
) -> None:
    """Neither for the table nor for the sidecar, which gets them unchanged."""
    assert proxy.request_refused(f"GET {path}".encode()).status in (400, 401)
    injector, other = fresh
    lines = (b"Authorization: Bearer {http.request.host}", b"", b"")
    check = check_request(injector, other.url, b"GET /v1/{http.request.host}", *lines)
    assert b"\r\nX-Forwarded-Uri: /v1/{http.request.host}\r\n" in check
    assert b"\r\nAuthorization: Bearer {http.request.host}\r\n" in check


def test_without_a_query_of_its_own_the_check_would_have_the_clients(proxy: ProxyStack) -> None:
    """Why the files write `?permission=`: Caddy appends what it does not replace."""
    mistake = {"rewrite /verify?permission={keylatch_permission}": "rewrite /verify"}
    start = b"GET /v1/me?permission=SENDING"
    assert proxy.request_refused(start, auth_header(proxy.sender)).status == 403
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert send(other.url, start, auth_header(proxy.sender)).status == 200


def test_a_rewrite_outside_of_route_would_not_be_judged_as_what_it_becomes(
    proxy: ProxyStack,
) -> None:
    """Why the files warn of it: the table reads what came, the app gets what was made of it."""
    mistake = {"bind 127.0.0.1": "bind 127.0.0.1\nrewrite /healthz /v1/me"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert echoed(send(other.url, b"GET /healthz"))["path"] == "/v1/me"


def test_a_route_below_the_check_is_closed_until_it_is_opened(proxy: ProxyStack) -> None:
    """In `route` what is first comes first. In `handle` Caddy sorts, and it would be open."""
    more = {"import keylatch": "import keylatch\nhandle /new {\nimport app\n}"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, more) as other:
        assert send(other.url, b"GET /new").status == 401
        assert send(other.url, b"GET /new", auth_header(proxy.sender)).status == 403
        assert echoed(send(other.url, b"GET /new", auth_header(proxy.full)))["path"] == "/new"
    mistake = {"route {": "handle {", **more}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert echoed(send(other.url, b"GET /new"))["path"] == "/new"


@pytest.mark.parametrize("missing", IDENTITY)
def test_an_allow_that_misses_a_name_is_none(
    proxy: ProxyStack, fresh: tuple[FaultInjector, Proxy], missing: str
) -> None:
    """Caddy copies five headers, or refuses the request."""
    injector, other = fresh
    count_before = proxy.app.request_count
    names = b"".join(f"{name}: x\r\n".encode() for name in IDENTITY if name != missing)
    with injector.responding(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + names + b"\r\n"):
        assert_unavailable(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
    assert proxy.app.request_count == count_before


def test_without_that_rule_caddy_would_make_up_an_identity(
    proxy: ProxyStack, fresh: tuple[FaultInjector, Proxy]
) -> None:
    """What an answer lacks is copied as the name of its placeholder."""
    injector, _ = fresh
    mistake = {f"header {name.title()} *": "" for name in IDENTITY}
    empty = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    with (
        running_proxy(KIND, proxy.app_url, injector.port, mistake) as other,
        injector.responding(empty),
    ):
        seen = echoed(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
    made_up = "{http.reverse_proxy.header.X-Keylatch-Key-Id}"
    assert identity(seen)["x-keylatch-key-id"] == [made_up]


def test_a_catch_all_without_a_handler_would_allow_every_request(
    proxy: ProxyStack, fresh: tuple[FaultInjector, Proxy]
) -> None:
    """Why the last handle_response has an error: after it Caddy goes on to the app."""
    injector, _ = fresh
    mistake = {"error 503": "vars keylatch broken"}
    with (
        running_proxy(KIND, proxy.app_url, injector.port, mistake) as other,
        injector.responding(BROKEN),
    ):
        assert identity(echoed(send(other.url, b"GET /v1/me"))) == {}


def test_an_error_page_of_the_app_would_bypass_the_check(proxy: ProxyStack) -> None:
    """Why the files warn of the app in handle_errors: without a sidecar all would be the app's."""
    mistake = {"respond `": "import app # `"}
    with running_proxy(KIND, proxy.app_url, free_port(), mistake) as other:
        assert echoed(send(other.url, b"GET /v1/me"))["path"] == "/v1/me"


@pytest.mark.parametrize(
    ("rule", "name"),
    [("-*keylatch*", "X-Keylatch-Key-Id"), ("-*-Method-Override", "X-Method-Override")],
)
def test_without_the_rules_on_names_the_app_would_trust_the_client(
    proxy: ProxyStack, rule: str, name: str
) -> None:
    """On public routes nothing else overwrites what a client says."""
    lie = f"{name}: evil".encode()
    assert "evil" not in json.dumps(echoed(proxy.request(b"GET /healthz", lie)))
    with running_proxy(
        KIND, proxy.app_url, proxy.sidecar.port, {f"request_header {rule}": ""}
    ) as other:
        assert values_of(echoed(send(other.url, b"GET /healthz", lie)), name.lower()) == ["evil"]


def test_without_the_rule_on_connection_a_client_could_strip_its_identity(
    proxy: ProxyStack,
) -> None:
    """Caddy removes what the client's Connection names, after the sidecar's answer is there."""
    lines = [b"GET /v1/me HTTP/1.1", b"Host: test", auth_header(proxy.full)]
    lines += [b"Connection: close, X-Keylatch-Key-Id", b"", b""]
    with running_proxy(
        KIND, proxy.app_url, proxy.sidecar.port, {"request_header -Connection": ""}
    ) as other:
        seen = echoed(parse_response(exchange(other.url, b"\r\n".join(lines))))
    assert "x-keylatch-key-id" not in identity(seen)


def test_without_the_rule_on_upgrades_the_app_would_get_h2c(proxy: ProxyStack) -> None:
    """And an app that supports it would bypass Caddy."""
    lines = [b"GET /v1/me HTTP/1.1", b"Host: test", auth_header(proxy.full)]
    lines += [b"Upgrade: h2c", b"Connection: Upgrade", b"", b""]
    rules = {"request_header @no_websocket -Upgrade": "", "request_header -Connection": ""}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, rules) as other:
        received = exchange_until_idle(other.port, b"\r\n".join(lines))
    assert b'["upgrade", "h2c"]' in received


@pytest.mark.parametrize("first", [b"h2c", b"h2c, websocket", b"websocket, h2c", b""])
def test_a_second_upgrade_is_not_hidden_behind_websocket(proxy: ProxyStack, first: bytes) -> None:
    """Caddy would take the first of two for the protocol."""
    lines = [b"GET /v1/me HTTP/1.1", b"Host: test", auth_header(proxy.full), b"Upgrade: " + first]
    lines += [b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13"]
    lines += [b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", b"", b""]
    received = exchange_until_idle(proxy.running.port, b"\r\n".join(lines))
    assert b"h2c" not in received
    assert b"\r\nUpgrade: websocket\r\n" in received


@pytest.mark.parametrize(
    "lines",
    [
        (b"Content-Length: 5", b"", b"hello"),
        (b"Transfer-Encoding: chunked", b"", b"5", b"hello", b"0", b"", b""),
        (b"Upgrade: websocket", b"", b""),
    ],
)
def test_the_check_has_no_body_and_no_upgrade(
    proxy: ProxyStack, fresh: tuple[FaultInjector, Proxy], lines: tuple[bytes, ...]
) -> None:
    """Or the sidecar would wait for the one, and talk WebSocket for the other."""
    injector, other = fresh
    check = check_request(injector, other.url, b"POST /v1/emails", *lines)
    head, _, body = check.lower().partition(b"\r\n\r\n")
    assert body == b""
    for name in (b"content-length", b"transfer-encoding", b"trailer", b"upgrade"):
        assert b"\r\n" + name not in head
    assert re.findall(rb"\r\nconnection: (.*)", head) in ([], [b"close"])


def test_a_check_is_never_too_long_for_the_sidecar(proxy: ProxyStack) -> None:
    """The sidecar accepts every head that Caddy accepts, 32 kB of it; larger ones are 431."""
    fields = [auth_header(proxy.full), *(b"X-Filler-%d: " % n + 7_000 * b"x" for n in range(2))]
    assert proxy.request(b"GET /v1/me?" + 15_000 * b"x", *fields).status == 200
    assert proxy.request_refused(b"GET /v1/me?" + 45_000 * b"x", *fields).status == 431


def test_an_app_that_is_gone_is_not_a_sidecar_that_is_gone(proxy: ProxyStack) -> None:
    """502 by Caddy itself: keylatch has done its part."""
    with running_proxy(KIND, f"http://127.0.0.1:{free_port()}", proxy.sidecar.port) as other:
        for start in (b"GET /v1/me", b"GET /healthz"):
            answered = send(other.url, start, auth_header(proxy.full))
            assert (answered.status, answered.body) == (502, b"")
            assert b"x-keylatch-error" not in {name.lower() for name, _ in answered.headers}


def test_no_key_is_in_the_log_of_an_outage(proxy: ProxyStack) -> None:
    """Caddy logs all fields of a request, the credential without its value."""
    with running_proxy(KIND, proxy.app_url, free_port()) as other:
        assert_unavailable(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
        log = other.folder / "output.log"
        eventually(lambda: "/v1/me" in log.read_text())
        assert proxy.full.token.reveal() not in log.read_text()


def test_log_credentials_would_write_keys_into_the_log(proxy: ProxyStack) -> None:
    """Why the README warns of that option."""
    mistake = {"max_header_size": "log_credentials\nmax_header_size"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert send(other.url, b"GET /v1/me", auth_header(proxy.full)).status == 200
        log = other.folder / "output.log"
        eventually(lambda: proxy.full.token.reveal() in log.read_text())


def test_a_host_that_no_site_names_gets_an_empty_answer(proxy: ProxyStack) -> None:
    """200 by Caddy itself, without the app: a health check would accept it."""
    count_before = proxy.app.request_count
    with running_proxy(
        KIND, proxy.app_url, proxy.sidecar.port, {"http://:": "http://api.test:"}
    ) as other:
        answered = send(other.url, b"GET /v1/me", auth_header(proxy.full))
    assert (answered.status, answered.body, proxy.app.request_count) == (200, b"", count_before)


def test_options_for_the_whole_server_does_not_reach_the_app(proxy: ProxyStack) -> None:
    """`OPTIONS *` is answered by Caddy's own library, with nothing."""
    answered = proxy.request_refused(b"OPTIONS *", auth_header(proxy.full))
    assert (answered.status, answered.body) == (200, b"")


def test_no_client_can_disable_the_check(proxy: ProxyStack) -> None:
    """Its administration, open to the whole machine by default, is off."""
    assert "admin endpoint disabled" in (proxy.running.folder / "output.log").read_text()


def test_where_a_request_comes_from_is_not_for_the_client_to_say(proxy: ProxyStack) -> None:
    """The app gets the connection."""
    lies = (b"X-Forwarded-For: 6.6.6.6", b"X-Forwarded-Proto: https")
    seen = echoed(proxy.request(b"GET /v1/me", auth_header(proxy.full), *lies))
    assert values_of(seen, "x-forwarded-for") == ["127.0.0.1"]
    assert values_of(seen, "x-forwarded-proto") == ["http"]


Field = tuple[str, str]


def over_http_2(port: int, start: str, *fields: Field, trailer: Field | None = None) -> RawResponse:
    """An answer to a request with the body `hello`, without TLS."""
    method, _, path = start.rpartition(" ")
    head = [(":method", method), (":scheme", "http"), (":authority", "test"), (":path", path)]
    config = H2Configuration(validate_outbound_headers=False)
    connection = H2Connection(config)
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


@pytest.fixture(scope="module")
def http_2(proxy: ProxyStack) -> Iterator[int]:
    """The port of a Caddy that speaks HTTP/2 without a certificate."""
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, WITH_HTTP_2) as other:
        yield other.port


def by(key: Created) -> Field:
    """The field that presents a key."""
    return "authorization", f"Bearer {key.token.reveal()}"


def test_http_2_is_judged_in_the_same_way(proxy: ProxyStack, http_2: int) -> None:
    """Identity, permissions and refusals."""
    count_before = proxy.app.request_count
    seen = echoed(over_http_2(http_2, "POST /v1/emails", by(proxy.sender)))
    assert (seen["length"], identity(seen)) == (5, identity_of(proxy.sender))
    for start in ("POST /v1/me", "GET /v1/emails", "POST /v1/emails/", "POST //v1/emails"):
        assert over_http_2(http_2, start, by(proxy.sender)).status == 403
    for fields in ([], [by(proxy.full), by(proxy.full)], [("authorization", "Bearer wrong")]):
        refused = over_http_2(http_2, "GET /v1/me", *fields)
        assert refused.status == 401
        assert b"www-authenticate" in dict(refused.headers)
    assert proxy.app.request_count == count_before + 1


@pytest.mark.parametrize(
    "lie",
    [
        ("x-keylatch-key-id", "evil"),
        ("x_keylatch_key_id", "evil"),
        ("x.keylatch.key.id", "evil"),
        ("connection", "x-keylatch-key-id"),
        ("upgrade", "h2c"),
        ("x-http-method-override", "DELETE"),
    ],
)
def test_over_http_2_no_client_can_set_its_identity(
    proxy: ProxyStack, http_2: int, lie: Field
) -> None:
    """The app gets the sidecar's headers, or Caddy rejects the request."""
    count_before = proxy.app.request_count
    answered = over_http_2(http_2, "POST /v1/me", by(proxy.full), lie)
    if answered.status != 200:
        assert (answered.status in (0, 400), proxy.app.request_count) == (True, count_before)
        return
    seen = echoed(answered)
    assert identity(seen) == identity_of(proxy.full)
    assert lie[1] not in [value for _, value in seen["headers"]]


@pytest.mark.parametrize("method", ["GET /healthz?", "POST /v1/emails?", "GET /healthz? x"])
def test_a_method_of_http_2_is_no_line_of_the_table(
    proxy: ProxyStack, http_2: int, method: str
) -> None:
    """Caddy accepts one with spaces. Without the rule only its HTTP client would reject it."""
    count_before = proxy.app.request_count
    assert over_http_2(http_2, f"{method} /v1/me", by(proxy.sender)).status == 400
    mistake = {**WITH_HTTP_2, "error @two_words 400": ""}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert over_http_2(other.port, f"{method} /v1/me", by(proxy.sender)).status == 502
    assert proxy.app.request_count == count_before


def test_a_trailer_of_http_2_never_becomes_a_header(proxy: ProxyStack, http_2: int) -> None:
    """It comes at the end of any body there, announced or not."""
    for announced in ([], [("trailer", "x-keylatch-key-id")]):
        lie = ("x-keylatch-key-id", "evil")
        answered = over_http_2(http_2, "POST /v1/me", by(proxy.full), *announced, trailer=lie)
        seen = echoed(answered)
        assert (seen["length"], identity(seen)) == (5, identity_of(proxy.full))
