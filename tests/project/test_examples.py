"""The examples in deploy/example, each started as its docstring says and called over a socket.

Below them: what a framework receives besides requests, through the middleware around it.
"""

import ast
import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import litestar
import pytest
import quart
from litestar.connection import WebSocket
from starlette.types import ASGIApp
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from keylatch import Created, Engine, Settings
from keylatch.asgi import APIKeyMiddleware
from tests.support import raw_http
from tests.support.engines import MakeEngine
from tests.support.servers import eventually, free_port, serving

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
NAMES = ["app", "starlette_app", "litestar_app", "quart_app", "flask_app", "django_app"]
NAMES += ["django_app over ASGI"]


def readme_commands(name: str) -> tuple[list[str], list[str]]:
    """The two commands in an example's docstring: to create a key, and to serve."""
    name, _, second = name.partition(" over ")
    source = (ROOT / f"deploy/example/{name}.py").read_text()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    create, *serve = (line for line in docstring.splitlines() if line.startswith("    "))
    return shlex.split(create), shlex.split(serve[-1] if second else serve[0])


class Keys:
    """The keys of one store, and the environment of the programs that share it."""

    def __init__(self, store_url: str, runner: asyncio.Runner) -> None:
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("KEYLATCH_")}
        self.environment |= {"KEYLATCH_STORE": store_url, "KEYLATCH_HASHER": "sha256"}
        self._runner = runner
        self._engine = Engine(Settings.load(store=store_url, redis="", hasher="sha256"))

    def create(self, permission: str = "FULL") -> Created:
        keyring = self._runner.run(self._engine.keyring())
        return self._runner.run(keyring.create("default", permission, permission=permission))

    def revoke(self, key: Created) -> None:
        keyring = self._runner.run(self._engine.keyring())
        assert self._runner.run(keyring.delete("default", key.record.id)) is not None

    def last_used(self, key: Created) -> int | None:
        found = self._runner.run(self._engine.store.keys.get("default", key.record.id))
        return found.last_used if found else None

    def close(self) -> None:
        self._runner.run(self._engine.stop())


@dataclass
class Example:
    """One of them, being served."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def answers(self) -> bool:
        """Whether it serves by now."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return raw_http.send(self.url, b"GET /healthz").status == 200
        except OSError:
            return False

    def request(
        self, line: bytes, key: Created | None = None, *fields: bytes
    ) -> raw_http.RawResponse:
        """An answer, without what servers add of their own."""
        if key is not None:
            fields += (b"Authorization: Bearer " + key.token.reveal().encode(),)
        answer = raw_http.send(self.url, line, *fields)
        own = (b"date", b"server")
        kept = tuple(field for field in answer.headers if field[0].lower() not in own)
        return raw_http.RawResponse(answer.status, kept, answer.body)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keys]:
    with asyncio.Runner() as runner:
        keys = Keys(f"sqlite:///{tmp_path_factory.mktemp('examples')}/keys.db", runner)
        yield keys
        keys.close()


@pytest.fixture(scope="module")
def examples(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Example]]:
    """All of them on one store, started at the same time."""
    folder = tmp_path_factory.mktemp("logs")
    examples: dict[str, Example] = {}
    keys.create()  # so that the store is made by one, and not by four at once
    try:
        for name in NAMES:
            _, (server, *arguments) = readme_commands(name)
            port, log = free_port(), folder / f"{name}.log"
            bind = ["-b", f"127.0.0.1:{port}"]
            place = {"uvicorn": ["--port", str(port)], "hypercorn": bind, "gunicorn": bind}
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", server, *place[server], *arguments],
                    env=keys.environment,
                    cwd=ROOT,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            examples[name] = Example(f"http://127.0.0.1:{port}", process, log)
        for example in examples.values():
            eventually(example.answers)
        yield examples
    finally:
        for example in examples.values():
            with contextlib.suppress(ProcessLookupError):  # it stopped in order
                os.killpg(example.process.pid, signal.SIGKILL)  # its workers, too
            example.process.wait()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_does_what_it_shows(keys: Keys, examples: dict[str, Example], name: str) -> None:
    """The same statuses, answers and refusals from each framework on each server."""
    example = examples[name]
    admin_key, sender, gone = keys.create(), keys.create("SENDING"), keys.create()

    answer = example.request(b"GET /v1/me", admin_key)
    assert (answer.status, json.loads(answer.body)) == (
        200,
        {"key": admin_key.record.id, "name": "FULL"},
    )
    for key in (admin_key, sender):
        answer = example.request(b"POST /v1/emails", key)
        assert (answer.status, json.loads(answer.body)) == (200, {"sent by": key.record.name})

    without_key = example.request(b"GET /v1/me")
    assert without_key == refusal(
        401,
        "unauthorized",
        "Send an API key: Authorization: Bearer <key>",
        'Bearer realm="keylatch"',
    )
    assert (
        example.request(b"POST /v1/emails") == example.request(b"GET /v1/elsewhere") == without_key
    )
    too_small = refusal(
        403,
        "insufficient_scope",
        "The API key may not do this",
        'Bearer realm="keylatch", error="insufficient_scope", scope="FULL"',
    )
    for line in (b"GET /v1/me", b"POST /v1/emails/", b"GET /v1/elsewhere"):
        assert example.request(line, sender) == too_small
    if name.startswith("django"):  # its views are declared for all methods at once
        assert example.request(b"GET /v1/emails", sender).status == 405
    else:
        assert example.request(b"GET /v1/emails", sender) == too_small
    assert example.request(b"GET /v1/elsewhere", admin_key).status == 404

    assert example.request(b"GET /v1/me", gone).status == 200
    keys.revoke(gone)
    assert example.request(b"GET /v1/me", gone) == refusal(
        401,
        "invalid_token",
        "The API key is not valid",
        'Bearer realm="keylatch", error="invalid_token"',
    )


def refusal(status: int, error: str, description: str, challenge: str) -> raw_http.RawResponse:
    """A refusal as it goes over the raw_http, byte by byte."""
    body = {"error": error, "error_description": description}
    headers = {
        b"cache-control": b"no-store",
        b"content-type": b"application/json",
        b"www-authenticate": challenge.encode(),
        b"x-keylatch-error": error.encode(),
    }
    return raw_http.expected_response(
        status, headers, json.dumps(body, separators=(",", ":")).encode()
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_example_takes_identity_from_no_header(
    keys: Keys, examples: dict[str, Example], name: str
) -> None:
    """Headers that look like keylatch's own change nothing, in any spelling."""
    admin_key, sender = keys.create(), keys.create("SENDING")
    posing = (
        b"X-Keylatch-Key-Id: key_boss",
        b"X_Keylatch_Permission: FULL",
        b"x-keylatch-Organization-Id: default",
    )
    for line, key in ((b"GET /v1/me", admin_key), (b"GET /v1/me", sender), (b"GET /v1/me", None)):
        assert examples[name].request(line, key, *posing) == examples[name].request(line, key)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_answers_head(keys: Keys, examples: dict[str, Example], name: str) -> None:
    """As it answers GET, without the body; a framework that knows no HEAD of its own says 405."""
    example = examples[name]
    for key in (None, keys.create("SENDING")):
        got, head = (example.request(method + b" /v1/me", key) for method in (b"GET", b"HEAD"))
        assert head == raw_http.RawResponse(got.status, got.headers, b"")
    allowed = example.request(b"HEAD /v1/me", keys.create())
    assert (allowed.status in (200, 405), allowed.body) == (True, b"")


def test_the_fastapi_example_shows_its_documentation(examples: dict[str, Example]) -> None:
    """Public, with what each route needs."""
    assert examples["app"].request(b"GET /docs").status == 200
    paths = json.loads(examples["app"].request(b"GET /openapi.json").body)["paths"]
    assert paths["/v1/me"]["get"]["security"] == [{"APIKey": []}]
    assert paths["/v1/emails"]["post"]["security"] == [{"APIKey": ["SENDING"]}]


def test_the_key_that_the_examples_tell_to_create(keys: Keys, examples: dict[str, Example]) -> None:
    """They all tell the same command; its output is a key for each."""
    (command,) = {tuple(readme_commands(name)[0]) for name in NAMES}
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [program, *command[1:]], env=keys.environment, capture_output=True, check=True
    )
    for example in examples.values():
        field = b"Authorization: Bearer " + done.stdout.strip()
        assert json.loads(example.request(b"GET /v1/me", None, field).body)["name"] == "me"


@pytest.mark.parametrize("name", NAMES)
def test_an_example_stops_in_order(keys: Keys, examples: dict[str, Example], name: str) -> None:
    """On SIGTERM it stores when its keys were used: lifespan events reach the middleware."""
    key = keys.create()
    assert examples[name].request(b"GET /v1/me", key).status == 200
    examples[name].process.terminate()
    examples[name].process.wait(20)
    assert keys.last_used(key) is not None


# What a framework receives besides requests

Events = list[str]


def litestar_app(events: Events) -> ASGIApp:
    @litestar.websocket("/chat")
    async def chat(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        await socket.send_text(socket.user.key_name)
        await socket.close()

    return litestar.Litestar(  # type: ignore[return-value]
        [chat],
        on_startup=[lambda: events.append("started")],
        on_shutdown=[lambda: events.append("stopped")],
    )


def quart_app(events: Events) -> ASGIApp:
    app = quart.Quart(__name__)

    @app.websocket("/chat")
    async def chat() -> None:
        await quart.websocket.accept()
        await quart.websocket.send(quart.websocket.scope["user"].key_name)  # type: ignore[typeddict-item]
        await quart.websocket.close(1000)

    @app.before_serving
    async def started() -> None:
        events.append("started")

    @app.after_serving
    async def stopped() -> None:
        events.append("stopped")

    return app  # type: ignore[return-value]


@pytest.mark.parametrize("build", [litestar_app, quart_app])
def test_websockets_and_lifespan_pass(
    make_engine: MakeEngine, build: Callable[[Events], ASGIApp]
) -> None:
    """The app receives startup and shutdown, and a WebSocket knows whose it is."""
    operator = make_engine()

    async def operated(work: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await work()
        finally:
            await operator.stop()

    async def created() -> Created:
        return await (await operator.keyring()).create("default", "chatty")

    key: Created = asyncio.run(operated(created))
    events: Events = []
    with serving(APIKeyMiddleware(build(events), engine=make_engine())) as url:
        assert events == ["started"]
        place = url.replace("http", "ws") + "/chat"
        fields = {"Authorization": f"Bearer {key.token.reveal()}"}
        with connect(place, additional_headers=fields, proxy=None) as socket:
            assert socket.recv() == "chatty"
        with pytest.raises(InvalidStatus, match="401"):
            connect(place, proxy=None)
    assert events == ["started", "stopped"]
    stored = asyncio.run(operated(lambda: operator.store.keys.get("default", key.record.id)))
    assert stored.last_used == key.record.created_at
