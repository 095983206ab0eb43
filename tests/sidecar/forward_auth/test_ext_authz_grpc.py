"""`Authorization/Check` over gRPC: the same answers as over HTTP, on real connections.

That Envoy understands them is shown by bytes that the official packages wrote (xds-protos 1.85.0,
grpcio-health-checking 1.85.1), and by Envoy itself in `test_envoy_grpc.py`.
"""

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keylatch.authentication.hashing import CHEAPEST, Hasher, VerifyResult
from keylatch.core.refusals import Refusal
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.storage.store import Store
from keylatch_sidecar.app import create_app
from keylatch_sidecar.forward_auth import decision as proxies
from keylatch_sidecar.forward_auth import ext_authz_grpc
from keylatch_sidecar.forward_auth.decision import ForwardAuth
from keylatch_sidecar.forward_auth.original_request import OriginalRequest
from keylatch_sidecar.forward_auth.protobuf import (
    OVERWRITE,
    CheckQuery,
    CheckRequest,
    CheckResponse,
    allow,
    deny,
    parse_check_request,
)
from keylatch_sidecar.http_server.limits import GRPC_HEADERS, GRPC_MESSAGE_BYTES
from keylatch_sidecar.settings import ProxySettings
from tests.support.engines import MakeEngine
from tests.support.raw_http import Header, RawResponse, asgi_request
from tests.support.servers import error_without_package, free_port

pytestmark = pytest.mark.anyio

WITHOUT_PROXY = [("grpc.enable_http_proxy", 0)]


@contextlib.asynccontextmanager
async def served(
    engine: Engine, address: str | None = None, **limits: Any
) -> AsyncIterator[grpc.aio.Channel]:
    """A connection to a server of this engine's."""
    address = address or f"127.0.0.1:{free_port()}"
    server = await ext_authz_grpc.serve(ForwardAuth(engine), engine, address, **limits)
    try:
        async with grpc.aio.insecure_channel(address, WITHOUT_PROXY) as channel:
            yield channel
    finally:
        await server.stop(None)


@pytest.fixture
async def channel(engine: Engine) -> AsyncIterator[grpc.aio.Channel]:
    async with served(engine) as channel:
        yield channel


@pytest.fixture
async def full(engine: Engine) -> Created:
    return await (await engine.keyring()).create("acme", "Grüße, 日本")


@pytest.fixture
async def sender(engine: Engine) -> Created:
    keyring = await engine.keyring()
    return await keyring.create("acme", "mailer", permission="SENDING", environment="test")


def auth_header(key: Created) -> Header:
    return b"authorization", b"Bearer " + key.token.reveal().encode()


def check_request(headers: Sequence[Header] = (), *permissions: str, raw: bool = False) -> Any:
    """As Envoy sends it: values of one name joined, or separate with `encode_raw_headers`."""
    request = CheckRequest()
    http = request.attributes.request.http
    http.method, http.path = b"POST", b"/v1/emails?secret=1"
    joined: dict[bytes, bytes] = {}
    for name, value in headers:
        if raw:
            http.header_map.headers.add(key=name, raw_value=value)
        else:
            joined[name] = joined[name] + b"," + value if name in joined else value
    for name, value in joined.items():
        http.headers.add(key=name, value=value)
    for permission in permissions:
        request.attributes.context_extensions.add(key=b"permission", value=permission.encode())
    return request


async def check(channel: grpc.aio.Channel, request: Any) -> Any:
    return CheckResponse.FromString(await call(channel, request.SerializeToString()))


async def call(
    channel: grpc.aio.Channel, message: bytes, method: str = f"/{ext_authz_grpc.SERVICE}/Check"
) -> bytes:
    """Bytes to bytes, as they are on the wire."""
    check: Any = channel.unary_unary(method)
    answered: bytes = await check(message)
    return answered


def http_response(response: Any) -> RawResponse:
    """What a message says, as it would be said over HTTP, but for what HTTP itself needs."""
    is_allowed = response.status.code == 0
    assert response.HasField("ok_response") == is_allowed
    assert response.HasField("denied_response") == (not is_allowed)
    part = response.ok_response if is_allowed else response.denied_response
    assert {option.append_action for option in part.headers} == {OVERWRITE}
    headers = tuple(sorted((option.header.key, option.header.value) for option in part.headers))
    return (
        RawResponse(200, headers, b"")
        if is_allowed
        else RawResponse(part.status.code, headers, part.body)
    )


async def over_http(engine: Engine, headers: Sequence[Header], *permissions: str) -> RawResponse:
    """What `/ext_authz` answers; of an allow, what is for the app."""
    fields = [*headers, *((b"x-keylatch-require", word.encode()) for word in permissions)]
    app = create_app(engine, ProxySettings(ext_authz_request="none"))
    said = await asgi_request(app, "/ext_authz/v1/emails", fields, method="POST")
    of_http = {b"content-length"} | ({b"cache-control"} if said.status == 200 else set())
    kept = [header for header in said.headers if header[0] not in of_http]
    return RawResponse(said.status, tuple(kept), said.body)


CREDENTIALS = [
    "{key}",
    "bearer   {key}  ",
    None,
    "",
    "Bearer",
    "Bearer ",
    "Basic dXNlcjpwYXNz",
    "Bearer wrong",
    "Bearer kl_live_000000000000_00000000000000000000000000000000000000000",
    "{key}x",
    "{key},{key}",
    "{key}, Bearer wrong",
    "{key} {key}",
    "Bearer " + 600 * "x",
    "Bearer\t{key}",
    "Bearer ключ",
]
PERMISSIONS = [
    ([], 200),
    (["SENDING"], 200),
    (["SENDING,SENDING"], 200),
    ([" SENDING\t, SENDING"], 200),
    (["SENDING", "SENDING"], 200),
    (["FULL"], 403),
    (["SENDING,READING"], 403),
    (["SENDING", "FULL"], 403),
    (["FULL", "SENDING"], 403),
    (["READING"], 403),
    ([""], 403),
    (["SENDING", ""], 403),
    ([","], 403),
    (["sending"], 403),
    (["SENDING;"], 403),
    (["SENDING READING"], 403),
]


@pytest.mark.long
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("value", CREDENTIALS)
async def test_every_credential_is_answered_as_over_http(
    engine: Engine, channel: grpc.aio.Channel, full: Created, value: str | None, raw: bool
) -> None:
    """Status, headers and body; a gRPC error for none of them."""
    headers = []
    if value is not None:
        bearer = auth_header(full)[1].decode()
        headers.append((b"authorization", value.replace("{key}", bearer).encode()))
    answered = http_response(await check(channel, check_request(headers, raw=raw)))
    assert answered == await over_http(engine, headers)
    assert (answered.status == 200) == (value in CREDENTIALS[:1])


@pytest.mark.long
@given(
    values=st.lists(
        st.text(st.characters(codec="utf-8"), max_size=40)
        | st.from_regex(r"[ \t]*(?i:bearer) +[A-Za-z0-9._~+/=-]{0,20}[ \t,]*", fullmatch=True),
        max_size=3,
    ),
    permissions=st.lists(st.text(st.characters(codec="ascii"), max_size=20), max_size=2),
    raw=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_whatever_is_sent_is_answered_as_over_http(
    engine: Engine,
    channel: grpc.aio.Channel,
    values: list[str],
    permissions: list[str],
    raw: bool,
) -> None:
    """Any text in any number of fields, joined by Envoy or not."""
    headers = [(b"authorization", value.encode()) for value in values]
    answered = http_response(await check(channel, check_request(headers, *permissions, raw=raw)))
    assert answered == await over_http(engine, headers, *permissions)


@pytest.mark.long
@given(value=st.binary(max_size=40), name=st.binary(max_size=20), raw=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_bytes_that_are_no_text_are_answered_too(
    engine: Engine,
    channel: grpc.aio.Channel,
    full: Created,
    value: bytes,
    name: bytes,
    raw: bool,
) -> None:
    """Beside a good key they change nothing, as a key they are none; never an error."""
    beside = check_request([auth_header(full), (b"x-" + name, value)], raw=raw)
    assert http_response(await check(channel, beside)).status == 200
    alone = [(b"authorization", value)]
    assert http_response(await check(channel, check_request(alone, raw=raw))) == await over_http(
        engine, alone
    )


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("permission", ["FULL", "SENDING"])
async def test_an_allow_names_the_caller_and_removes_the_key(
    engine: Engine,
    channel: grpc.aio.Channel,
    full: Created,
    sender: Created,
    permission: str,
    raw: bool,
) -> None:
    """All five headers, each of them written over whatever the client said."""
    created = full if permission == "FULL" else sender
    response = await check(channel, check_request([auth_header(created)], raw=raw))
    assert response.status.code == 0
    answered = http_response(response)
    assert answered == await over_http(engine, [auth_header(created)])
    assert len(answered.headers) == 5
    removed = [b"authorization", b"x-keylatch-require", b"x-keylatch-error"]
    assert list(response.ok_response.headers_to_remove) == removed


@pytest.mark.parametrize(
    ("name", "is_removed"),
    [
        ("x_keylatch_key_id", True),
        ("x-keylatch_key-id", True),
        ("x.keylatch.key.id", True),
        ("x~keylatch!permission", True),
        ("X_Keylatch_Key_Name", True),
        ("x-keylatch-revocation", True),
        ("x-keylatch", True),
        ("x-keylatch-key-id", False),
        ("x-keylatch-environment", False),
        ("x-keynote", False),
        ("y-keylatch-key-id", False),
        ("cookie", False),
    ],
)
async def test_what_could_be_taken_for_the_callers_name_is_removed(
    channel: grpc.aio.Channel, full: Created, name: str, is_removed: bool
) -> None:
    """Envoy removes after it has set: the identity must not be among the removed names."""
    lies = [(name.encode(), b"evil"), (b"cookie", b"a=b")]
    response = await check(channel, check_request([auth_header(full), *lies]))
    names = {option.header.key for option in response.ok_response.headers}
    removed = set(response.ok_response.headers_to_remove)
    assert (name.lower().encode() in removed) == is_removed
    assert names.isdisjoint(removed)
    assert "evil" not in str(response)


@pytest.mark.parametrize(("permissions", "sender_may"), PERMISSIONS)
async def test_permissions_add_up_and_a_malformed_one_leaves_only_full(
    engine: Engine,
    channel: grpc.aio.Channel,
    full: Created,
    sender: Created,
    permissions: list[str],
    sender_may: int,
) -> None:
    """As over HTTP; the refusal says what would have sufficed. A map on the wire is a list: readers
    that take the last of two would forget the first."""
    for key, status in ((full, 200), (sender, sender_may)):
        answered = http_response(
            await check(channel, check_request([auth_header(key)], *permissions))
        )
        assert answered.status == status
        assert answered == await over_http(engine, [auth_header(key)], *permissions)


@pytest.mark.parametrize(
    "field", [b"x-keylatch-require", b"x-keylatch-permission", b"permission", b":path"]
)
async def test_headers_set_no_requirement(
    channel: grpc.aio.Channel, sender: Created, field: bytes
) -> None:
    """They are the client's; the proxy sets the route's permission."""
    for value in (b"FULL", b"SENDING", b""):
        headers = [auth_header(sender), (field, value)]
        assert http_response(await check(channel, check_request(headers))).status == 200
        assert http_response(await check(channel, check_request(headers, "FULL"))).status == 403


async def test_two_credentials_are_never_allowed(channel: grpc.aio.Channel, full: Created) -> None:
    """Joined by a comma, one by one, or in both places at once."""
    twice = [auth_header(full), auth_header(full)]
    for request in (check_request(twice), check_request(twice, raw=True)):
        assert http_response(await check(channel, request)).status == 401
    both = check_request([auth_header(full)])
    both.MergeFrom(check_request([auth_header(full)], raw=True))
    assert http_response(await check(channel, both)).status == 401


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff\xff\xff",
        b"GET / HTTP/1.1",
        CheckRequest(attributes={"context_extensions": [{"key": b"permission", "value": b"A"}]}),
        CheckRequest(attributes={"request": {}}),
        CheckRequest(attributes={"request": {"http": {}}}),
        CheckRequest(attributes={"request": {"http": {"method": b"GET"}}}),
        CheckRequest(attributes={"request": {"http": {"path": b"/"}}}),
    ],
)
async def test_a_check_without_a_request_is_refused(
    engine: Engine, channel: grpc.aio.Channel, full: Created, message: Any
) -> None:
    """403 in the words of HTTP, as when a proxy there sends no method or path."""
    if not isinstance(message, bytes):
        message.attributes.request.http.headers.add(
            key=b"authorization", value=auth_header(full)[1]
        )
        message = message.SerializeToString()
    answered = http_response(CheckResponse.FromString(await call(channel, message)))
    app = create_app(engine, ProxySettings(ext_authz_request="forwarded"))
    said = await asgi_request(app, "/ext_authz/", [auth_header(full)])
    assert (answered.status, answered.body) == (said.status, said.body)
    assert answered.headers == tuple(h for h in said.headers if h[0] != b"content-length")
    assert json.loads(answered.body)["error"] == "misconfigured"


async def test_the_request_is_logged_without_its_query(
    channel: grpc.aio.Channel, full: Created, caplog: pytest.LogCaptureFixture
) -> None:
    """For operators, at DEBUG; without the query, which may contain secrets."""
    caplog.set_level("DEBUG", "keylatch.proxies")
    await check(channel, check_request([auth_header(full)]))
    await check(channel, check_request())
    said = [record.getMessage() for record in caplog.records if "/v1" in record.getMessage()]
    assert said == ["POST /v1/emails: allowed", "POST /v1/emails: no credential was sent"]


async def test_concurrent_requests_keep_their_identities(
    channel: grpc.aio.Channel, full: Created, sender: Created
) -> None:
    """Two hundred concurrent checks on one connection."""
    keys = [full, sender] * 100
    answers = await asyncio.gather(
        *(check(channel, check_request([auth_header(key)])) for key in keys)
    )
    key_ids = [dict(http_response(answer).headers)[b"x-keylatch-key-id"] for answer in answers]
    assert key_ids == [key.record.id.encode() for key in keys]


async def test_a_revoked_key_is_refused_by_the_next_check(
    engine: Engine, channel: grpc.aio.Channel
) -> None:
    """Nothing on the way caches it."""
    keyring = await engine.keyring()
    for _ in range(5):
        key = await keyring.create("acme", "short")
        assert http_response(await check(channel, check_request([auth_header(key)]))).status == 200
        await keyring.delete("acme", key.record.id)
        assert http_response(await check(channel, check_request([auth_header(key)]))).status == 401


class Gated(Hasher):
    """Answers on demand, and counts the calls."""

    def __init__(self) -> None:
        super().__init__("argon2id", CHEAPEST)
        self.called = asyncio.Event()
        self.times = 0
        self.gate = asyncio.Event()

    async def verify(self, hashed: str, token: Token) -> VerifyResult:
        self.times += 1
        self.called.set()
        await self.gate.wait()
        return await super().verify(hashed, token)


async def test_nothing_waits_beyond_the_deadline(
    make_engine: MakeEngine, full: Created, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 in time and in the words of HTTP, whatever blocks."""
    monkeypatch.setattr(proxies, "DEADLINE_SECONDS", 0.01)
    hasher = Gated()
    engine = make_engine(hasher=hasher)
    async with served(engine) as channel:
        answered = http_response(
            await asyncio.wait_for(check(channel, check_request([auth_header(full)])), 10)
        )
        assert answered.status == 503
        assert answered == await over_http(engine, [auth_header(full)])
        assert dict(answered.headers)[b"retry-after"] == b"1"
    hasher.gate.set()
    await engine.stop()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check waits here until the test releases it."""
    monkeypatch.setattr(proxies, "DEADLINE_SECONDS", 60)


@pytest.mark.usefixtures("patience")
async def test_a_cancelled_check_affects_no_other(make_engine: MakeEngine, full: Created) -> None:
    """The proxy's timeout has expired: the look-up that it began serves the next check."""
    hasher = Gated()
    engine = make_engine(hasher=hasher)
    async with served(engine) as channel:
        impatient = asyncio.ensure_future(check(channel, check_request([auth_header(full)])))
        await hasher.called.wait()
        impatient.cancel()
        await asyncio.wait([impatient])
        patient = asyncio.ensure_future(check(channel, check_request([auth_header(full)])))
        hasher.gate.set()
        assert http_response(await patient).status == 200
    assert hasher.times == 1
    await engine.stop()


async def test_hashes_are_checked_on_their_own_threads(
    make_engine: MakeEngine, full: Created, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop never computes one: other checks are answered meanwhile."""
    names: list[str] = []
    reveal = Token.reveal

    def noted(token: Token) -> str:
        names.append(threading.current_thread().name)
        return reveal(token)

    engine = make_engine()
    async with served(engine) as channel:
        request = check_request([auth_header(full)])
        monkeypatch.setattr(Token, "reveal", noted)
        assert http_response(await check(channel, request)).status == 200
    await engine.stop()
    assert names
    assert all(name.startswith("keylatch-hash") for name in names)


async def test_it_listens_on_a_unix_socket_as_well(
    engine: Engine, full: Created, tmp_path: Path
) -> None:
    """The directory's mode restricts access, as over HTTP; it is removed with its server."""
    place = tmp_path / "grpc.sock"
    async with served(engine, f"unix:{place}") as channel:
        assert place.stat().st_mode & 0o777 == 0o666
        assert http_response(await check(channel, check_request([auth_header(full)]))).status == 200
    assert not place.exists()


async def test_an_address_that_is_taken_is_an_error(engine: Engine, tmp_path: Path) -> None:
    """Named in it; only processes of ours that say so share a port."""
    address = f"127.0.0.1:{free_port()}"
    async with served(engine, address):
        with pytest.raises(OSError, match=f"cannot listen on {address}"):
            await ext_authz_grpc.serve(ForwardAuth(engine), engine, address)
    place = f"unix:{tmp_path}/missing/grpc.sock"
    with pytest.raises(OSError, match=f"cannot listen on {place}"):
        await ext_authz_grpc.serve(ForwardAuth(engine), engine, place)
    servers = [
        await ext_authz_grpc.serve(ForwardAuth(engine), engine, address, is_shared=True)
        for _ in range(2)
    ]
    for server in servers:
        await server.stop(None)


@pytest.mark.usefixtures("patience")
async def test_a_server_that_stops_answers_first(make_engine: MakeEngine, full: Created) -> None:
    """Calls before the stop are answered within the grace; later ones are not."""
    hasher = Gated()
    engine = make_engine(hasher=hasher)
    address = f"127.0.0.1:{free_port()}"
    server = await ext_authz_grpc.serve(ForwardAuth(engine), engine, address)
    async with grpc.aio.insecure_channel(address, WITHOUT_PROXY) as channel:
        asking = asyncio.ensure_future(check(channel, check_request([auth_header(full)])))
        await hasher.called.wait()
        stopping = asyncio.ensure_future(server.stop(10))
        await asyncio.sleep(0)
        hasher.gate.set()
        assert http_response(await asking).status == 200
        await stopping
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(channel, check_request([auth_header(full)]))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await engine.stop()


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])
async def test_it_runs_on_the_event_loop_that_serve_uses(
    engine: Engine, channel: grpc.aio.Channel, full: Created
) -> None:
    """uvloop, as in production."""
    assert type(asyncio.get_running_loop()).__module__ == "uvloop"
    answers = [check(channel, check_request([auth_header(full)])) for _ in range(50)]
    assert {http_response(answer).status for answer in await asyncio.gather(*answers)} == {200}


async def test_health_checks_are_answered(
    make_engine: MakeEngine, channel: grpc.aio.Channel, tmp_path: Path
) -> None:
    """Live for the server, ready for the service: as `/healthz` and `/readyz`."""
    method = "/grpc.health.v1.Health/Check"
    of_service = b"\n#envoy.service.auth.v3.Authorization"
    serving, not_serving = b"\x08\x01", b"\x08\x02"
    assert await call(channel, b"", method) == serving
    assert await call(channel, of_service, method) == serving
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, b"\n#envoy.service.auth.v2.Authorization", method)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    broken = make_engine(store=Store(f"sqlite:///{tmp_path}/missing/keys.db"))
    async with served(broken) as channel:
        assert await call(channel, b"", method) == serving
        assert await call(channel, of_service, method) == not_serving
    await broken.stop()


# Limits


async def code_of(check_request: "asyncio.Future[Any]") -> grpc.StatusCode:
    """The gRPC error that comes instead of an answer."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check_request
    code: grpc.StatusCode = caught.value.code()
    return code


def check_request_of_size(key: Created, size: int) -> Any:
    """A check of so many bytes; unknown fields of a message are ignored."""
    request = check_request([auth_header(key)])
    room = size - len(request.SerializeToString()) - 32
    request.attributes.request.http.headers.add(key=b"x", value=b"x" * room)
    request.attributes.request.http.path += b"x" * (size - len(request.SerializeToString()))
    assert len(request.SerializeToString()) == size
    return request


async def test_a_check_may_have_256_kib(channel: grpc.aio.Channel, full: Created) -> None:
    """One byte more is an error of gRPC, which a proxy that fails closed answers with a refusal;
    the connection goes on."""
    largest = check_request_of_size(full, GRPC_MESSAGE_BYTES)
    assert http_response(await check(channel, largest)).status == 200
    largest.attributes.request.http.path += b"x"
    too_large = asyncio.ensure_future(check(channel, largest))
    assert await code_of(too_large) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert http_response(await check(channel, check_request([auth_header(full)]))).status == 200


async def test_a_checked_request_may_have_a_thousand_headers(
    channel: grpc.aio.Channel, full: Created
) -> None:
    """More headers are not read: 403, as without an original request."""
    headers = [auth_header(full), *((b"x%d" % number, b"") for number in range(GRPC_HEADERS - 1))]
    for raw in (False, True):
        assert http_response(await check(channel, check_request(headers, raw=raw))).status == 200
        refused = http_response(
            await check(channel, check_request([*headers, (b"x", b"")], raw=raw))
        )
        assert (refused.status, dict(refused.headers)[b"x-keylatch-error"]) == (
            403,
            b"misconfigured",
        )


@pytest.mark.usefixtures("patience")
async def test_concurrent_checks_are_limited(make_engine: MakeEngine, full: Created) -> None:
    """The next one is an error of gRPC at once, and those under way are answered."""
    hasher = Gated()
    engine = make_engine(hasher=hasher)
    async with served(engine, max_calls=2) as channel:
        calls = [
            asyncio.ensure_future(check(channel, check_request([auth_header(full)])))
            for _ in range(3)
        ]
        refused, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert [await code_of(each) for each in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
        hasher.gate.set()
        assert [http_response(await each).status for each in waiting] == [200, 200]
        assert http_response(await check(channel, check_request([auth_header(full)]))).status == 200
    await engine.stop()


async def test_only_so_many_connections_are_open_at_once(engine: Engine, full: Created) -> None:
    """Silent ones beyond that are closed, long before the 10 s that each has, and connections that
    are open go on; without such a limit none is closed."""
    address = f"127.0.0.1:{free_port()}"
    async with served(engine, address, max_connections=3) as channel:
        assert http_response(await check(channel, check_request([auth_header(full)]))).status == 200
        host, port = address.split(":")
        lines = [await asyncio.open_connection(host, int(port)) for _ in range(12)]
        reading = [asyncio.ensure_future(drained(reader)) for reader, _ in lines]
        for ended in itertools.islice(asyncio.as_completed(reading, timeout=8), 9):
            await ended
        assert http_response(await check(channel, check_request([auth_header(full)]))).status == 200
        await ended_all(lines, reading)
    async with served(engine, address) as channel:
        lines = [await asyncio.open_connection(host, int(port)) for _ in range(12)]
        reading = [asyncio.ensure_future(drained(reader)) for reader, _ in lines]
        assert http_response(await check(channel, check_request([auth_header(full)]))).status == 200
        assert [each for each in reading if each.done()] == []
        await ended_all(lines, reading)


async def ended_all(
    lines: "list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]",
    reading: "Sequence[asyncio.Future[None]]",
) -> None:
    for each in reading:
        each.cancel()
    await asyncio.wait(reading)
    for _, writer in lines:
        writer.close()


async def drained(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        await reader.read()


async def test_what_is_not_ready_fills_no_log(
    make_engine: MakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a hundred checks 1, 2, 4, … are logged, with the count."""
    broken = make_engine(store=Store(f"sqlite:///{tmp_path}/missing/keys.db"))
    of_service = b"\n#envoy.service.auth.v3.Authorization"
    async with served(broken) as channel:
        for _ in range(100):
            await call(channel, of_service, "/grpc.health.v1.Health/Check")
    await broken.stop()
    said = [message for message in caplog.messages if message.startswith("reported not ready")]
    assert len(said) == 7
    assert said[-1].endswith("; 64 times so far")


@pytest.mark.parametrize("service", ["envoy.service.auth.v2.Authorization", "Authorization"])
async def test_nothing_else_is_served(channel: grpc.aio.Channel, service: str) -> None:
    """An older version of the protocol above all, where answers mean something else."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, b"", f"/{service}/Check")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_official_bytes_are_read() -> None:
    """Every field of it is set there, those that keylatch does not know among them."""
    message = (
        b"\n\xd5\x01\n$\n\x11\n\x0f\x12\t127.0.0.1\x18\xc0\xb8\x02\x1a\x0c\n\x03key\x12\x05value"
        b'"\x01p\x12\x03\x12\x01d"y\n\x02\x08\x01\x12s\n\x017\x12\x04POST\x1a\x19\n\rauthorization'
        b'\x12\x08Bearer k"\x0e/v1/emails?x=1*\x04test2\x04http:\x01qB\x01fH\x05R\x08HTTP/1.1Z'
        b"\x01bb\x01\xffj\x19\n\n\n\x05X-Raw\x1a\x01\xff\n\x0b\n\x06x-text\x12\x01tR\x15\n\npermission"
        b"\x12\x07SENDINGZ\x11\n\x0f\n\x01f\x12\n\n\x08\n\x01x\x12\x03\x1a\x01yb\x03\n\x01s"
    )
    headers = [(b"authorization", b"Bearer k"), (b"x-raw", b"\xff"), (b"x-text", b"t")]
    assert parse_check_request(message) == CheckQuery(
        OriginalRequest("POST", "/v1/emails?x=1"), headers, [b"SENDING"], []
    )


def test_the_official_bytes_are_written() -> None:
    """An allow and a refusal, byte by byte."""
    identity = [(b"x-keylatch-key-id", b"key_1"), (b"x-keylatch-environment", b"")]
    assert allow(identity, [b"authorization"]) == (
        b"\n\x00\x1aM\x12\x1e\n\x1a\n\x11x-keylatch-key-id\x12\x05key_1\x18\x02\x12\x1c\n\x18\n\x16"
        b"x-keylatch-environment\x18\x02*\rauthorization"
    )
    refusal = Refusal(403, ((b"content-length", b"2"), (b"retry-after", b"1")), b"{}")
    assert deny(refusal) == (
        b"\n\x02\x08\x07\x12\x1f\n\x03\x08\x93\x03\x12\x14\n\x10\n\x0bretry-after\x12\x011\x18\x02"
        b"\x1a\x02{}"
    )


@pytest.mark.long
def test_it_says_what_to_install() -> None:
    """Installations that do not use it do not need it."""
    for package in ("grpc", "google.protobuf"):
        said = error_without_package(package, "import keylatch_sidecar.forward_auth.ext_authz_grpc")
        assert said.endswith("pip install 'keylatch[grpc]'")
    imports = "import sys, keylatch_sidecar.cli.program, keylatch_sidecar.app"
    program = f"{imports}; print('grpc' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "False\n"
