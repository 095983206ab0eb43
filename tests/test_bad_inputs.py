"""Bad inputs, over raw sockets on both of uvicorn's parsers: the exact answers."""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import fakeredis
import pytest
from starlette.types import Receive, Scope, Send

from keylatch.asgi import APIKeyMiddleware
from keylatch.authentication.hashing import CHEAPEST, Hasher, VerifyResult
from keylatch.core.timestamps import datetime_of
from keylatch.core.tokens import MacKeys, Token
from keylatch.engine import Engine
from keylatch.errors import HashingBusy, StoreUnavailable
from keylatch.settings import Settings
from keylatch.storage.repository import Repository
from keylatch.storage.store import Store
from tests.support.clock import Clock
from tests.support.engines import MakeEngine
from tests.support.raw_http import (
    RawResponse,
    asgi_request,
    exchange,
    expected_response,
    parse_response,
    send,
)
from tests.support.servers import serving

JSON = (b"content-type", b"application/json")
NO_STORE = (b"cache-control", b"no-store")


def refusal(status: int, error: bytes, words: bytes, *more: tuple[bytes, bytes]) -> RawResponse:
    """A refusal as the table in the design has it."""
    body = b'{"error":"' + error + b'","error_description":"' + words + b'"}'
    return expected_response(status, [JSON, NO_STORE, (b"x-keylatch-error", error), *more], body)


def challenged(value: bytes) -> tuple[bytes, bytes]:
    return (b"www-authenticate", b'Bearer realm="keylatch"' + value)


A0 = refusal(401, b"unauthorized", b"Send an API key: Authorization: Bearer <key>", challenged(b""))
A1 = refusal(
    400,
    b"invalid_request",
    b"Send exactly one Authorization header of the form: Bearer <key>",
    challenged(b', error="invalid_request"'),
)
A2 = refusal(
    401, b"invalid_token", b"The API key is not valid", challenged(b', error="invalid_token"')
)
A3 = refusal(
    403,
    b"insufficient_scope",
    b"The API key may not do this",
    challenged(b', error="insufficient_scope", scope="FULL"'),
)
A4 = refusal(
    503,
    b"unavailable",
    b"The API key could not be checked; try again in a moment",
    (b"retry-after", b"1"),
)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that answers with its principal, and the headers that it received."""
    assert scope["type"] == "http"
    headers = [
        [name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]
    ]
    body = json.dumps({"caller": scope["user"].key_id, "headers": headers}).encode()
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [JSON, length]})
    await send({"type": "http.response.body", "body": body})


@dataclass(frozen=True)
class Servers:
    """A protected app on two real servers, and tokens of every kind."""

    urls: dict[str, str]
    tokens: dict[str, str]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    path = tmp_path_factory.mktemp("servers") / "keys.db"
    clock = Clock()
    settings = Settings.load(store=f"sqlite:///{path}", redis="", environment="live")

    def engine() -> Engine:
        hasher = Hasher("argon2id", CHEAPEST)
        return Engine(settings, clock=clock, timer=clock, hasher=hasher)

    tokens = asyncio.run(mint(engine(), clock))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("UPDATE keylatch_organizations SET active = 0 WHERE id = 'asleep'")
        raw.execute(
            "UPDATE keylatch_keys SET hash = (SELECT hash FROM keylatch_keys WHERE name = 'good')"
            " WHERE name = 'with a wrong secret'"
        )
    clock.tick(60)  # and one of them has expired
    with (
        serving(APIKeyMiddleware(echo, engine=engine()), http="h11") as h11,
        serving(APIKeyMiddleware(echo, engine=engine()), http="httptools") as httptools,
    ):
        yield Servers({"h11": h11, "httptools": httptools}, tokens)


async def mint(engine: Engine, clock: Clock) -> dict[str, str]:
    """Tokens that are good, and tokens that are bad in every way there is."""
    keyring = await engine.keyring()
    tokens = {}

    async def create(name: str, organization: str = "default", **fields: Any) -> str:
        created = await keyring.create(organization, name, **fields)
        tokens[name] = created.token.reveal()
        return created.record.id

    await create("good")
    await create("sending", permission="SENDING")
    await create("with a wrong secret")
    await create("expired", expires_at=datetime_of(int(clock() * 1000) + 60_000))
    await create("of a disabled organisation", "asleep")
    await create("for another environment", environment="test")
    await keyring.delete("default", await create("revoked"))
    await keyring.change("default", await create("disabled"), active=False)
    own = MacKeys((await engine.store.open(0)).mac_keys)
    await engine.stop()
    return tokens | {"of an unknown id": own.mint("kl", "live").reveal()} | made_up(tokens["good"])


def made_up(good: str) -> dict[str, str]:
    """Tokens that were not minted for this store."""
    return {
        "with another prefix": "ak" + good[2:],
        "without a prefix": good[3:],
        "too short": good[:-1],
        "too long": good + "0",
        "with a wrong CRC": good[:-1] + ("x" if good[-1] != "x" else "y"),
        "of another store": MacKeys([b"s" * 32]).mint("kl", "live").reveal(),
        "of no shape": "letmein",
        "of the greatest length": "a" * (512 - len("Bearer ")),
    }


@pytest.fixture(params=["h11", "httptools"])
def place(request: pytest.FixtureRequest, servers: Servers) -> str:
    """Each of uvicorn's two parsers."""
    return servers.urls[request.param]


STORED = (
    *("of an unknown id", "with a wrong secret", "revoked", "expired", "disabled"),
    *("of a disabled organisation", "for another environment"),
)
MADE_UP = tuple(made_up("kl_live_0_0"))


@pytest.mark.parametrize("cause", STORED + MADE_UP)
def test_a_token_that_is_not_good_is_refused_byte_for_byte_alike(
    place: str, servers: Servers, cause: str
) -> None:
    """Whatever is wrong with a token, the answer shows nothing of it."""
    credential = b"Authorization: Bearer " + servers.tokens[cause].encode()
    assert send(place, b"GET /", credential) == A2
    assert send(place, b"GET /", credential) == A2, "and nor does the answer from the cache"


MISSING = (
    (),
    (b"Authorization:",),
    (b"Authorization: ",),
    (b"Authorization: \t ",),
    (b"Authorization: Basic dXNlcjpwYXNz",),
    (b"Authorization: Basic",),
    (b"Authorization: {good}",),
    (b"Cookie: token={good}; Authorization=Bearer {good}",),
    (b"X-API-Key: {good}",),
    (b"Proxy-Authorization: Bearer {good}",),
    (b"X_Authorization: Bearer {good}",),
)


@pytest.mark.parametrize("fields", MISSING)
def test_a_request_without_a_credential_gets_the_challenge(
    place: str, servers: Servers, fields: tuple[bytes, ...]
) -> None:
    """No credential in the one place that counts: 401 with a bare challenge (RFC 6750, 3.1)."""
    assert send(place, b"GET /", *filled(fields, servers)) == A0


@pytest.mark.parametrize("start", [b"GET /?access_token={good}", b"OPTIONS /", b"OPTIONS *"])
def test_neither_query_nor_method_opens_the_door(
    place: str, servers: Servers, start: bytes
) -> None:
    """A key in the query is none, and a preflight without a key is a request without a key."""
    assert send(place, *filled((start,), servers)) == A0


def test_a_key_in_the_body_is_none(place: str, servers: Servers) -> None:
    """The body is not read for authentication."""
    form = b"access_token=" + servers.tokens["good"].encode()
    fields = (b"Content-Type: application/x-www-form-urlencoded", b"Content-Length: %d" % len(form))
    head = b"\r\n".join((b"POST / HTTP/1.1", b"Host: test", b"Connection: close", *fields))
    assert parse_response(exchange(place, head + b"\r\n\r\n" + form)) == A0


MALFORMED = (
    (b"Authorization: Bearer",),
    (b"Authorization: Bearer ",),
    (b"Authorization: Bearer {good} {good}",),
    (b"Authorization: Bearer {good}, Bearer {good}",),
    (b"Authorization: Bearer {good},Bearer {good}",),
    (b"Authorization: Bearer {good}", b"Authorization: Bearer {good}"),
    (b"Authorization: Bearer {good}", b"authorization: Basic dXNlcjpwYXNz"),
    (b"Authorization: Bearer {good}", b"Authorization:"),
    (b"Authorization: Bearer\t{good}",),
    (b"Authorization: Bearer \t{good}",),
    (b"Authorization: Bearer:{good}",),
    (b"Authorization: Bearer@home {good}",),
    (b"Authorization: Bearer={good}",),
    (b'Authorization: Bearer "{good}"',),
    (b"Authorization: 'Bearer {good}'",),
    (b"Authorization: Bearer %41{good}",),
    (b"Authorization: Bearer {good};",),
    (b"Authorization: Bearer {good}\x80",),
    (b"Authorization: Bearer \xc2\xa0{good}",),
    (b"Authorization: Bearer\xa0{good}",),
    (b"Authorization: Bearer " + b"a" * 506,),
    (b"Authorization: Basic " + b"a" * 507,),
    (b"Authorization: " + b"a" * 50_000,),
)


@pytest.mark.parametrize("fields", MALFORMED)
def test_an_ambiguous_or_malformed_credential_is_not_guessed_at(
    place: str, servers: Servers, fields: tuple[bytes, ...]
) -> None:
    """400, even if a good key is somewhere in it: no two parties shall read it differently."""
    assert send(place, b"GET /", *filled(fields, servers)) == A1


ACCEPTED = (
    b"Authorization: Bearer {good}",
    b"authorization: bearer {good}",
    b"AUTHORIZATION: BEARER {good}",
    b"Authorization:Bearer {good}",
    b"Authorization: Bearer    {good}",
    b"Authorization: \t Bearer {good}",
    b"Authorization: Bearer {good} \t ",
)


@pytest.mark.parametrize("field", ACCEPTED)
def test_what_the_rfcs_allow_is_accepted(place: str, servers: Servers, field: bytes) -> None:
    """Letter case of the scheme and blanks around the value do not matter (RFC 9110)."""
    accepted = send(place, b"GET /", *filled((field,), servers))
    assert accepted.status == 200
    assert json.loads(accepted.body)["caller"] == "key_" + servers.tokens["good"].split("_")[2]


def test_the_refusal_of_a_small_permission_names_the_required_one(
    place: str, servers: Servers
) -> None:
    """403, naming the scope (RFC 6750, 3.1)."""
    credential = b"Authorization: Bearer " + servers.tokens["sending"].encode()
    assert send(place, b"GET /", credential) == A3


HEADLESS = {"": A0, "Bearer": A1, "Bearer letmein": A2, "Bearer {sending}": A3}


@pytest.mark.parametrize("credential", HEADLESS)
def test_head_has_the_headers_of_get_and_no_body(
    place: str, servers: Servers, credential: str
) -> None:
    """Also `Content-Length` is that of GET (RFC 9110, 9.3.2)."""
    field = b"Authorization: " + credential.format_map(servers.tokens).encode()
    expected = HEADLESS[credential]
    assert send(place, b"HEAD /", field) == RawResponse(expected.status, expected.headers, b"")


@pytest.mark.parametrize(
    "fields",
    [
        (b"Authorization: Bearer {good}\x00",),
        (b"Authorization: Bearer\r{good}",),
        (b"Authorization : Bearer {good}",),
    ],
)
def test_what_is_no_http_never_reaches_the_app(
    place: str, servers: Servers, fields: tuple[bytes, ...]
) -> None:
    """NUL, a bare CR, a blank before the colon: the server refuses them itself."""
    refused = send(place, b"GET /", *filled(fields, servers))
    assert refused.status == 400
    assert b"caller" not in refused.body


POSING = (
    *(b"X-Keylatch-Key-Id", b"x-keylatch-organization-id", b"X_Keylatch_Permission"),
    *(b"X-KEYLATCH_KEY-NAME", b"x_keylatch-Environment", b"X-Keylatch-", b"X-Keylatch-Require"),
)


@pytest.mark.parametrize("name", POSING)
def test_nobody_names_themselves_in_headers(place: str, servers: Servers, name: bytes) -> None:
    """Headers that pose as keylatch's are dropped; all others arrive, in their order."""
    fields = (b"X-First: 1", name + b": evil", b"X-Keylatchy: 2", name + b": evil", b"X-First: 3")
    credential = b"Authorization: Bearer " + servers.tokens["good"].encode()
    arrived = json.loads(send(place, b"GET /", credential, *fields).body)["headers"]
    assert "evil" not in json.dumps(arrived)
    kept = [header for header in arrived if header[0].startswith("x-")]
    assert kept == [["x-first", "1"], ["x-keylatchy", "2"], ["x-first", "3"]]


def filled(fields: tuple[bytes, ...], servers: Servers) -> tuple[bytes, ...]:
    """Header fields with a good key in its place."""
    return tuple(field.replace(b"{good}", servers.tokens["good"].encode()) for field in fields)


# What a refusal costs, and what it says when it cannot be decided


class Counted:
    """Passes calls on to the real thing and notes their names, or fails them as if it were down."""

    def __init__(self, real: Any, calls: list[str]) -> None:
        self._real = real
        self._calls = calls
        self.down = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if isinstance(found, Repository):
            repository = Counted(found, self._calls)
            repository.down = self.down
            return repository
        if not callable(found):
            return found

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._calls.append(name)
            return self._fail(name) if self.down else found(*args, **kwargs)

        return counted

    def _fail(self, name: str) -> Any:
        if name.endswith(("_nowait", "data_version")):  # it never waits: it cannot say
            return None
        raise StoreUnavailable("the store is down, says the test")


class Costs:
    """An engine whose calls to the store, to Redis and to the hasher are counted."""

    def __init__(self, store_url: str, make_engine: MakeEngine) -> None:
        self.calls: list[str] = []
        self.store = Counted(Store(store_url), self.calls)
        self.engine = make_engine(
            store=cast(Store, self.store),
            hasher=cast(Hasher, Counted(Hasher("argon2id", CHEAPEST), self.calls)),
            redis=Counted(fakeredis.FakeAsyncRedis(), self.calls),
        )


@pytest.fixture
async def costs(store_url: str, make_engine: MakeEngine) -> AsyncIterator[Costs]:
    costs = Costs(store_url, make_engine)
    yield costs
    await costs.engine.stop()


@pytest.mark.anyio
async def test_a_forged_token_costs_no_call_to_redis_the_store_or_argon2(
    costs: Costs, caplog: pytest.LogCaptureFixture
) -> None:
    """Forged tokens cost parsing only, and fill no log."""
    caplog.set_level("DEBUG", "keylatch")
    good = (await (await costs.engine.keyring()).create("default", "good")).token
    app = APIKeyMiddleware(echo, engine=costs.engine)
    assert costs.engine._freshness.is_fresh()  # it knows of the key that was just made
    costs.calls.clear()
    caplog.clear()
    # What lacks keylatch's shape could have been imported a moment ago, and what has it made with
    # a new MAC key: 48 bytes of mapped memory tell whether anything was committed at all.
    assert (await asgi_request(app, headers=[bearer("letmein")])) == A2
    assert set(costs.calls) <= {"data_version", "position_nowait", "since_nowait"}
    costs.calls.clear()
    for token in made_up(good.reveal()).values():
        assert await asgi_request(app, headers=[bearer(token)]) == A2
    for value in (b"", b"Basic abc", b"Bearer", b"Bearer \xff", b"Bearer " + b"a" * 2_000_000):
        assert (await asgi_request(app, headers=[(b"authorization", value)])) in (A0, A1)
    assert set(costs.calls) <= {"data_version"}
    assert caplog.records == []
    assert (await asgi_request(app, headers=[bearer(good.reveal())])).status == 200
    assert {"find", "get", "verify"} <= set(costs.calls), "store, Redis and argon2 were counted"


@pytest.mark.anyio
async def test_a_store_that_is_down_is_never_the_keys_fault(costs: Costs) -> None:
    """503 for every token that may be valid, cached or not, and for what may have been imported, or
    created with another MAC key, since. A token with a wrong checksum is none of these."""
    keyring = await costs.engine.keyring()
    warm, cold = [(await keyring.create("default", name)).token for name in ("warm", "cold")]
    app = APIKeyMiddleware(echo, engine=costs.engine)
    assert (await asgi_request(app, headers=[bearer(warm.reveal())])).status == 200
    costs.store.down = True
    for token in (warm, cold):
        assert await asgi_request(app, headers=[bearer(token.reveal())]) == A4
        head = await asgi_request(app, headers=[bearer(token.reveal())], method="HEAD")
        assert head == RawResponse(503, A4.headers, b"")
    forged = MacKeys([b"s" * 32]).mint("kl", "live").reveal()
    for unknown in ("letmein", forged):
        assert await asgi_request(app, headers=[bearer(unknown)]) == A4
    assert await asgi_request(app, headers=[bearer(forged[:-6] + "000000")]) == A2
    assert await asgi_request(app) == A0
    costs.store.down = False
    for token in (warm, cold):
        assert (await asgi_request(app, headers=[bearer(token.reveal())])).status == 200, (
            "not remembered"
        )


def test_a_store_that_was_never_there_is_never_the_keys_fault(tmp_path: Path) -> None:
    """An app whose store cannot be opened starts, and answers 503 to requests with a token."""
    app = APIKeyMiddleware(echo, store=f"sqlite:///{tmp_path}/missing/keys.db", redis="")
    with serving(app) as place:
        forged = MacKeys([b"s" * 32]).mint("kl", "live").reveal()
        assert send(place, b"GET /", b"Authorization: Bearer " + forged.encode()) == A4
        assert send(place, b"GET /") == A0


class Crowded(Hasher):
    """A hasher whose queue is full on demand."""

    crowded = False

    async def verify(self, stored: str, token: Token) -> VerifyResult:
        if self.crowded:
            raise HashingBusy("the queue is full, says the test")
        return await super().verify(stored, token)


@pytest.mark.anyio
async def test_a_full_hash_queue_asks_to_come_again(make_engine: MakeEngine) -> None:
    """503 with Retry-After; and the refusal is not cached."""
    hasher = Crowded("argon2id", CHEAPEST)
    engine = make_engine(hasher=hasher)
    token = (await (await engine.keyring()).create("default", "good")).token.reveal()
    app = APIKeyMiddleware(echo, engine=engine)
    hasher.crowded = True
    assert await asgi_request(app, headers=[bearer(token)]) == A4
    hasher.crowded = False
    assert (await asgi_request(app, headers=[bearer(token)])).status == 200
    await engine.stop()


IN_PROCESS_ONLY = [
    *(b"Bearer {good}\n", b"Bearer {good}\r\n", b"Bearer\n{good}", b"Bearer {good}\x00"),
    *(b"Bearer \x1b{good}", b"Bearer {good}\x7f", b"\x0bBearer {good}", b"Bearer\x0c{good}"),
    *(b"\r\n Bearer {good}", b"Bearer {good}\r\n ", b"\xef\xbb\xbfBearer {good}"),
]


@pytest.mark.anyio
@pytest.mark.parametrize("value", IN_PROCESS_ONLY)
async def test_bytes_that_a_lenient_server_lets_through_are_refused(
    engine: Engine, value: bytes
) -> None:
    """The grammar is ours, so a server with another idea of a header value changes nothing."""
    good = (await (await engine.keyring()).create("default", "good")).token.reveal().encode()
    app = APIKeyMiddleware(echo, engine=engine)
    assert (
        await asgi_request(app, headers=[(b"authorization", value.replace(b"{good}", good))]) == A1
    )


def bearer(token: str) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + token.encode()
