"""Request traces, where enabled: headers with times, an id in the log."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse
from django.test import Client, override_settings
from django.urls import path
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from keylatch.adapters.portal import Portal
from keylatch.asgi import APIKeyMiddleware
from keylatch.django import requires
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError, StoreUnavailable
from keylatch.logs import JSONLines
from keylatch.management.keyring import Created
from keylatch.settings import Settings
from keylatch.storage.store import Found, NotFound, Store
from keylatch.telemetry.request_trace import REQUEST_TRACE, request_id
from keylatch.wsgi import APIKeyMiddleware as WSGIMiddleware
from tests import test_django  # which sets Django up
from tests.sidecar.test_server import answers, served
from tests.support.clock import Clock
from tests.support.command_line import Operator, wait_for_exit
from tests.support.engines import MakeEngine
from tests.support.raw_http import send
from tests.support.servers import eventually, free_port
from tests.support.sidecars import sidecar_on

log = logging.getLogger("app")


async def hello(request: Request) -> PlainTextResponse:
    log.warning("hello")
    return PlainTextResponse("hello", headers={"Cache-Status": "app; hit"})


def app_behind(engine: Engine) -> ASGIApp:
    app = Starlette(routes=[Route("/", hello), Route("/public", hello)])
    app.add_middleware(APIKeyMiddleware, engine=engine, public=["/public"])
    return app


def hello_wsgi(environ: Any, start_response: Any) -> list[bytes]:
    log.warning("hello")
    start_response("200 OK", [("Cache-Status", "app; hit")])
    return [b"hello"]


def hello_django(request: HttpRequest) -> HttpResponse:
    log.warning("hello")
    return HttpResponse("hello", headers={"Cache-Status": "app; hit"})


urlpatterns = [
    path("", hello_django),
    path("public", hello_django),
    path("sent", requires("SENDING")(hello_django)),
]


class Caller:
    """A client with a key, over one of `KINDS`."""

    def __init__(self, kind: str, engine: Engine) -> None:
        self._kind = kind
        self._engine = engine

    async def create(self, permission: str = "FULL") -> Created:
        async def create() -> Created:
            keyring = await self._engine.keyring()
            return await keyring.create("org", "a key", permission=permission)

        return (
            await create()
            if self._kind == "asgi"
            else Portal.for_engine(self._engine).run(create())
        )

    async def get(self, path: str = "/", token: str = "", **headers: str) -> httpx.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent["Authorization"] = f"Bearer {token}"
        project = {"engine": self._engine, "public": ["/public"]}
        with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[DJANGO], KEYLATCH=project):
            if self._kind in ("wsgi", "django"):
                return self._get_wsgi(path, sent)
            return await self._get_asgi(path, sent)

    async def _get_asgi(self, path: str, headers: dict[str, str]) -> httpx.Response:
        app = app_behind(self._engine) if self._kind == "asgi" else ASGIHandler()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers=headers)

    def _get_wsgi(self, path: str, headers: dict[str, str]) -> httpx.Response:
        app: Any = WSGIHandler()
        if self._kind == "wsgi":
            app = WSGIMiddleware(hello_wsgi, engine=self._engine, public=["/public"])
        with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://test") as client:
            return client.get(path, headers=headers)

    async def end(self) -> None:
        if self._kind == "asgi":
            await self._engine.stop()
        else:
            Portal.for_engine(self._engine).close()


KINDS = ("asgi", "wsgi", "django", "django over asgi")
DJANGO = "keylatch.django.APIKeyMiddleware"


def cache_status(answer: httpx.Response) -> list[str]:
    """The members of the list, in one field or in several (RFC 9110 section 5.3)."""
    return answer.headers.get_list("Cache-Status", split_commas=True)


def durations(answer: httpx.Response) -> list[str]:
    """The names of what is timed, in order."""
    value = answer.headers["Server-Timing"]
    assert re.fullmatch(r"[\w-]+;dur=\d+\.\d{3}(, [\w-]+;dur=\d+\.\d{3})*", value)
    return re.findall(r"([\w-]+);dur", value)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_names_the_source_of_the_decision(
    kind: str, make_engine: MakeEngine
) -> None:
    """The store at first, then this process; the app's own word stands before ours."""
    caller = Caller(kind, make_engine(timing=True))
    created = await caller.create()
    token = created.token.reveal()
    first, second = await caller.get(token=token), await caller.get(token=token)
    from_store = "keylatch; fwd=miss; detail=store"
    assert cache_status(first) == ["app; hit", from_store]
    assert [name for name in durations(first) if name != "keylatch-parse"] == [
        "keylatch",
        "keylatch-store",
        "keylatch-hash",
    ]
    assert cache_status(second) == ["app; hit", "keylatch; hit"]
    assert durations(second) == ["keylatch"]
    public = await caller.get("/public", token=token)
    assert "Server-Timing" not in public.headers
    assert cache_status(public) == ["app; hit"]
    await caller.end()


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
async def test_a_refusal_does_not_tell_who_knew(kind: str, make_engine: MakeEngine) -> None:
    """An attacker would learn which of them name a key: all refusals look the same."""
    caller = Caller(kind, make_engine(timing=True))
    created = await caller.create()
    token = created.token.reveal()
    assert (await caller.get(token=token)).status_code == 200
    tried = ["kl_live_x", token[:-1] + "-", token[:8] + token[8:20].swapcase() + token[20:]]
    answers = [await caller.get(token=each) for each in tried]
    for answer in answers:
        assert answer.status_code == 401
        assert durations(answer) == ["keylatch"]
        assert "Cache-Status" not in answer.headers
    await caller.end()


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_traced_unless_enabled(kind: str, make_engine: MakeEngine) -> None:
    """By default no header is added, and no trail is made."""
    caller = Caller(kind, make_engine())
    created = await caller.create()
    answer = await caller.get(token=created.token.reveal())
    assert cache_status(answer) == ["app; hit"]
    assert "Server-Timing" not in answer.headers
    await caller.end()


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["django", "django over asgi"])
async def test_what_a_view_declares_belongs_to_the_check(
    kind: str, make_engine: MakeEngine
) -> None:
    """The source of the decision is in the answer if the view accepts, and not if it refuses."""
    caller = Caller(kind, make_engine(timing=True))
    token = (await caller.create("SENDING")).token.reveal()
    first, second, refused = [await caller.get(to, token) for to in ("/sent", "/sent", "/")]
    assert cache_status(first) == ["app; hit", "keylatch; fwd=miss; detail=store"]
    assert cache_status(second) == ["app; hit", "keylatch; hit"]
    assert (refused.status_code, durations(refused)) == (403, ["keylatch"])
    assert "Cache-Status" not in refused.headers
    await caller.end()


@pytest.mark.parametrize("timing", [True, False])
def test_django_uses_its_own_setting(timing: bool, store_url: str) -> None:
    """In the dict KEYLATCH, beside the store."""
    project = {"store": store_url, "timing": timing}
    with override_settings(MIDDLEWARE=["tests.test_django.Remembered"], KEYLATCH=project):
        answer = Client().get("/")
    test_django.Remembered.opened.pop().close()
    assert answer.status_code == 401
    assert ("Server-Timing" in answer.headers) is timing


def test_verify_has_the_header_too(store_url: str, clock: Clock) -> None:
    """In the answer to the proxy; management has no check to tell of there."""
    with (
        sidecar_on(store_url, clock, timing=True) as sidecar,
        sidecar.client(sidecar.create()) as client,
        sidecar.client() as anybody,
    ):
        values = [client.get("/verify").headers["Cache-Status"] for _ in range(2)]
        assert values == ["keylatch; fwd=miss; detail=store", "keylatch; hit"]
        assert durations(client.get("/ext_authz/x")) == ["keylatch"]
        assert durations(anybody.get("/verify")) == ["keylatch"]
        assert "Server-Timing" not in anybody.get("/healthz").headers


# Ids and lines


@pytest.mark.parametrize(
    "given", ["abc", "A-Z_0.9:=+/", "0f" * 32, "550e8400-e29b-41d4-a716-446655440000"]
)
def test_a_plain_request_id_is_kept(given: str) -> None:
    """So that the log lines of all parts that had the request can be joined."""
    assert request_id(given) == given


@pytest.mark.parametrize(
    "given",
    [
        "",
        "x" * 65,
        "a b",
        "a" * 27 + "Z",
        "t_" + "aB3" * 9,
        'a"b',
        "a\nb",
        "é",
        "kl_live_" + "a" * 12 + "_" + "b" * 41,
    ],
)
def test_any_other_gets_a_new_one(given: str) -> None:
    """Too long, not plain, or a token in the wrong place."""
    assert re.fullmatch(r"[0-9a-f]{16}", request_id(given))
    assert request_id(given) != request_id(given)


class Broken(Store):
    """A store that can be broken, and says so."""

    broken = False

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._find = self.keys.find
        self.keys.find = self.find  # type: ignore[method-assign]

    async def find(self, key_id: str, anchor: int = 0) -> Found | NotFound:
        if self.broken:
            log.warning("the flight failed")
            raise StoreUnavailable("broken by the test")
        return await self._find(key_id, anchor)


@contextlib.contextmanager
def json_lines() -> Iterator[list[dict[str, Any]]]:
    """What is logged in the block, taken apart."""
    lines: list[dict[str, Any]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.partition(".")[0] not in ("app", "keylatch"):
                return  # the client's
            text = self.format(record)
            assert "\n" not in text
            lines.append(json.loads(text))

    handler = Handler()
    handler.setFormatter(JSONLines())
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
async def test_lines_have_the_id_of_their_request(
    kind: str, make_engine: MakeEngine, store_url: str
) -> None:
    """The app's and keylatch's, also those of a flight on another thread; none where none is."""
    engine = make_engine(log="json", store=Broken(store_url))
    caller = Caller(kind, engine)
    token = (await caller.create()).token.reveal()
    with json_lines() as lines:
        log.warning("outside")
        answer = await caller.get(token=token, X_Request_Id="mine")
        assert (answer.status_code, "Server-Timing" in answer.headers) == (200, False)
        engine._l1.clear()
        engine.store.broken = True  # type: ignore[attr-defined]
        assert (await caller.get(token=token, X_Request_Id="theirs")).status_code == 503
        await caller.get("/public")
    await caller.end()
    said = [(line["message"], line.get("requestId")) for line in lines]
    assert said[0] == ("outside", None)
    assert said[1] == ("hello", "mine")
    assert said[2] == ("the flight failed", "theirs")
    assert said[3] == ("checks are refused with 503: broken by the test", "theirs")
    assert re.fullmatch(r"[0-9a-f]{16}", said[-1][1] or "")
    assert REQUEST_TRACE.get() is None


def test_a_line_is_json_whatever_it_says() -> None:
    """Line breaks, quotes and exceptions stay inside; a token is made unusable."""
    token = "kl_live_" + "a" * 12 + "_" + "b" * 41
    with json_lines() as lines:
        try:
            raise ValueError(f'of "{token}"\n')
        except ValueError:
            log.exception("it failed: %s", token)
    (line,) = lines
    assert line["level"] == "error"
    assert line["logger"] == "app"
    assert line["message"] == "it failed: kl_live_..."
    assert "ValueError" in line["exception"]
    assert "bbbb" not in json.dumps(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_logs_json(operator: Operator, workers: str) -> None:
    """Every line of standard error, the server's own and the workers' too."""
    key = operator.create()
    port = free_port()
    place = f"http://127.0.0.1:{port}"
    words = ["--port", str(port), "--workers", workers, "--log", "json", "--timing", "on"]
    with served(operator, *words) as process:
        eventually(lambda: answers(place) or process.poll() is not None)
        credential = f"Authorization: Bearer {key['token']}".encode()
        fields = dict(send(place, b"GET /verify", credential).headers)
        assert b"server-timing" in fields
        process.terminate()
        stopped = wait_for_exit(process)
    lines = [json.loads(line) for line in stopped.stderr.splitlines()]
    assert any(line["message"] == f"listening on 127.0.0.1:{port}" for line in lines)
    assert {"keylatch", "uvicorn.error"} <= {line["logger"] for line in lines}


def test_wrong_settings_are_reported_together() -> None:
    """Each with what it may be."""
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(log="xml", timing="maybe")
    assert {hint for _, hint in caught.value.mistakes} == {"text or json", "off or on"}
