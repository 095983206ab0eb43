"""What every reverse proxy promises with its files in `deploy/`; `test_<proxy>.py` inherits it."""

import json
import os
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from keylatch.management.keyring import Created
from tests.support.proxies import (
    IDENTITY,
    FaultInjector,
    Proxy,
    ProxyStack,
    assert_rate_limited,
    assert_same_refusal,
    assert_unavailable,
    auth_header,
    config_errors,
    echoed,
    exchange_until_idle,
    header_dict,
    identity,
    identity_of,
    running_proxy,
    values_of,
    with_trailer,
)
from tests.support.raw_http import RawResponse, exchange, parse_response, send

PATIENCE_SECONDS = 20  # a third of what proxies wait for by default; measured: 1 to 2
TOO_MANY_BODY = b'{"error":"rate_limited","error_description":"Not now"}'
TOO_MANY = (
    b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\nContent-Type: application/json\r\n"
    b"Cache-Control: no-store\r\nX-Keylatch-Error: rate_limited\r\nRetry-After: 7\r\n\r\n%s"
) % (len(TOO_MANY_BODY), TOO_MANY_BODY)
BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
NAMED = b"".join(name.encode() + b": x\r\n" for name in IDENTITY)

SPELLINGS = [
    b"X-Keylatch-Key-Id",
    b"x-keylatch-KEY-ID",
    b"X_Keylatch_Key_Id",
    b"X-Keylatch_Key-Id",
    b"x_KEYLATCH-key_id",
    b"X.Keylatch.Key.Id",
    b"X-Keylatch-Key-Name",
    b"X-Keylatch-Organization-Id",
    b"X_Keylatch_Organization_Id",
    b"X-Keylatch-Permission",
    b"X_KEYLATCH_PERMISSION",
    b"X-Keylatch-Environment",
    b"X-Keylatch-Require",
    b"X-Keylatch-Error",
]


class ProxyContract:
    """What every proxy must do. The module of a subclass says how to run it: `KIND`."""

    chunked_bodies: ClassVar[bool] = True
    """Whether bodies without a length arrive; if not, they are refused with 411."""
    keeps_connections: ClassVar[bool] = True
    """Whether checks share connections to the sidecar."""
    sidecar_request_target: ClassVar[bytes] = b"/verify?permission=SENDING"
    """The target of the check of `POST /v1/emails?permission=X`, which SENDING permits."""
    sidecar_request_headers: ClassVar[Mapping[bytes, bytes]] = {
        b"x-forwarded-method": b"POST",
        b"x-forwarded-uri": b"/v1/emails?permission=X",
    }
    """What its header says of that request, beside the credential."""
    dropped_headers: ClassVar[frozenset[bytes]] = frozenset({b"cookie", b"x-evil"})
    """What it does not say of the client's own: any field where it can."""
    passes_429: ClassVar[bool] = False
    """Whether a 429 of the sidecar's reaches the client; if not, it is 503."""

    def test_it_has_no_complaint_about_its_files(self, proxy: ProxyStack) -> None:
        """The files are right for this version, in its own judgement."""
        assert config_errors(proxy.kind) == ""

    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "PROPFIND"])
    def test_a_valid_key_is_allowed_and_the_app_gets_the_identity(
        self, proxy: ProxyStack, method: str
    ) -> None:
        """All identity headers, once each; method, path and query as they came."""
        start = f"{method} /v1/me?a=1&b=%2F".encode()
        answered = proxy.request(start, auth_header(proxy.full), b"Content-Length: 0")
        seen = echoed(answered)
        assert identity(seen) == identity_of(proxy.full)
        assert (seen["method"], seen["path"], seen["query"]) == (method, "/v1/me", "a=1&b=%2F")
        assert header_dict(answered)[b"x-echo"] == b"the app"

    def test_the_app_never_sees_the_key(self, proxy: ProxyStack) -> None:
        """`Authorization` ends at the proxy, on public routes too."""
        for start in (b"GET /v1/me", b"GET /healthz"):
            assert (
                values_of(echoed(proxy.request(start, auth_header(proxy.full))), "authorization")
                == []
            )

    def test_the_longest_name_and_address_pass(self, proxy: ProxyStack) -> None:
        """1.2 kB of a key's name in the sidecar's response, 7 kB of a query in the check."""
        key = proxy.sidecar.create(name=100 * "\N{MUSICAL SYMBOL G CLEF}")
        seen = echoed(proxy.request(b"GET /v1/me?" + 7_000 * b"x", auth_header(key)))
        assert identity(seen) == identity_of(key)
        assert seen["query"] == 7_000 * "x"

    def test_head_is_answered_without_a_body(self, proxy: ProxyStack) -> None:
        """The app gets HEAD; a refused HEAD has no body either."""
        count_before = proxy.app.request_count
        allowed = proxy.request(b"HEAD /v1/me", auth_header(proxy.full))
        assert (allowed.status, allowed.body, proxy.app.request_count) == (
            200,
            b"",
            count_before + 1,
        )
        refused = proxy.request_refused(b"HEAD /v1/me")
        assert (refused.status, refused.body) == (401, b"")

    @pytest.mark.parametrize(
        "value",
        [
            None,
            "",
            "Bearer",
            "Bearer ",
            "Basic dXNlcjpwYXNz",
            "Bearer wrong",
            "Bearer kl_live_000000000000_00000000000000000000000000000000000000000",
            "Bearer {token}x",
            "Bearer {token}, Bearer {token}",
            "Bearer {token} {token}",
            "Bearer x" + 600 * "x",
        ],
    )
    def test_without_a_good_key_it_is_401(self, proxy: ProxyStack, value: str | None) -> None:
        """Challenge once, JSON body, error word: as the sidecar says it."""
        fields = []
        if value is not None:
            value = value.replace("{token}", proxy.full.token.reveal())
            fields = [f"Authorization: {value}".encode()]
        refused = proxy.request_refused(b"GET /v1/me", *fields)
        assert refused.status == 401
        assert_same_refusal(refused, proxy.sidecar.decision(*fields))
        assert header_dict(refused)[b"www-authenticate"].startswith(b'Bearer realm="keylatch"')

    def test_a_revoked_key_is_refused_on_the_very_next_request(self, proxy: ProxyStack) -> None:
        """On the same persistent connection too; nothing on the way caches it."""
        for _ in range(5):
            key = proxy.sidecar.create()
            assert proxy.request(b"GET /v1/me", auth_header(key)).status == 200
            proxy.sidecar.revoke(key)
            refused = proxy.request_refused(b"GET /v1/me", auth_header(key))
            assert_same_refusal(refused, proxy.sidecar.decision(auth_header(key)))
            assert refused.status == 401

    @pytest.mark.parametrize(
        ("start", "status"),
        [
            ("POST /v1/emails", 200),
            ("POST /v1/emails?x=1", 200),
            ("POST /v1/emails?permission=FULL", 200),
            ("POST /v1/emails/batch", 200),
            ("GET /v1/emails", 403),
            ("DELETE /v1/emails", 403),
            ("OPTIONS /v1/emails", 403),
            ("post /v1/emails", 403),
            ("POSTX /v1/emails", 403),
            ("POST /v1/emails/", 403),
            ("POST /v1/emails/x", 403),
            ("POST /v1/emailsx", 403),
            ("POST /V1/emails", 403),
            ("POST /v1/emails;a=b", 403),
            ("POST /v1/me", 403),
            ("GET /v1/me?permission=SENDING", 403),
            ("GET /v1/me?x=/v1/emails", 403),
            ("GET /v1/me?permission=FULL&permission=", 403),
        ],
    )
    def test_a_key_may_call_what_the_table_names_and_nothing_else(
        self, proxy: ProxyStack, start: str, status: int
    ) -> None:
        """Method and whole path decide; a refusal says what would have sufficed."""
        fields = (auth_header(proxy.sender), b"Content-Length: 0")
        if status == 200:
            answered = proxy.request(start.encode(), *fields)
            assert identity(echoed(answered)) == identity_of(proxy.sender)
            return
        refused = proxy.request_refused(start.encode(), *fields)
        if refused.status == 400:  # some refuse unusual methods by themselves
            assert start.startswith(("post ", "POSTX "))
            return
        assert refused.status == 403
        assert_same_refusal(refused, proxy.sidecar.decision(auth_header(proxy.sender)))
        challenge = header_dict(refused)[b"www-authenticate"]
        assert b'error="insufficient_scope"' in challenge

    @pytest.mark.parametrize(
        "field",
        [
            b"X-Forwarded-Method: POST",
            b"X-Forwarded-Uri: /v1/emails",
            b"X-Original-Method: POST",
            b"X-Original-URL: /v1/emails",
            b"X-Original-URI: /v1/emails",
            b"X-Rewrite-URL: /v1/emails",
            b"X-HTTP-Method-Override: POST",
            b"X-Keylatch-Require: SENDING",
            b"X-Keylatch-Permission: FULL",
            b"Host: 127.0.0.1:8700",
            b"X-Forwarded-Host: 127.0.0.1:8700",
            b"Accept: */*\r\nX-Forwarded-Method: POST\r\nX-Forwarded-Uri: /v1/emails",
        ],
    )
    def test_no_header_changes_the_requirement(self, proxy: ProxyStack, field: bytes) -> None:
        """A SENDING key stays out, a FULL key in, and the facts for the sidecar are the proxy's."""
        assert proxy.request_refused(
            b"GET /v1/emails", auth_header(proxy.sender), field
        ).status in (400, 403)
        answered = proxy.request(b"GET /v1/emails", auth_header(proxy.full), field)
        if b"Host" not in field.split(b":")[0] or answered.status != 400:
            assert identity(echoed(answered)) == identity_of(proxy.full)

    @pytest.mark.parametrize(
        "name",
        [
            b"X-HTTP-Method-Override",
            b"X_HTTP_Method_Override",
            b"X-HTTP-Method",
            b"X-Method-Override",
        ],
    )
    def test_a_judged_method_is_the_method(self, proxy: ProxyStack, name: bytes) -> None:
        """The app never gets another one: the check used the real method."""
        fields = (auth_header(proxy.sender), b"Content-Length: 0", name + b": DELETE")
        seen = echoed(proxy.request(b"POST /v1/emails", *fields))
        assert "DELETE" not in json.dumps(seen)

    @pytest.mark.parametrize("name", SPELLINGS)
    def test_no_client_can_set_its_identity(self, proxy: ProxyStack, name: bytes) -> None:
        """In no spelling, once or twice, with a key or without: the app gets the sidecar's."""
        lies = (name + b": evil", name + b": evil2")
        keyed = echoed(proxy.request(b"GET /v1/me", auth_header(proxy.full), *lies))
        public = echoed(proxy.request(b"GET /healthz", *lies))
        assert identity(keyed) == identity_of(proxy.full)
        assert identity(public) == {}
        assert "evil" not in json.dumps([keyed, public])

    @pytest.mark.parametrize("name", [*(name.encode() for name in IDENTITY), b"Authorization"])
    def test_a_connection_header_takes_nothing_away(self, proxy: ProxyStack, name: bytes) -> None:
        """`Connection: X-Keylatch-Key-Id` would make an anonymous request of an allowed one."""
        lines = [b"GET /v1/me HTTP/1.1", b"Host: test", auth_header(proxy.full)]
        lines += [b"Connection: close, " + name, b"", b""]
        answered = parse_response(exchange(proxy.url, b"\r\n".join(lines)))
        if answered.status != 401:
            seen = echoed(answered)
            assert identity(seen) == identity_of(proxy.full)
            assert name.decode() not in "".join(values_of(seen, "connection"))

    @pytest.mark.parametrize("order", ["good bad", "bad good", "good good", "good empty"])
    def test_two_credentials_are_never_allowed(self, proxy: ProxyStack, order: str) -> None:
        """Whichever comes first: an app that reads the other one would accept a forged value."""
        fields = {
            "good": auth_header(proxy.full),
            "bad": b"Authorization: Bearer wrong",
            "empty": b"Authorization: Basic",
        }
        refused = proxy.request_refused(b"GET /v1/me", *(fields[word] for word in order.split()))
        assert refused.status in (400, 401)

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/emails/../me",
            "/v1/emails/..",
            "/v1/./emails",
            "/v1/../v1/emails",
            "//v1/emails",
            "/v1//emails",
            "/v1/emails/%2e%2e/me",
            "/v1/emails/.%2E/me",
            "/v1/emails%2f..%2fme",
            "/v1/emails%2F%2e%2e%2Fme",
            "/v1/emails\\..\\me",
            "/v1/emails/..;/me",
            "/v1/emails;/../me",
            "/v1/me/../emails",
            "/v1/me#/../emails",
            "/v1/email%73",
            "/v1/emails%00",
            "/v1/emails%3F",
            "/v1/emails%",
            "http://test/v1/me",
            "*",
        ],
    )
    def test_no_way_to_spell_a_path_reaches_another_permission(
        self, proxy: ProxyStack, path: str
    ) -> None:
        """A SENDING key: refused, or what the app gets is the very path that the table names."""
        count_before = proxy.app.request_count
        answered = proxy.request(
            f"POST {path}".encode(), auth_header(proxy.sender), b"Content-Length: 0"
        )
        if answered.status == 200:
            assert echoed(answered)["path"] == "/v1/emails"
            return
        assert answered.status in (400, 403, 404)
        assert proxy.app.request_count == count_before

    @pytest.mark.parametrize(
        "path",
        [
            "/healthz/../v1/me",
            "/v1/me/../../healthz",
            "/healthz/",
            "/healthz/x",
            "/healthz;/v1/me",
            "/healthz%2f..%2fv1%2fme",
            "/healthz%00",
            "/healthz#/../v1/me",
            "//healthz",
            "/./healthz",
            "/%68ealthz",
            "/HEALTHZ",
            "http://test/v1/me",
        ],
    )
    def test_no_way_to_spell_a_path_makes_it_public(self, proxy: ProxyStack, path: str) -> None:
        """Without a key: refused, or what the app gets is the very path that is public."""
        count_before = proxy.app.request_count
        answered = proxy.request(f"GET {path}".encode())
        if answered.status == 200:
            seen = echoed(answered)
            assert (seen["path"], identity(seen)) == ("/healthz", {})
            return
        assert answered.status in (400, 401, 404)
        assert proxy.app.request_count == count_before

    @pytest.mark.parametrize("fields", [[], [b"Authorization: Bearer wrong"]])
    def test_what_is_public_needs_no_key(self, proxy: ProxyStack, fields: list[bytes]) -> None:
        """And a bad one does no harm there; its query arrives."""
        seen = echoed(proxy.request(b"GET /healthz?deep=1", *fields))
        assert (seen["path"], seen["query"], identity(seen)) == ("/healthz", "deep=1", {})

    @pytest.mark.parametrize("fields", [[], [b"X-Keylatch-Key-Id: evil"]])
    def test_a_preflight_is_answered_by_the_app(
        self, proxy: ProxyStack, fields: list[bytes]
    ) -> None:
        """Browsers send it without the key; it is anonymous."""
        asking = (b"Origin: https://a.test", b"Access-Control-Request-Method: DELETE")
        seen = echoed(proxy.request(b"OPTIONS /v1/emails", *asking, *fields))
        assert (seen["method"], seen["path"], identity(seen)) == ("OPTIONS", "/v1/emails", {})

    @pytest.mark.parametrize(
        ("method", "fields"),
        [
            (b"OPTIONS", []),
            (b"OPTIONS", [b"Origin: https://a.test"]),
            (b"OPTIONS", [b"Access-Control-Request-Method: GET"]),
            (b"OPTIONS", [b"Origin:", b"Access-Control-Request-Method: GET b"]),
            (b"GET", [b"Origin: https://a.test", b"Access-Control-Request-Method: GET"]),
        ],
    )
    def test_nothing_else_passes_for_a_preflight(
        self, proxy: ProxyStack, method: bytes, fields: list[bytes]
    ) -> None:
        """An OPTIONS that is no CORS preflight request, and other methods, need a key."""
        assert proxy.request_refused(method + b" /v1/me", *fields).status in (400, 401)

    @pytest.mark.parametrize("key", ["full", "sender"])
    def test_a_large_body_arrives_whole(self, proxy: ProxyStack, key: str) -> None:
        """300 kB, as the sidecar never waits for any of it."""
        lines = [b"POST /v1/emails HTTP/1.1", b"Host: test", auth_header(getattr(proxy, key))]
        lines += [b"Content-Length: 300000", b"Connection: close", b"", 300_000 * b"x"]
        seen = echoed(parse_response(exchange(proxy.url, b"\r\n".join(lines))))
        assert seen["length"] == 300_000
        assert identity(seen) == identity_of(getattr(proxy, key))

    def test_a_large_body_without_a_key_is_refused(self, proxy: ProxyStack) -> None:
        """401, and nothing of it gets to the app."""
        count_before = proxy.app.request_count
        lines = [b"POST /v1/emails HTTP/1.1", b"Host: test", b"Content-Length: 300000"]
        lines += [b"Expect: 100-continue", b"Connection: close", b"", b""]
        received = exchange_until_idle(proxy.running.port, b"\r\n".join(lines))
        assert received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").startswith(b"HTTP/1.1 401 ")
        assert proxy.app.request_count == count_before

    def test_trailers_never_become_headers(self, proxy: ProxyStack) -> None:
        """Some app servers add them to the headers: they could forge an identity."""
        answered = parse_response(exchange(proxy.url, with_trailer(proxy.full)))
        if not self.chunked_bodies:
            assert answered.status == 411
            return
        seen = echoed(answered)
        assert (seen["length"], identity(seen)) == (5, identity_of(proxy.full))

    def test_two_lengths_are_not_two_requests(self, proxy: ProxyStack) -> None:
        """What is smuggled behind a length that contradicts the encoding never gets to the app."""
        smuggled = b"0\r\n\r\nGET /v1/smuggled HTTP/1.1\r\nHost: test\r\n\r\n"
        lines = [b"POST /v1/emails HTTP/1.1", b"Host: test", auth_header(proxy.full)]
        lines += [b"Content-Length: %d" % len(smuggled), b"Transfer-Encoding: chunked", b""]
        received = exchange_until_idle(proxy.running.port, b"\r\n".join([*lines, smuggled]))
        assert b"/v1/smuggled" not in received

    def test_requests_on_one_connection_are_judged_one_by_one(self, proxy: ProxyStack) -> None:
        """A request has nothing of an earlier one on the same connection."""
        good = [b"GET /v1/me HTTP/1.1", b"Host: test", auth_header(proxy.full), b"", b""]
        keyless = [b"GET /v1/me HTTP/1.1", b"Host: test", b"Connection: close", b"", b""]
        count_before = proxy.app.request_count
        received = exchange(proxy.url, b"\r\n".join(good) + b"\r\n".join(keyless))
        assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"401"]
        assert proxy.app.request_count == count_before + 1

    def test_concurrent_requests_keep_their_identities(self, proxy: ProxyStack) -> None:
        """Forty callers at once, on routes that both may call: no identity is mixed up."""

        def echoed_identity(key: Created) -> dict[str, list[str]]:
            return identity(
                echoed(proxy.request(b"POST /v1/emails", auth_header(key), b"Content-Length: 0"))
            )

        keys = [proxy.full, proxy.sender] * 20
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(echoed_identity, keys)) == [identity_of(key) for key in keys]

    @pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 502, 503])
    def test_what_the_app_answers_is_not_touched(self, proxy: ProxyStack, status: int) -> None:
        """Its own refusals and faults are its own: never turned into the sidecar's."""
        answered = proxy.request(b"GET /status/%d" % status, auth_header(proxy.full))
        headers = header_dict(answered)
        assert answered.status == status
        assert headers[b"x-echo"] == b"the app"
        assert json.loads(answered.body)["path"] == f"/status/{status}"
        assert b"x-keylatch-error" not in headers
        if status == 401:
            assert headers[b"www-authenticate"] == b'Basic realm="the app"'

    def test_a_websocket_opens_with_a_good_key(self, proxy: ProxyStack) -> None:
        """The app knows whose it is; messages go both ways."""
        headers = {
            "Authorization": f"Bearer {proxy.full.token.reveal()}",
            "X-Keylatch-Key-Id": "evil",
        }
        url = f"ws://127.0.0.1:{proxy.running.port}/v1/live"
        with connect(url, additional_headers=headers, proxy=None) as chat:
            seen = json.loads(chat.recv(timeout=10))
            assert identity(seen) == identity_of(proxy.full)
            for text in ("one", "two"):
                chat.send(text)
                assert chat.recv(timeout=10) == text

    @pytest.mark.parametrize(("who", "status"), [("anonymous", 401), ("bad", 401), ("sender", 403)])
    def test_a_websocket_does_not_open_otherwise(
        self, proxy: ProxyStack, who: str, status: int
    ) -> None:
        """The handshake is refused like any other request."""
        token = {"anonymous": "", "bad": "wrong", "sender": proxy.sender.token.reveal()}[who]
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        count_before = proxy.app.request_count
        url = f"ws://127.0.0.1:{proxy.running.port}/v1/live"
        with pytest.raises(InvalidStatus) as refused:
            connect(url, additional_headers=headers, proxy=None)
        assert refused.value.response.status_code == status
        assert proxy.app.request_count == count_before

    def test_only_websockets_are_upgrades(self, proxy: ProxyStack) -> None:
        """With `Upgrade: h2c` a client could talk to the app past the proxy."""
        lines = [b"GET /v1/me HTTP/1.1", b"Host: test", auth_header(proxy.full)]
        lines += [b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"]
        lines += [b"Connection: Upgrade, HTTP2-Settings", b"", b""]
        received = exchange_until_idle(proxy.running.port, b"\r\n".join(lines))
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b"h2c" not in received

    def test_no_key_is_written_anywhere(self, proxy: ProxyStack) -> None:
        """Not into a log, not into a temporary file: allowed, refused or upgraded."""
        secrets = [key.token.reveal().encode()[-40:] for key in (proxy.full, proxy.sender)]
        proxy.request(b"GET /v1/me", auth_header(proxy.full))
        proxy.request(b"GET /v1/me", auth_header(proxy.sender))
        for file in (file for file in proxy.running.folder.rglob("*") if file.is_file()):
            written = file.read_bytes()
            assert not any(secret in written for secret in secrets), file

    def test_a_sidecar_that_is_gone_means_503_until_it_is_back(self, proxy: ProxyStack) -> None:
        """In time; public routes go on; the first request after the restart is served."""
        assert proxy.request(b"GET /v1/me", auth_header(proxy.full)).status == 200
        proxy.sidecar.stop()
        began = time.monotonic()
        for fields in ([auth_header(proxy.full)], []):
            assert_unavailable(proxy.request_refused(b"GET /v1/me", *fields))
        assert time.monotonic() - began < 2 * PATIENCE_SECONDS
        assert proxy.request(b"GET /healthz").status == 200
        proxy.sidecar.start()
        assert proxy.request(b"GET /v1/me", auth_header(proxy.full)).status == 200

    def test_connections_that_a_restart_closed_are_not_missed(self, proxy: ProxyStack) -> None:
        """Killed and restarted between two requests: the kept connections lead nowhere."""
        with ThreadPoolExecutor(8) as pool:
            asking = [
                pool.submit(proxy.request, b"GET /v1/me", auth_header(proxy.full))
                for _ in range(24)
            ]
            assert {request.result().status for request in asking} == {200}
        proxy.sidecar.kill()
        proxy.sidecar.start()
        answers = [proxy.request(b"GET /v1/me", auth_header(proxy.full)).status for _ in range(12)]
        assert answers == 12 * [200]

    def test_a_sidecar_that_hangs_means_503_in_time(self, proxy: ProxyStack) -> None:
        """Long before a proxy's usual minute, for seventy callers at once; and all is well when it
        goes on."""

        def timed_request(_: int) -> float:
            began = time.monotonic()
            assert_unavailable(proxy.request_refused(b"GET /v1/me", auth_header(proxy.full)))
            return time.monotonic() - began

        proxy.sidecar.pause()
        try:
            with ThreadPoolExecutor(70) as pool:
                assert max(pool.map(timed_request, range(70))) < PATIENCE_SECONDS
            assert proxy.request(b"GET /healthz").status == 200
        finally:
            proxy.sidecar.resume()
        assert proxy.request(b"GET /v1/me", auth_header(proxy.full)).status == 200

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"HTTP/1.1",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1 200 OK\r\nContent-",
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            BROKEN,
            BROKEN.replace(b"Content-Length", NAMED + b"Content-Length"),
        ],
    )
    def test_nothing_but_an_allow_is_an_allow(
        self, proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy], answer: bytes
    ) -> None:
        """Whatever else comes from the sidecar's address is 503, and the app is not called."""
        injector, other = proxy_with_fault
        count_before = proxy.app.request_count
        with injector.responding(answer):
            answered = send(other.url, b"GET /v1/me", auth_header(proxy.full))
        if answered.status == 100:  # some hand that on, and then answer
            answered = parse_response(answered.body)
        assert_unavailable(answered)
        assert proxy.app.request_count == count_before

    def test_a_sidecar_that_limits_a_key_is_understood(
        self, proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy]
    ) -> None:
        """429 with its `Retry-After` where the proxy passes it on; the app is not called."""
        injector, other = proxy_with_fault
        count_before = proxy.app.request_count
        with injector.responding(TOO_MANY):
            answered = send(other.url, b"GET /v1/me", auth_header(proxy.full))
        assert proxy.app.request_count == count_before
        if self.passes_429:
            assert_rate_limited(answered)
            assert header_dict(answered)[b"retry-after"] == b"7"
        else:
            assert_unavailable(answered)

    def is_rate_limited(self, answer: RawResponse) -> None:
        """The proxy's own 429; some cannot say it as JSON."""
        assert_rate_limited(answer)

    def test_a_key_beyond_its_rate_limit_gets_429(self, proxy: ProxyStack) -> None:
        """It alone: not another key, nor what is public. The app is not called, no key is logged.
        The public part of a key is not enough to use up its limit."""
        if not proxy.kind.limited:
            pytest.skip(f"the files of {proxy.kind.name} set no limit")
        count_before = proxy.app.request_count
        with running_proxy(
            proxy.kind, proxy.app_url, proxy.sidecar.port, proxy.kind.limited
        ) as other:
            for end in b"abcd":
                forged = auth_header(proxy.full)[:-40] + 40 * bytes([end])
                assert send(other.url, b"GET /v1/me", forged).status == 401
            for scheme in (b"Bearer ", b"bEARER  "):
                presented = auth_header(proxy.full).replace(b"Bearer ", scheme)
                assert send(other.url, b"GET /v1/me", presented).status == 200
            self.is_rate_limited(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
            self.is_rate_limited(send(other.url, b"POST /v1/emails", auth_header(proxy.full)))
            assert proxy.app.request_count == count_before + 2
            assert send(other.url, b"POST /v1/emails", auth_header(proxy.sender)).status == 200
            for _ in range(4):
                assert send(other.url, b"GET /healthz").status == 200
                assert send(other.url, b"GET /v1/me").status == 401
            for file in (file for file in other.folder.rglob("*") if file.is_file()):
                assert proxy.full.token.reveal().encode() not in file.read_bytes(), file

    def test_an_allow_without_identity_forwards_no_identity_of_the_client(
        self, proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy]
    ) -> None:
        """200 from another server than the sidecar: refused, or the app gets no identity."""
        injector, other = proxy_with_fault
        lies = [name + b": evil" for name in SPELLINGS]
        with injector.responding(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"):
            answered = send(other.url, b"GET /v1/me", auth_header(proxy.full), *lies)
        if answered.status != 503:
            seen = echoed(answered)
            assert identity(seen) == {}
            assert "evil" not in json.dumps(seen)

    def test_the_check_has_its_fields_and_no_other_of_the_client(
        self, proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy]
    ) -> None:
        """One check per request: the permission, the credential, method and URI; no body."""
        injector, other = proxy_with_fault
        with injector.responding(BROKEN):
            head = [b"POST /v1/emails?permission=X HTTP/1.1", b"Host: test", b"Cookie: secret=1"]
            head += [auth_header(proxy.full), b"X-Forwarded-Method: GET", b"X-Evil: 1"]
            head += [b"Content-Length: 5", b"Connection: close", b"", b"hello"]
            exchange(other.url, b"\r\n".join(head))
        (question,) = injector.requests
        first, *fields = question.partition(b"\r\n\r\n")[0].split(b"\r\n")
        assert first.split(b" ")[1] == self.sidecar_request_target
        assert question.endswith(b"\r\n\r\n")
        sent = [
            (name.lower(), value.strip()) for name, _, value in (f.partition(b":") for f in fields)
        ]
        credential = auth_header(proxy.full).partition(b": ")[2]
        for name, value in {b"authorization": credential, **self.sidecar_request_headers}.items():
            assert [v for n, v in sent if n == name] == [value]
        assert [v for n, v in sent if n == b"content-length"] in ([], [b"0"])
        names = {name for name, _ in sent}
        assert names.isdisjoint({b"transfer-encoding", *self.dropped_headers})

    def test_a_connection_that_closes_during_a_check_is_replaced(
        self, proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy]
    ) -> None:
        """Closed by the sidecar while a check is being sent: it is retried on a new one."""
        injector, other = proxy_with_fault
        allow = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + NAMED + b"\r\n"
        with injector.responding(allow, closes_after_next_request=True):
            answers = [send(other.url, b"GET /v1/me", auth_header(proxy.full)) for _ in range(6)]
        assert [answered.status for answered in answers] == 6 * [200]
        assert len(injector.requests) == 6

    @pytest.mark.parametrize("who", ["full", "anonymous"])
    def test_many_requests_share_few_connections_to_the_sidecar(
        self, proxy: ProxyStack, proxy_with_fault: tuple[FaultInjector, Proxy], who: str
    ) -> None:
        """Allowed or refused: a flood of invalid keys does not open a connection each."""
        if not self.keeps_connections:
            pytest.skip("it must not: see its files")
        injector, other = proxy_with_fault
        fields = [auth_header(proxy.full)] if who == "full" else []
        before = injector.connections
        for _ in range(60):
            assert send(other.url, b"GET /v1/me", *fields).status == (200 if fields else 401)
        assert injector.connections - before <= 2 * (os.cpu_count() or 1)

    def test_checks_work_over_a_unix_socket(self, proxy: ProxyStack) -> None:
        """The other spelling that the files name; the sidecar with its default settings."""
        if proxy.kind.unix_format is None:
            pytest.skip(f"{proxy.kind.name} cannot")
        with tempfile.TemporaryDirectory(prefix="keylatch-uds-") as temporary:
            folder = Path(temporary)
            folder.chmod(0o755)
            place = folder / "keylatch.sock"
            sidecar = proxy.kind.sidecar(folder, place)
            try:
                with running_proxy(proxy.kind, proxy.app_url, place) as other:
                    key = sidecar.create()
                    seen = echoed(send(other.url, b"GET /v1/me", auth_header(key)))
                    assert identity(seen) == identity_of(key)
                    refused = send(other.url, b"GET /v1/me", auth_header(proxy.full))
                    assert refused.status == 401  # a key of the other sidecar
                    sidecar.stop()
                    assert_unavailable(send(other.url, b"GET /v1/me", auth_header(key)))
            finally:
                sidecar.close()


def properties(reports: Iterable[tuple[str, str]]) -> list[str]:
    """The table proxy x property, from pytest's outcomes ("passed", "failed") and test names."""
    cells: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    claims = [name for name in vars(ProxyContract) if name.startswith("test_")]
    for outcome, name in reports:
        found = re.search(r"test_(\w+)\.py::Test\w+::(test_\w+)", name)
        if found and found[2] in claims:
            cells[found[1]][found[2]][outcome] += 1
            cells[found[1]]["in all"][outcome] += 1

    def row(heading: str, words: Iterable[str]) -> str:
        return f"{heading:<82}" + "".join(f"{word:>13}" for word in words)

    def cell(counts: Counter[str]) -> str:
        return f"{counts['passed']}" + f" ({counts['failed']})" * bool(counts["failed"])

    proxies = sorted(cells)
    return [row("", proxies)] + [
        row(claim.removeprefix("test_").replace("_", " "), (cell(cells[p][claim]) for p in proxies))
        for claim in [*claims, "in all"]
    ]
