"""Behind a proxy: identity comes from its headers only, and is the same as without a proxy."""

import socket
from types import SimpleNamespace
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylatch.adapters.proxy_identity import UNIX, principal_from_headers
from keylatch.asgi import ProxyIdentityMiddleware
from keylatch.core.decisions import Principal, Reason
from keylatch.errors import ConfigurationError
from keylatch.wsgi import ProxyIdentityMiddleware as WSGIProxyIdentityMiddleware
from keylatch_sidecar.forward_auth.decision import identity_headers
from tests.support.raw_http import Header, asgi_request

SOMEBODY = Principal("key_a", "Grüße, 日本 %0d", "acme", "SENDING", "live")
TOLD = [*identity_headers(SOMEBODY)]
TRUSTED = ["127.0.0.1", "10.1.0.0/16", "::1", "unix"]


class Apps:
    """`ProxyIdentity` over ASGI and WSGI, around apps that record the principal."""

    def __init__(self, **arguments: Any) -> None:
        given = {"trusted": TRUSTED, "public": ["POST /healthz"], **arguments}
        self.seen: list[Any] = []
        self.over_asgi = ProxyIdentityMiddleware(self._app_over_asgi, **given)
        self._wsgi = WSGIProxyIdentityMiddleware(self._over_wsgi, **given)

    async def _app_over_asgi(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope["user"])
        assert not [name for name, _ in scope["headers"] if name.startswith(b"x-keylatch")]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def _over_wsgi(self, environ: Any, start_response: Any) -> list[bytes]:
        self.seen.append(environ["keylatch.principal"])
        assert not [name for name in environ if name.startswith("HTTP_X_KEYLATCH")]
        start_response("200 OK", [])
        return []

    async def get(
        self,
        headers: list[Header],
        peer: str | None = "127.0.0.1",
        path: str = "/v1/emails",
        over: str = "TCP",
    ) -> int:
        """The status that both of them answer.

        Args:
            headers: of the request.
            peer: its address; None: the server knows none.
            path: of the request.
            over: what the server says that it came over, `TCP` or `unix`; empty: it does not say.
        """
        came_to = {"TCP": ("127.0.0.1", 80), UNIX: ("/run/app.sock", None)}
        addresses = {"client": peer and (peer, 1), "server": came_to.get(over)}
        over_asgi = await asgi_request(self.over_asgi, path, headers, method="POST", **addresses)
        environ: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": "POST"}
        for name, value in headers:
            folded = "HTTP_" + name.decode().upper().replace("-", "_")
            before = environ.get(folded)
            environ[folded] = value.decode() if before is None else f"{before},{value.decode()}"
        setup_testing_defaults(environ)
        environ["REMOTE_ADDR"] = peer or ""
        if over:
            family = socket.AF_UNIX if over == UNIX else socket.AF_INET
            environ["gunicorn.socket"] = SimpleNamespace(family=family)
        said: list[str] = []
        list(self._wsgi(environ, lambda status, headers, exc_info=None: said.append(status)))  # type: ignore[arg-type]
        assert int(said[0][:3]) == over_asgi.status
        return over_asgi.status


@pytest.mark.anyio
@pytest.mark.parametrize("peer", ["127.0.0.1", "10.1.200.3", "::1", "::ffff:10.1.0.1", None])
async def test_a_trusted_peer_says_who_calls(peer: str | None) -> None:
    """What the sidecar answers arrives as the very principal that the direct middleware gives."""
    apps = Apps()
    assert await apps.get(TOLD, peer, over="TCP" if peer else UNIX) == 200
    assert apps.seen == [SOMEBODY, SOMEBODY]


@pytest.mark.anyio
@pytest.mark.parametrize("peer", ["10.2.0.1", "192.0.2.1", "::2", "localhost", "unix", "nonsense"])
async def test_no_other_client_sets_an_identity(peer: str) -> None:
    """A request that does not come from the proxy has no identity, whatever its headers."""
    apps = Apps()
    assert await apps.get(TOLD, peer) == 401
    assert apps.seen == []


@pytest.mark.anyio
async def test_other_clients_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """500 requests from as many addresses: nine lines for each of the two, with the count."""
    apps = Apps()
    for number in range(500):
        await apps.get(TOLD, f"192.0.2.{number % 250}")
    first = "192.0.2.0 is not a trusted peer: its identity headers are ignored"
    last = "192.0.2.5 is not a trusted peer: its identity headers are ignored; 256 times so far"
    assert [caplog.messages.count(each) for each in (first, last)] == [2, 2]
    assert len(caplog.messages) == 18


@pytest.mark.anyio
async def test_a_unix_socket_is_trusted_only_by_name() -> None:
    """It is not an address, and no default."""
    assert await Apps(trusted=["127.0.0.1"]).get(TOLD, None, over=UNIX) == 401


@pytest.mark.anyio
@pytest.mark.parametrize("peer", [None, "", "192.0.2.1"])
@pytest.mark.parametrize("over", ["TCP", ""])
async def test_a_peer_without_an_address_is_not_a_unix_socket_for_that(
    peer: str | None, over: str
) -> None:
    """A connection that was reset has no address any more; only the server can say what it was."""
    apps = Apps()
    assert await apps.get(TOLD, peer, over=over) == 401
    assert apps.seen == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "server",
    [
        *(None, (), ("", None), ("127.0.0.1", None), ("::1", None), ("localhost", None)),
        *(("app", None), ("127.0.0.1", "0"), ("/run/app.sock", 80), ("/", "t")),
    ],
)
async def test_only_a_path_without_a_port_is_a_unix_socket(server: Any) -> None:
    """The last is what gunicorn's own ASGI worker makes of any path: it is taken for none."""
    apps = Apps()
    app = apps.over_asgi
    assert (await asgi_request(app, "/x", TOLD, client=None, server=server)).status == 401
    assert apps.seen == []


@pytest.mark.anyio
async def test_an_address_counts_before_a_unix_socket() -> None:
    """Where a proxy names the client (PROXY protocol, X-Forwarded-For), the client is the peer."""
    assert await Apps().get(TOLD, "192.0.2.1", over=UNIX) == 401


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 401),
        *(([*TOLD[:place], *TOLD[place + 1 :]], 401) for place in range(len(TOLD))),
        *(
            ([*TOLD[:place], (TOLD[place][0], b""), *TOLD[place + 1 :]], 401)
            for place in range(len(TOLD))
        ),
        ([*TOLD, (b"x-keylatch-key-id", b"key_b")], 400),
        ([*TOLD, (b"x-keylatch-key-id", b"key_a")], 400),
        ([(b"x-keylatch-key-id", b"key_a,key_b"), *TOLD[1:]], 400),
        ([(b"X-Keylatch-Key-Id", b"key_a")], 401),
        ([(name.title(), value) for name, value in TOLD], 200),
    ],
)
async def test_identity_is_complete_and_single_or_none(headers: list[Header], status: int) -> None:
    """What is missing or empty is 401 and never anonymous, and grants nothing: an app may take an
    environment of "" for one that is not `test`. Two of a kind are 400."""
    assert await Apps().get(headers) == status


@pytest.mark.parametrize("name", [b"x_keylatch_key_id", b"X-Keylatch_Key-Id", b"x-keylatch-key_id"])
def test_look_alikes_are_refused(name: bytes) -> None:
    """Only a client spells them so."""
    assert principal_from_headers([*TOLD, (name, b"key_b")]) is Reason.MALFORMED


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_the_app_gets_the_identity_that_the_sidecar_sends(name: str) -> None:
    """For every name that a key may have, and more."""
    principal = Principal("key_a", name, "acme", "FULL", "live")
    assert principal_from_headers(identity_headers(principal)) == principal


@pytest.mark.anyio
async def test_rules_hold_here_too_if_they_are_given() -> None:
    """Without them, the proxy asks for permissions, route by route."""
    rules = {"SENDING": ["POST /v1/emails"]}
    assert await Apps(permissions=rules).get(TOLD) == 200
    assert await Apps(permissions=rules).get(TOLD, path="/v1/domains") == 403
    assert await Apps().get(TOLD, path="/v1/domains") == 200


@pytest.mark.anyio
async def test_a_public_path_is_open_and_has_no_principal() -> None:
    """For every client, whatever identity headers it sends."""
    apps = Apps()
    assert await apps.get(TOLD, "192.0.2.1", "/healthz") == 200
    assert [user.is_authenticated for user in apps.seen] == [False, False]


def test_wrong_peers_are_all_named() -> None:
    """With a hint for each."""
    with pytest.raises(ConfigurationError) as caught:
        ProxyIdentityMiddleware(lambda *_: None, trusted=["host", "10.0.0.1/8"], public="/x")  # type: ignore[arg-type]
    assert len(caught.value.mistakes) == 3
    no_proxies: list[str] = []
    for trusted in (no_proxies, "127.0.0.1"):
        with pytest.raises(ConfigurationError):
            ProxyIdentityMiddleware(lambda *_: None, trusted=trusted)  # type: ignore[arg-type]
