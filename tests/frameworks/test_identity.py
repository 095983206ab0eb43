"""Behind a proxy: identity comes from its headers, from nobody else's, and is as without one."""

from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylatch.asgi import ProxyIdentityMiddleware
from keylatch.errors import ConfigurationError
from keylatch.identity import principal_in
from keylatch.model import Principal, Reason
from keylatch.wsgi import ProxyIdentityMiddleware as WSGIProxyIdentityMiddleware
from keylatch_sidecar.proxies.answers import identity_headers
from wire import Header, knock

SOMEBODY = Principal("key_a", "Grüße, 日本 %0d", "acme", "SENDING", "live")
TOLD = [*identity_headers(SOMEBODY)]
TRUSTED = ["127.0.0.1", "10.1.0.0/16", "::1", "unix"]


class Apps:
    """The same gate over ASGI and WSGI, around apps that note whom they see."""

    def __init__(self, **arguments: Any) -> None:
        given = {"trusted": TRUSTED, "public": ["POST /healthz"], **arguments}
        self.seen: list[Any] = []
        self._asgi = ProxyIdentityMiddleware(self._over_asgi, **given)
        self._wsgi = WSGIProxyIdentityMiddleware(self._over_wsgi, **given)

    async def _over_asgi(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope["user"])
        assert not [name for name, _ in scope["headers"] if name.startswith(b"x-keylatch")]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def _over_wsgi(self, environ: Any, start_response: Any) -> list[bytes]:
        self.seen.append(environ["keylatch.principal"])
        assert not [name for name in environ if name.startswith("HTTP_X_KEYLATCH")]
        start_response("200 OK", [])
        return []

    async def ask(
        self, headers: list[Header], peer: str | None = "127.0.0.1", path: str = "/v1/emails"
    ) -> int:
        """The status that both of them answer."""
        client = None if peer is None else (peer, 1)
        over_asgi = await knock(self._asgi, path, headers, client=client, method="POST")
        environ: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": "POST"}
        for name, value in headers:
            folded = "HTTP_" + name.decode().upper().replace("-", "_")
            before = environ.get(folded)
            environ[folded] = value.decode() if before is None else f"{before},{value.decode()}"
        setup_testing_defaults(environ)
        environ["REMOTE_ADDR"] = peer or ""
        said: list[str] = []
        list(self._wsgi(environ, lambda status, headers, exc_info=None: said.append(status)))  # type: ignore[arg-type]
        assert int(said[0][:3]) == over_asgi.status
        return over_asgi.status


@pytest.mark.anyio
@pytest.mark.parametrize("peer", ["127.0.0.1", "10.1.200.3", "::1", "::ffff:10.1.0.1", None])
async def test_a_trusted_peer_says_who_calls(peer: str | None) -> None:
    """What the sidecar answers arrives as the very principal that the direct middleware gives."""
    apps = Apps()
    assert await apps.ask(TOLD, peer) == 200
    assert apps.seen == [SOMEBODY, SOMEBODY]


@pytest.mark.anyio
@pytest.mark.parametrize("peer", ["10.2.0.1", "192.0.2.1", "::2", "localhost", "unix", "nonsense"])
async def test_nobody_else_does(peer: str) -> None:
    """Whoever reaches the app without the proxy is nobody, whatever he writes."""
    apps = Apps()
    assert await apps.ask(TOLD, peer) == 401
    assert apps.seen == []


@pytest.mark.anyio
async def test_a_unix_socket_is_trusted_only_by_name() -> None:
    """It is not an address, and no default."""
    assert await Apps(trusted=["127.0.0.1"]).ask(TOLD, None) == 401


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 401),
        ([(b"x-keylatch-key-id", b""), *TOLD[1:]], 401),
        (TOLD[1:], 401),
        ([*TOLD, (b"x-keylatch-key-id", b"key_b")], 400),
        ([*TOLD, (b"x-keylatch-key-id", b"key_a")], 400),
        ([(b"x-keylatch-key-id", b"key_a,key_b"), *TOLD[1:]], 400),
        ([(b"X-Keylatch-Key-Id", b"key_a")], 200),
        ([(b"x-keylatch-key-id", b"key_a")], 200),
    ],
)
async def test_identity_is_complete_and_said_once_or_nobodys(
    headers: list[Header], status: int
) -> None:
    """A missing id is 401 and never anonymous; two of a kind are 400."""
    assert await Apps().ask(headers) == status


@pytest.mark.parametrize("name", [b"x_keylatch_key_id", b"X-Keylatch_Key-Id", b"x-keylatch-key_id"])
def test_look_alikes_are_refused(name: bytes) -> None:
    """Only a client spells them so."""
    assert principal_in([*TOLD, (name, b"key_b")]) is Reason.MALFORMED


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_what_the_sidecar_says_is_what_the_app_hears(name: str) -> None:
    """For every name that a key may have, and more."""
    principal = Principal("key_a", name, "acme", "FULL", "live")
    assert principal_in(identity_headers(principal)) == principal


@pytest.mark.anyio
async def test_rules_hold_here_too_if_they_are_given() -> None:
    """Without them, the proxy asks for permissions, route by route."""
    rules = {"SENDING": ["POST /v1/emails"]}
    assert await Apps(permissions=rules).ask(TOLD) == 200
    assert await Apps(permissions=rules).ask(TOLD, path="/v1/domains") == 403
    assert await Apps().ask(TOLD, path="/v1/domains") == 200


@pytest.mark.anyio
async def test_a_public_path_is_nobodys_and_open() -> None:
    """Whoever asks, and whatever he says of himself."""
    apps = Apps()
    assert await apps.ask(TOLD, "192.0.2.1", "/healthz") == 200
    assert [user.is_authenticated for user in apps.seen] == [False, False]


def test_wrong_peers_are_all_named() -> None:
    """With a hint for each."""
    with pytest.raises(ConfigurationError) as caught:
        ProxyIdentityMiddleware(lambda *_: None, trusted=["host", "10.0.0.1/8"], public="/x")  # type: ignore[arg-type]
    assert len(caught.value.mistakes) == 3
    nobody: list[str] = []
    for trusted in (nobody, "127.0.0.1"):
        with pytest.raises(ConfigurationError):
            ProxyIdentityMiddleware(lambda *_: None, trusted=trusted)  # type: ignore[arg-type]
