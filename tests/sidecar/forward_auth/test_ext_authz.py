"""`/ext_authz/…` and what it shares with `/verify`: facts, cache, deadline."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.core.timestamps import datetime_of
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError
from keylatch.management.keyring import Created
from keylatch_sidecar.app import create_app
from keylatch_sidecar.forward_auth import decision as proxies
from keylatch_sidecar.settings import ProxySettings
from tests.support.clock import Clock
from tests.support.engines import MakeEngine
from tests.support.raw_http import Header, RawResponse, asgi_request, exchange, send
from tests.support.sidecars import Sidecar

BODY = (b"Content-Length: 300000", b"Expect: 100-continue")


@pytest.fixture(scope="module")
def full(sidecar: Sidecar) -> Created:
    return sidecar.create(name="admin_key")


@pytest.fixture(scope="module")
def sender(sidecar: Sidecar) -> Created:
    return sidecar.create(permission="SENDING")


def auth_header(key: Created) -> bytes:
    return b"Authorization: Bearer " + key.token.reveal().encode()


METHODS = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PROPFIND"]
PATHS = [b"", b"/", b"/v1/emails", b"/a/../v1/api-keys", b"//x", b"/%2e%2e/healthz", b"/verify"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", PATHS)
def test_any_method_and_path_is_the_same_check(
    sidecar: Sidecar, full: Created, method: bytes, path: bytes
) -> None:
    """Path and query are the client's and say nothing; the answer is that of /verify."""
    request_line = method + b" /ext_authz" + path + b"?permission=FULL&x=1"
    assert send(sidecar.url, request_line, auth_header(full)) == send(
        sidecar.url, b"GET /verify", auth_header(full)
    )
    refused = send(sidecar.url, request_line)
    assert (refused.status, refused.body == b"") == (401, method == b"HEAD")


@pytest.mark.parametrize("path", [b"/ext_authzx", b"/ext_auth", b"/EXT_AUTHZ/", b"//ext_authz/"])
def test_neighbours_are_not_found(sidecar: Sidecar, full: Created, path: bytes) -> None:
    """An allow there would be a hole."""
    assert send(sidecar.url, b"GET " + path, auth_header(full)).status == 404


def test_the_body_is_never_waited_for(sidecar: Sidecar, full: Created) -> None:
    """Announced and never sent: the answer comes all the same."""
    lines = (b"POST /ext_authz/v1 HTTP/1.1", b"Host: t", auth_header(full), *BODY, b"", b"")
    assert b"200 OK" in exchange_some(sidecar.url, b"\r\n".join(lines))


def exchange_some(url: str, request: bytes) -> bytes:
    """What comes back while the request's body is still due."""
    closing = request.replace(b"Host: t", b"Host: t\r\nConnection: close")
    return exchange(url, closing)


@pytest.mark.parametrize(
    ("required", "sender_may"),
    [
        ((), 200),
        ((b"SENDING",), 200),
        ((b"SENDING,SENDING",), 200),
        ((b" SENDING\t, SENDING",), 200),
        ((b"SENDING", b"SENDING"), 200),
        ((b"FULL",), 403),
        ((b"SENDING,READING",), 403),
        ((b"SENDING", b"READING"), 403),
        ((b"",), 403),
        ((b",",), 403),
        ((b"sending",), 403),
        ((b"SENDING;",), 403),
    ],
)
def test_requirements_add_up_and_a_malformed_one_leaves_only_full(
    sidecar: Sidecar, full: Created, sender: Created, required: tuple[bytes, ...], sender_may: int
) -> None:
    """One that the client adds can only make it harder."""
    fields = [b"X-Keylatch-Require: " + value for value in required]
    for key, status in ((full, 200), (sender, sender_may)):
        assert send(sidecar.url, b"POST /ext_authz/x", auth_header(key), *fields).status == status


@pytest.fixture
async def key(engine: Engine) -> Created:
    return await (await engine.keyring()).create("default", "ours")


@pytest.fixture
async def operated(make_engine: MakeEngine) -> AsyncIterator[Engine]:
    engine = make_engine()
    yield engine
    await engine.stop()


def headers_of(key: Created, *more: Header) -> list[Header]:
    return [(b"authorization", b"Bearer " + key.token.reveal().encode()), *more]


@pytest.mark.anyio
async def test_methods_of_ones_own_are_judged_too(operated: Engine, key: Created) -> None:
    """By the endpoint; uvicorn on httptools rejects unregistered methods with 400."""
    app = create_app(operated)
    answer = await asgi_request(app, "/ext_authz/pot", headers_of(key), method="BREW")
    assert answer.status == 200


FORWARDED = ((b"x-forwarded-method", b"POST"), (b"x-forwarded-uri", b"/v1?secret=1"))
ORIGINAL = ((b"x-original-method", b"POST"), (b"x-original-url", b"http://h/v1"))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("profile", "fields", "status"),
    [
        ("none", (), 200),
        ("none", FORWARDED, 200),
        ("forwarded", FORWARDED, 200),
        ("forwarded", (*FORWARDED, *ORIGINAL), 200),
        ("forwarded", (), 403),
        ("forwarded", ORIGINAL, 403),
        ("forwarded", FORWARDED[:1], 403),
        ("forwarded", FORWARDED[1:], 403),
        ("forwarded", (*FORWARDED, FORWARDED[0]), 403),
        ("forwarded", (FORWARDED[1], (b"x-forwarded-method", b"")), 403),
        ("original", ORIGINAL, 200),
        ("original", FORWARDED, 403),
    ],
)
async def test_facts_come_from_the_agreed_place_or_nothing_passes(
    operated: Engine, key: Created, profile: str, fields: tuple[Header, ...], status: int
) -> None:
    """Never from another one: the client's header would be trusted behind half of the proxies."""
    app = create_app(operated, ProxySettings(verify_request=profile, ext_authz_request=profile))
    for path in ("/verify", "/ext_authz/v1"):
        answer = await asgi_request(app, path, headers_of(key, *fields))
        assert answer.status == status
        if status == 403:
            assert dict(answer.headers)[b"x-keylatch-error"] == b"misconfigured"


@pytest.mark.anyio
async def test_checks_without_an_original_request_fill_no_log(
    operated: Engine, key: Created, caplog: pytest.LogCaptureFixture
) -> None:
    """Any client can cause it: 1,000 requests write ten log lines, each with the count."""
    app = create_app(operated, ProxySettings(verify_request="forwarded"))
    for _ in range(1_000):
        await asgi_request(app, "/verify", headers_of(key))
    first = (
        "refused a proxy's request with 403: KEYLATCH_VERIFY_REQUEST or "
        "KEYLATCH_EXT_AUTHZ_REQUEST names fields that the proxy does not send"
    )
    counts = [2**power for power in range(1, 10)]
    assert caplog.messages == [first, *(f"{first}; {count} times so far" for count in counts)]


@pytest.mark.anyio
async def test_facts_are_logged_without_the_query(
    operated: Engine, key: Created, caplog: pytest.LogCaptureFixture
) -> None:
    """For operators, at DEBUG; without the query, which may contain secrets."""
    caplog.set_level("DEBUG", "keylatch.proxies")
    app = create_app(operated, ProxySettings(verify_request="forwarded"))
    await asgi_request(app, "/verify", headers_of(key, *FORWARDED))
    await asgi_request(app, "/verify", list(FORWARDED))
    messages = [record.getMessage() for record in caplog.records if "/v1" in record.getMessage()]
    assert messages == ["POST /v1: allowed", "POST /v1: no credential was sent"]


async def cached(operated: Engine, key: Created, seconds: int) -> bytes:
    app = create_app(operated, ProxySettings(proxy_cache_ttl=seconds))
    return dict((await asgi_request(app, "/verify", headers_of(key))).headers)[b"cache-control"]


@pytest.mark.anyio
async def test_an_allow_may_be_remembered_where_that_is_wanted(
    operated: Engine, engine: Engine, key: Created, clock: Clock
) -> None:
    """Not at all by default; never beyond the key's expiry; a refusal never."""
    assert await cached(operated, key, 0) == b"no-store"
    assert await cached(operated, key, 60) == b"max-age=60"
    expires_at = int(clock() * 1000) + 30_500
    ending = await (await engine.keyring()).create(
        "default", "ending", expires_at=datetime_of(expires_at)
    )
    assert await cached(operated, ending, 60) == b"max-age=30"
    assert await cached(operated, ending, 20) == b"max-age=20"
    clock.tick(30)
    assert await cached(operated, ending, 60) == b"no-store"
    clock.tick(1)
    assert await cached(operated, ending, 60) == b"no-store"  # a refusal


class Stuck(Hasher):
    """Never answers."""

    async def verify(self, hashed: str, token: Token) -> bool:
        await asyncio.Event().wait()
        return True


@pytest.mark.anyio
async def test_nothing_waits_beyond_the_deadline(
    make_engine: MakeEngine, key: Created, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 in time, whatever blocks: a proxy's own timeout may be half a minute."""
    assert proxies.DEADLINE_SECONDS < 1
    monkeypatch.setattr(proxies, "DEADLINE_SECONDS", 0.01)
    engine = make_engine(hasher=Stuck("argon2id", CHEAPEST))
    app = create_app(engine, ProxySettings())
    answer: RawResponse = await asyncio.wait_for(asgi_request(app, "/verify", headers_of(key)), 10)
    assert (answer.status, dict(answer.headers)[b"retry-after"]) == (503, b"1")
    for flight in asyncio.all_tasks():
        if flight.get_name() == "keylatch-single-flight":
            flight.cancel()
    await engine.stop()


def test_wrong_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, each with a hint."""
    monkeypatch.setenv("KEYLATCH_VERIFY_REQUEST", "guess")
    with pytest.raises(ConfigurationError) as caught:
        ProxySettings.load(ext_authz_request="any", proxy_cache_ttl="-1")
    named = [wrong.partition(":")[0] for wrong, hint in caught.value.mistakes if hint]
    assert named == [
        f"KEYLATCH_{n}" for n in ("VERIFY_REQUEST", "EXT_AUTHZ_REQUEST", "PROXY_CACHE_TTL")
    ]


def test_many_checks_on_one_connection(sidecar: Sidecar, full: Created) -> None:
    """Envoy keeps its connections: answers are complete, and nothing closes them."""
    one = (
        b"POST /ext_authz/x HTTP/1.1",
        b"Host: t",
        auth_header(full),
        b"Content-Length: 0",
        b"",
        b"",
    )
    last = (b"GET /ext_authz/x HTTP/1.1", b"Host: t", b"Connection: close", b"", b"")
    answers = exchange(sidecar.url, b"\r\n".join(one) * 3 + b"\r\n".join(last))
    statuses = [line.split()[1] for line in answers.split(b"\r\n") if line.startswith(b"HTTP/1.1")]
    assert statuses == [b"200", b"200", b"200", b"401"]
