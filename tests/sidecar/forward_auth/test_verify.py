"""`/verify`: what proxies may rely on, byte by byte, and what clients cannot do to it."""

from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.core.decisions import FULL, Principal
from keylatch.engine import Engine
from keylatch.errors import StoreUnavailable
from keylatch.management.keyring import Created
from keylatch_sidecar.app import create_app
from keylatch_sidecar.forward_auth.decision import identity_headers
from keylatch_sidecar.forward_auth.verify import requirement_from_query
from tests.support.engines import MakeEngine
from tests.support.raw_http import asgi_request, exchange, expected_response, parse_response, send
from tests.support.sidecars import Sidecar

NAME = 'Grüße, "ASGI"/日本 %0d%0aX-Evil: 1'


@pytest.fixture(scope="module")
def full(sidecar: Sidecar) -> Created:
    return sidecar.create(name=NAME)


@pytest.fixture(scope="module")
def sender(sidecar: Sidecar) -> Created:
    return sidecar.create(permission="SENDING", environment="test")


def auth_header(key: Created) -> bytes:
    return b"Authorization: Bearer " + key.token.reveal().encode()


def verify(sidecar: Sidecar, key: Created, query: str = "") -> int:
    return send(sidecar.url, b"GET /verify" + query.encode(), auth_header(key)).status


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_an_allow_is_empty_and_names_the_caller(
    sidecar: Sidecar, full: Created, method: bytes
) -> None:
    """200, no body, `Content-Length: 0`, and every identity header in lower case and ASCII."""
    allowed = send(sidecar.url, method + b" /verify", auth_header(full))
    record = full.record
    assert allowed == expected_response(
        200,
        {
            b"cache-control": b"no-store",
            b"x-keylatch-key-id": record.id.encode(),
            b"x-keylatch-key-name": quote(NAME, safe="").encode(),
            b"x-keylatch-organization-id": record.organization_id.encode(),
            b"x-keylatch-permission": b"FULL",
            b"x-keylatch-environment": b"live",
        },
        b"",
    )
    assert unquote(dict(allowed.headers)[b"x-keylatch-key-name"].decode()) == NAME


@given(st.text(min_size=1, max_size=100))
def test_whatever_a_key_is_called_stays_in_its_header(name: str) -> None:
    """A name cannot end its header or leave ASCII, not even one that no key may have."""
    name = name.encode("utf-8", "replace").decode()
    headers = dict(identity_headers(Principal("key_1", name, "", "FULL", "")))
    value = headers[b"x-keylatch-key-name"].decode("ascii")
    assert value.isprintable()
    assert " " not in value
    assert unquote(value) == name
    assert headers[b"x-keylatch-organization-id"] == headers[b"x-keylatch-environment"] == b""


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"PROPFIND"])
def test_other_methods_are_not_allowed(sidecar: Sidecar, full: Created, method: bytes) -> None:
    """405 with `Allow`, for every client."""
    refused = send(sidecar.url, method + b" /verify", auth_header(full))
    assert refused == expected_response(
        405,
        {
            b"allow": b"GET, HEAD",
            b"content-type": b"application/json",
            b"cache-control": b"no-store",
            b"x-keylatch-error": b"method_not_allowed",
        },
        b'{"error":"method_not_allowed","error_description":"GET or HEAD"}',
    )


@pytest.mark.parametrize(
    ("query", "full_may", "sender_may"),
    [
        ("", 200, 200),
        ("?", 200, 200),
        ("?permission=SENDING", 200, 200),
        ("?permission=SENDING&permission=SENDING", 200, 200),
        ("?permission=%53ENDING", 200, 200),
        ("?permission=FULL", 200, 403),
        ("?permission=READING", 200, 403),
        ("?permission=READING&permission=SENDING", 200, 403),
        ("?permission=SENDING&permission=FULL", 200, 403),
        ("?permission", 200, 403),
        ("?permission=", 200, 403),
        ("?permission=SENDING&permission=", 200, 403),
        ("?permission=sending", 200, 403),
        ("?permission=SENDING;permission=SENDING", 200, 403),
        ("?permission=SENDING%0a", 200, 403),
        ("?permission=%00", 200, 403),
        ("?permission=%ff", 200, 403),
        ("?permission=SENDING+", 200, 403),
        ("?permission=SENDING,FULL", 200, 403),
    ],
)
def test_permissions_add_up_and_a_malformed_one_leaves_only_full(
    sidecar: Sidecar, full: Created, sender: Created, query: str, full_may: int, sender_may: int
) -> None:
    """A proxy whose variable was never set must not get an allow."""
    assert verify(sidecar, full, query) == full_may
    assert verify(sidecar, sender, query) == sender_may


@given(st.binary(max_size=60) | st.just(b"permission=SENDING"))
def test_what_a_client_appends_only_makes_it_harder(appended: bytes) -> None:
    """Some proxies append their client's query to ours: it can never weaken it."""
    ours = requirement_from_query(b"permission=SENDING").permissions
    theirs = requirement_from_query(b"permission=SENDING&" + appended).permissions
    assert ours is not None
    assert theirs is not None
    assert {FULL} <= theirs <= ours


@pytest.mark.parametrize(
    "attack",
    [
        b"permission=A%22%0d%0aX-Evil:%201",
        b"permission=A%0d%0a%0d%0a<p>",
        b"permission=%22,%20Basic%20realm=%22x",
        b"&".join(b"permission=P%d" % number for number in range(2000)),
        b"permission=" + b"A" * 20_000,
    ],
)
def test_a_query_cannot_write_headers(sidecar: Sidecar, sender: Created, attack: bytes) -> None:
    """What is named in the challenge is a short word or two, whatever was required."""
    refused = send(sidecar.url, b"GET /verify?" + attack, auth_header(sender))
    expected = b'Bearer realm="keylatch", error="insufficient_scope", scope="FULL"'
    assert refused.status == 403
    assert dict(refused.headers)[b"www-authenticate"] == expected
    assert len(refused.headers) == 5


def test_the_challenge_names_the_permission(sidecar: Sidecar, sender: Created) -> None:
    """RFC 6750, 3: the scopes, each once, in one order."""
    query = b"GET /verify?permission=B&permission=A&permission=B"
    challenge = dict(send(sidecar.url, query, auth_header(sender)).headers)[b"www-authenticate"]
    assert challenge.endswith(b'scope="A B"')


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ((), b"unauthorized"),
        ((b"Authorization: Basic abc",), b"unauthorized"),
        ((b"Authorization: Bearer",), b"invalid_request"),
        ((b"Authorization: Bearer a", b"Authorization: Bearer a"), b"invalid_request"),
        ((b"Authorization: Bearer " + b"a" * 600,), b"invalid_request"),
        ((b"Authorization: Bearer made-up",), b"invalid_token"),
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_every_bad_credential_is_401(
    sidecar: Sidecar, fields: tuple[bytes, ...], error: bytes, method: bytes
) -> None:
    """Never 400, which nginx's auth_request turns into 500; the header has the exact status."""
    refused = send(sidecar.url, method + b" /verify", *fields)
    assert refused.status == 401
    headers = dict(refused.headers)
    assert headers[b"x-keylatch-error"] == error
    assert headers[b"www-authenticate"].startswith(b'Bearer realm="keylatch"')
    assert headers[b"cache-control"] == b"no-store"
    assert (refused.body == b"") is (method == b"HEAD")
    assert not [name for name in headers if name.startswith(b"x-keylatch-key")]


@pytest.mark.parametrize("path", [b"/verify/", b"/verify/x", b"/Verify", b"//verify", b"/verif"])
def test_neighbours_are_not_found_and_never_redirected(
    sidecar: Sidecar, full: Created, path: bytes
) -> None:
    """A redirect would mean 500 to nginx, and an allow would be a hole."""
    assert send(sidecar.url, b"GET " + path, auth_header(full)).status == 404


def test_a_connection_serves_many_checks(sidecar: Sidecar, full: Created, sender: Created) -> None:
    """Answers without a body keep the proxy's connection open, refusals included."""
    pipelined = b"".join(
        b"\r\n".join((b"%s /verify HTTP/1.1" % method, b"Host: test", *fields, b"", b""))
        for method, fields in (
            (b"GET", (auth_header(full),)),
            (b"HEAD", ()),
            (b"HEAD", (auth_header(sender), b"Connection: close")),
        )
    )
    one, two, three, rest = exchange(sidecar.url, pipelined).split(b"\r\n\r\n")
    assert [parse_response(head).status for head in (one, two, three)] == [200, 401, 200]
    assert rest == b""


class Unreachable(Hasher):
    """Stands for whatever the decision needs and does not get."""

    async def verify(self, stored: str, token: object) -> bool:
        raise StoreUnavailable("it is down, says the test")


@pytest.mark.anyio
async def test_what_cannot_be_decided_is_503(make_engine: MakeEngine, engine: Engine) -> None:
    """Never 401: a proxy would tell the client that its key is bad."""
    key = await (await engine.keyring()).create("default", "good")
    broken = make_engine(hasher=Unreachable("argon2id", CHEAPEST))
    header = (b"authorization", b"Bearer " + key.token.reveal().encode())
    for method in ("GET", "HEAD"):
        refused = await asgi_request(create_app(broken), "/verify", [header], method=method)
        assert refused.status == 503
        headers = dict(refused.headers)
        assert headers[b"retry-after"] == b"1"
        assert headers[b"x-keylatch-error"] == b"unavailable"
        assert b"www-authenticate" not in headers
    await broken.stop()
