"""`KEYLATCH_LOG_FAILURES=on`: each refusal with its reason, in one line, and nothing else."""

import asyncio
import threading
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from django.test import AsyncClient, Client
from starlette.applications import Starlette
from starlette.types import ASGIApp

from keylatch.adapters.view_permissions import any_of, refusal_of
from keylatch.asgi import APIKeyMiddleware
from keylatch.core.decisions import Reason
from keylatch.core.tokens import MacKeys
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.storage.store import Store
from keylatch.telemetry.failure_log import FailureLog, address_of
from keylatch.testing import Keys
from keylatch.wsgi import APIKeyMiddleware as WSGIMiddleware
from keylatch_sidecar.app import create_app
from keylatch_sidecar.settings import ProxySettings
from tests.sidecar.forward_auth.test_ext_authz_grpc import check, check_request, served
from tests.support.clock import Clock
from tests.support.engines import MakeEngine
from tests.support.raw_http import asgi_request
from tests.test_django import Remembered, project

pytestmark = pytest.mark.anyio

UNKNOWN_TOKEN = MacKeys([b"s" * 32]).mint("kl", "live")
HERE = ("203.0.113.7", 4711)
ASK: dict[str, Any] = {"client": HERE}


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of refused requests."""
    return [each.message for each in caplog.records if each.name == "keylatch.failures"]


def auth_header(token: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {token}".encode())]


async def made(engine: Engine, permission: str = "FULL") -> Created:
    return await (await engine.keyring()).create("acme", "name", permission=permission)


@pytest.fixture
async def logging_engine(make_engine: MakeEngine) -> Any:
    engine = make_engine(log_failures=True)
    await engine.start()
    yield engine
    await engine.stop()


def protected(engine: Engine) -> ASGIApp:
    return APIKeyMiddleware(Starlette(), engine=engine, permissions={"SENDING": ["GET /send"]})


async def refused_in_all_ways(app: ASGIApp, engine: Engine, path: str) -> list[str]:
    """Requests of every kind, and the secrets that they held."""
    small, dead = await made(engine, "SENDING"), await made(engine)
    await (await engine.keyring()).delete("acme", dead.record.id)
    native = dead.token.reveal()
    for token in (UNKNOWN_TOKEN.reveal(), native, small.token.reveal()):
        assert (await asgi_request(app, path, auth_header(token), **ASK)).status in (401, 403)
    assert (await asgi_request(app, path, [(b"authorization", b"Basic x")], **ASK)).status in (
        400,
        401,
    )
    assert (await asgi_request(app, path, **ASK)).status == 401
    return [UNKNOWN_TOKEN.reveal()[-41:], UNKNOWN_TOKEN.key_id, native[-41:], dead.record.id]


EXPECTED = [
    f"refused a request from {HERE[0]}: {reason}"
    for reason in ("forged", "revoked", "insufficient_scope", "missing", "missing")
]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "app"),
        ("/v1/api-keys", "sidecar"),
        ("/v1/api_keys", "sidecar"),
        ("/metrics", "sidecar"),
    ],
)
async def test_each_refused_request_is_a_line(
    logging_engine: Engine, caplog: pytest.LogCaptureFixture, path: str, name: str
) -> None:
    """Of the middleware and of management: the address, the reason, which answers do not have, and
    neither a token nor an id."""
    app = protected(logging_engine) if name == "app" else create_app(logging_engine)
    secrets = await refused_in_all_ways(app, logging_engine, path)
    assert lines(caplog) == EXPECTED
    for secret in secrets:
        assert secret not in caplog.text


@pytest.mark.parametrize("path", ["/verify?permission=FULL", "/ext_authz/v1/emails"])
async def test_what_a_proxy_asks_about_is_too(
    logging_engine: Engine, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """With the proxy's address: no header says the client's that a client could not send."""
    app = create_app(logging_engine, ProxySettings())
    path, _, query = path.partition("?")
    forged = [(b"x-forwarded-for", b"192.0.2.99"), (b"x-keylatch-require", b"FULL")]
    for headers in (auth_header(UNKNOWN_TOKEN.reveal()), []):
        options = {"query_string": query.encode(), **ASK}
        assert (await asgi_request(app, path, [*headers, *forged], **options)).status == 401
    assert lines(caplog) == [EXPECTED[0], EXPECTED[3]]


async def test_over_grpc_the_address_is_in_the_message(
    logging_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """The proxy writes all of it, so this one is the client's."""
    request = check_request(auth_header(UNKNOWN_TOKEN.reveal()))
    request.attributes.source.address.socket_address.address = b"2001:db8::1"
    async with served(logging_engine) as channel:
        await check(channel, request)
        await check(channel, check_request(auth_header(UNKNOWN_TOKEN.reveal())))
    assert lines(caplog) == [
        "refused a request from 2001:db8::1: forged",
        "refused a request from no address: forged",
    ]


def call(app: Any, **environ: Any) -> None:
    setup_testing_defaults(environ)
    list(app(environ, lambda *_: None))


def test_over_wsgi_it_is_the_same(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a view requires more than the rules do."""

    def strict(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        refusal = refusal_of(environ, any_of(["FULL"]))
        assert refusal is not None
        start_response("403 Forbidden", [])
        return []

    engine = make_engine(log_failures=True)
    app = WSGIMiddleware(strict, engine=engine, permissions={"SENDING": ["GET /"]})
    try:
        token = app._portal.run(made(engine, "SENDING")).token.reveal()
        for value in (UNKNOWN_TOKEN.reveal(), token):
            call(app, HTTP_AUTHORIZATION=f"Bearer {value}", REMOTE_ADDR=HERE[0])
    finally:
        app.close()
    assert lines(caplog) == [EXPECTED[0], EXPECTED[2]]


def test_in_django_it_is_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """Under WSGI and under ASGI."""
    engine = Keys(log_failures=True).engine()
    with project(engine):
        sent = {"headers": {"Authorization": f"Bearer {UNKNOWN_TOKEN.reveal()}"}}
        assert Client().get("/", REMOTE_ADDR=HERE[0], **sent).status_code == 401
        assert asyncio.run(_get("/async", **sent)) == 401
    while Remembered.opened:
        Remembered.opened.pop().close()
    assert lines(caplog) == [EXPECTED[0], "refused a request from 127.0.0.1: forged"]


async def _get(path: str, **sent: Any) -> int:
    return int((await AsyncClient().get(path, **sent)).status_code)


async def test_by_default_nothing_is_logged(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Addresses are data about people; and a flood writes nothing."""
    assert engine.log_failure is None
    await refused_in_all_ways(protected(engine), engine, "/")
    await refused_in_all_ways(create_app(engine), engine, "/v1/api-keys")
    assert lines(caplog) == []


async def test_the_peer_of_an_accepted_request_is_not_read(
    logging_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A scope without a client is enough for it, and no line is written."""
    key = await made(logging_engine)
    app = create_app(logging_engine)
    for _ in range(3):
        answer = await asgi_request(
            app, "/verify", auth_header(key.token.reveal()), client=object()
        )
        assert answer.status == 200
    assert lines(caplog) == []


async def test_an_outage_is_no_failure_of_its_callers(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """503 has a log of its own."""
    engine = make_engine(log_failures=True, store=Store("sqlite:////missing/keys.db"))
    answer = await asgi_request(protected(engine), "/", auth_header(UNKNOWN_TOKEN.reveal()), **ASK)
    await engine.stop()
    assert answer.status == 503
    assert lines(caplog) == []


# A flood


def here() -> tuple[str | None, str | None]:
    return HERE[0], "agent"


def test_a_flood_writes_ten_lines_a_second(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """And says how many it left out: with the next line, and when the process tidies or ends."""
    failures = FailureLog(clock)
    for _ in range(1_000):
        failures.add(Reason.FORGED, here)
    assert lines(caplog) == [EXPECTED[0]] * 10
    clock.tick(1)
    failures.add(Reason.FORGED, here)
    left_out = "refused 990 more requests, which were not logged one by one"
    assert lines(caplog)[10:] == [left_out, EXPECTED[0]]
    for _ in range(12):
        failures.add(Reason.FORGED, here)
    failures.flush()
    failures.flush()
    assert lines(caplog)[21:] == [left_out.replace("990", "3")]


def test_without_the_limit_a_flood_writes_all(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The broken twin: a clock that runs as fast as the flood."""

    def racing() -> float:
        clock.tick(1)
        return clock()

    failures = FailureLog(racing)
    for _ in range(100):
        failures.add(Reason.FORGED, here)
    assert len(lines(caplog)) == 100


def test_threads_share_the_limit(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """None is counted twice, and none is lost."""
    failures = FailureLog(clock)

    def flood() -> None:
        for _ in range(500):
            failures.add(Reason.FORGED, here)

    threads = [threading.Thread(target=flood) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures.flush()
    said = lines(caplog)
    assert said.count(EXPECTED[0]) == 10
    counts = [int(line.split()[1]) for line in said if "more requests" in line]
    assert sum(counts) == 8 * 500 - 10


async def test_a_stop_says_what_was_left_out(
    logging_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """So the count is not lost with the process."""
    app = protected(logging_engine)
    for _ in range(25):
        await asgi_request(app, "/", **ASK)
    await logging_engine.stop()
    assert lines(caplog)[-1] == "refused 15 more requests, which were not logged one by one"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("fe80::1%eth0\nERROR forged line", "fe80::1"),
        (None, "no address"),
        ("", "an invalid address"),
        ("203.0.113.7\nERROR forged line", "an invalid address"),
        (f"kl_live_{'x' * 12}_{'y' * 41}", "an invalid address"),
        ("unix:", "an invalid address"),
    ],
)
def test_only_addresses_are_written(given: str | None, written: str) -> None:
    """A server that trusts `X-Forwarded-For` passes on whatever a client sends."""
    assert address_of(given) == written


def test_a_child_begins_anew(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Also if it was forked while another thread held the lock."""
    failures = FailureLog(clock)
    failures._lock.acquire()
    failures.after_fork_in_child()
    failures.add(Reason.FORGED, here)
    assert lines(caplog) == [EXPECTED[0]]
