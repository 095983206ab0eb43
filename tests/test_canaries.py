"""1,000 tokens go through everything that can happen to them, and then nothing knows them.

A token may be seen in two places: in the answer that creates it, and in the request that its
holder sends. Every other byte that keylatch writes, logs, raises or answers is searched here.
"""

import asyncio
import contextlib
import gc
import io
import itertools
import json
import logging
import pickle
import re
import sqlite3
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import fakeredis
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import keylatch
import keylatch_sidecar
from keylatch.asgi import APIKeyMiddleware
from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.core.tokens import SECRET_LENGTH, Token
from keylatch.engine import Engine
from keylatch.errors import KeylatchError
from keylatch.logs import JSONLines
from keylatch.settings import Settings
from keylatch_sidecar.app import create_app
from tests.support.raw_http import exchange, http_scope
from tests.support.servers import serving

pytestmark = pytest.mark.long

CANARIES = 1_000
_TAIL = 41
_TRACED = 100  # watching every frame is slow, so only some are watched
_PACKAGES = tuple(
    str(Path(package.__file__ or "").parent) for package in (keylatch, keylatch_sidecar)
)


def secret_version_of(token: str) -> bytes:
    """The secret: the random part, without the checks, of which a partial shows some."""
    return token[-_TAIL:][:SECRET_LENGTH].encode()


def hits(haystack: bytes, secrets: set[bytes]) -> set[bytes]:
    """The secrets that a haystack holds."""
    runs = re.findall(rb"[0-9A-Za-z]{%d,}" % SECRET_LENGTH, haystack)
    windows = (
        run[at : at + SECRET_LENGTH] for run in runs for at in range(len(run) - SECRET_LENGTH + 1)
    )
    return secrets & set(windows)


# Where it is written down


@contextlib.contextmanager
def every_log_line(form: logging.Formatter | None = None) -> Iterator[io.StringIO]:
    """All log records, at DEBUG."""
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(form)
    names = ("", "keylatch", "sqlalchemy", "redis", "uvicorn", "asyncio", "alembic")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def every_traceback() -> Iterator[list[str]]:
    """The formatted traceback of every exception that passes through a frame of keylatch's."""
    texts: list[str] = []

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGES):
            return None
        frame.f_trace_lines = False
        if event == "exception" and argument[0] not in (StopIteration, StopAsyncIteration):
            texts.append("".join(traceback.format_exception(argument[1])))
        return watch

    before = sys.gettrace()
    threading.settrace(watch)
    sys.settrace(watch)
    try:
        yield texts
    finally:
        sys.settrace(before)
        threading.settrace(before)


def every_repr() -> str:
    """How each living object of keylatch's shows itself, and what it leaves in a pickle."""
    shown = []
    for thing in gc.get_objects():
        if str(type(thing).__module__).partition(".")[0] in ("keylatch", "keylatch_sidecar"):
            shown += [repr(thing), str(thing), f"{thing}"]
            with contextlib.suppress(Exception):
                shown.append(pickle.dumps(thing).decode("latin-1"))
    return "\n".join(shown)


class Unscrubbed(JSONLines):
    """JSON lines without the last look for tokens, which would hide what this looks for."""

    def scrubbed(self, line: str) -> str:
        return line


# What happens to them


@dataclass(frozen=True)
class Answer:
    status: int
    everything: bytes
    body: bytes


async def call(
    app: ASGIApp, method: str, path: str, *authorization: str, body: bytes = b"", **scope: Any
) -> Answer:
    """One request in this process."""
    headers = [(b"authorization", value.encode("latin-1")) for value in authorization]
    headers.append((b"content-type", b"application/json"))
    if authorization:  # pasted there, too
        headers.append((b"x-request-id", authorization[0].rpartition(" ")[2].encode("latin-1")))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(http_scope(path, headers, method=method, **scope), receive, send)
    start, *rest = sent
    whole = b"".join(message.get("body", b"") for message in rest)
    return Answer(start["status"], repr(start).encode() + whole, whole)


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": repr(scope["user"]).encode()})


MANGLED: list[Callable[[str], tuple[str, ...]]] = [
    lambda token: (f"Bearer {token[:-1]}",),
    lambda token: (f"Bearer {token}x",),
    lambda token: (f"Bearer {token[:-1]}{'1' if token[-1] == '0' else '0'}",),
    lambda token: (f"Bearer {token.replace('_live_', '_test_')}",),
    lambda token: (f"Bearer {token} {token}",),
    lambda token: (f"Bearer {token}", f"Bearer {token}"),
    lambda token: (f'Bearer "{token}"',),
    lambda token: (f"Bearer {token}\xff",),
    lambda token: (f"Bearer {token * 9}",),
    lambda token: (f"Basic {token}",),
    lambda token: (token,),
]

BAD_BODIES: list[Callable[[str], str]] = [
    lambda token: token,
    lambda token: json.dumps(token),
    lambda token: json.dumps([token]),
    lambda token: json.dumps({"name": [token]}),
    lambda token: json.dumps({"name": token + "\0"}),
    lambda token: json.dumps({"name": token * 2}),
    lambda token: json.dumps({"name": "name", "token": token}),
    lambda token: json.dumps({"name": "name", token: 1}),
    lambda token: f'{{"name": "{token}", "name": "{token}"}}',
    lambda token: f'{{"{token}": 1, "{token}": 1}}',
    lambda token: json.dumps({"name": "name", "permission": token}),
    lambda token: json.dumps({"name": "name", "environment": token}),
    lambda token: json.dumps({"name": "name", "expiresAt": token}),
    lambda token: f'{{"name": "{token}", ',
    lambda token: f'{{"name": {token}}}',
]

CHANGES = [
    ("POST", "/v1/api-keys"),
    ("POST", "/v1/api_keys"),
    ("PATCH", "/v1/api-keys/{id}"),
    ("POST", "/leaked"),
]

PROFILES = ["/v1/api-keys", "/v1/api_keys"]


Endpoint = tuple[ASGIApp, str]


class World:
    """A sidecar and a protected app on one store and one Redis, and all that they answer."""

    def __init__(self, store: str, redis: Any) -> None:
        self.store = store
        self.redis = redis
        self.tokens: dict[str, str] = {}
        self.answers: list[bytes] = []
        self.engine, self._own = self._new_engine(redis), self._new_engine(redis)
        self.sidecar = create_app(self.engine)
        protected = APIKeyMiddleware(hello, engine=self._own)
        checks: list[Endpoint] = [(self.sidecar, "/verify"), (protected, "/")]
        self._checks = itertools.cycle(checks)
        self._doors = itertools.cycle([*checks, (self.sidecar, "/v1/api-keys")])
        self._mangled, self._bodies = itertools.cycle(MANGLED), itertools.cycle(BAD_BODIES)
        self._changes, self._profiles = itertools.cycle(CHANGES), itertools.cycle(PROFILES)

    def _new_engine(self, redis: Any = None, **hasher: Any) -> Engine:
        return Engine(
            Settings.load(store=self.store, redis="", log="json", timing=True),
            hasher=Hasher("argon2id", CHEAPEST, **hasher),
            redis=None if redis is None else fakeredis.FakeAsyncRedis(server=redis),
        )

    async def begin(self) -> None:
        await self.engine.start()
        self.admin_key = await (await self.engine.keyring()).create("org", "admin_key")
        self._manager = f"Bearer {self.admin_key.token.reveal()}"

    async def end(self) -> None:
        await self.engine.stop()
        await self._own.stop()

    async def _expect(self, statuses: set[int], *request: Any, **more: Any) -> int:
        answer = await call(*request, **more)
        assert answer.status in statuses, (request[1:3], answer)
        self.answers.append(answer.everything)
        return answer.status

    async def create(self, number: int) -> None:
        """The one answer that may hold a token is the one that is not kept."""
        body = json.dumps({"name": f"canary {number}"}).encode()
        path = next(self._profiles)
        created = json.loads(
            (await call(self.sidecar, "POST", path, self._manager, body=body)).body
        )
        self.tokens[created["id"]] = created.get("token") or created["key"]

    async def use_and_misuse(self, key_id: str, token: str) -> None:
        """A token is good at every door; mangled, and in bodies, it is good for nothing."""
        query = f"permission={token}&access_token={token}".encode()
        for _ in range(2):
            app, path = next(self._checks)
            await self._expect({200}, app, "GET", path, f"Bearer {token}", query_string=query)
        app, path = next(self._doors)
        await self._expect({400, 401}, app, "GET", path, *next(self._mangled)(token))
        method, path = next(self._changes)
        path, body = path.replace("{id}", key_id), next(self._bodies)(token).encode()
        await self._expect({400, 415}, self.sidecar, method, path, self._manager, body=body)

    async def look(self) -> None:
        for path in PROFILES:
            await self._expect({200}, self.sidecar, "GET", path, self._manager)

    async def revoke(self, key_id: str, token: str) -> None:
        path = f"{next(self._profiles)}/{key_id}"
        await self._expect({200}, self.sidecar, "DELETE", path, self._manager)
        app, path = next(self._doors)
        await self._expect({401}, app, "GET", path, f"Bearer {token}")

    async def lose_redis(self, tokens: list[str]) -> None:
        """It shows in the log only."""
        self.redis.connected = False
        for token in tokens:
            other_engine = self._new_engine(self.redis)
            app = APIKeyMiddleware(hello, engine=other_engine)
            await self._expect({200}, app, "GET", "/", f"Bearer {token}")
            await other_engine.stop()
        self.redis.connected = True

    async def crowd(self, tokens: list[str]) -> None:
        """More tokens are hashed at once than there is room for."""
        narrow = self._new_engine(workers=1, queue=0)
        app = APIKeyMiddleware(hello, engine=narrow)
        requests = [
            self._expect({200, 503}, app, "GET", "/", f"Bearer {token}") for token in tokens
        ]
        assert set(await asyncio.gather(*requests)) == {200, 503}
        await narrow.stop()

    async def lose_the_store(self, tokens: list[str]) -> None:
        """Checks and changes fail, and say so without naming names."""
        late = self._new_engine()
        await late.start()
        app, keyring = APIKeyMiddleware(hello, engine=late), await late.keyring()
        with broken(self.store):
            for token in tokens:
                await self._expect({503}, app, "GET", "/", f"Bearer {token}")
                path = f"{next(self._profiles)}/{token}"
                await self._expect({503}, self.sidecar, "DELETE", path, self._manager)
                with pytest.raises(KeylatchError):
                    await keyring.delete("org", Token(token).key_id)
        await late.stop()

    async def confuse_ids_with_tokens(self, tokens: list[str]) -> None:
        for token in tokens:
            path = f"{next(self._profiles)}/{token}"
            await self._expect({404}, self.sidecar, "DELETE", path, self._manager)

    async def report(self, tokens: list[str]) -> None:
        """They leaked; what is done about it follows the answer."""
        for token in tokens:
            body = json.dumps([{"token": token, "url": f"https://forge/{token}"}]).encode()
            await self._expect({202}, self.sidecar, "POST", "/leaked", body=body)


async def live(world: World) -> dict[str, str]:
    """Everything that can happen to 1,000 tokens; what was raised and what shows itself then."""
    await world.begin()
    for number in range(CANARIES):
        await world.create(number)
    lives = list(world.tokens.items())
    for key_id, token in lives[_TRACED:]:
        await world.use_and_misuse(key_id, token)
    with every_traceback() as tracebacks:
        for key_id, token in lives[:_TRACED]:
            await world.use_and_misuse(key_id, token)
        tokens = [token for _, token in lives[:_TRACED]]
        await world.lose_redis(tokens[:20])
        for trouble in (world.crowd, world.lose_the_store, world.confuse_ids_with_tokens):
            await trouble(tokens[20:])
        await world.report(tokens[20:])
    await world.look()
    for key_id, token in lives:
        await world.revoke(key_id, token)
    await world.look()
    shown = every_repr()  # the world still holds a token object, so that one can show itself
    await world.end()
    return {"tracebacks": "\n".join(tracebacks), "reprs": shown}


@contextlib.contextmanager
def broken(store: str) -> Iterator[None]:
    """The store lacks a table for a while."""
    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as connection:
        connection.execute("ALTER TABLE keylatch_keys RENAME TO away")
        yield
        connection.execute("ALTER TABLE away RENAME TO keylatch_keys")


def over_the_wire(store: str, tokens: list[str]) -> list[bytes]:
    """What a real server answers and logs when tokens come in ways it does not like either."""
    answers = []
    with serving(create_app(Engine(Settings.load(store=store, redis="")))) as url:
        for token in tokens:
            for start in (
                f"GET /verify HTTP/1.1\r\nAuthorization: Bearer {token}",
                f"GET /verify HTTP/1.1\r\nAuthorization: Bearer {token}\0",
                f"GET /verify HTTP/1.1\r\nAuthorization : Bearer {token}",
                f"{token} / HTTP/1.1",
            ):
                request = f"{start}\r\nHost: test\r\nConnection: close\r\n\r\n"
                answers.append(exchange(url, request.encode()))
    return answers


async def held_by(redis: Any) -> bytes:
    async with fakeredis.FakeAsyncRedis(server=redis) as client:
        names: list[Any] = await client.keys()
        values: list[Any] = await client.mget(names)
        return b"".join(names + values)


@dataclass
class Found:
    """The tokens' ids and secrets, and where to search for them."""

    ids: list[str]
    secrets: set[bytes]
    haystacks: dict[str, bytes]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """All of it, once."""
    path = tmp_path_factory.mktemp("canaries") / "keys.db"
    path.touch(0o600)  # one that others may open would be replaced
    world = World(f"sqlite:///{path}", fakeredis.FakeServer())
    with (
        every_log_line() as lines,
        every_log_line(Unscrubbed()) as json_lines,
        contextlib.closing(sqlite3.connect(path)) as other,
    ):
        texts = asyncio.run(live(world))
        other.execute("SELECT 1 FROM keylatch_meta")  # keeps the write-ahead log where it is
        tokens = list(world.tokens.values())
        answers = world.answers + over_the_wire(world.store, tokens[:20])
        files = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    texts["log"] = lines.getvalue()
    texts["log in JSON"] = json_lines.getvalue()
    haystacks = {place: text.encode("utf-8", "surrogateescape") for place, text in texts.items()}
    haystacks |= {
        "redis": asyncio.run(held_by(world.redis)),
        "answers": b"\n".join(answers),
        "database": b"".join(files.values()),
    }
    return Found(list(world.tokens), {secret_version_of(token) for token in tokens}, haystacks)


# And then


@pytest.mark.timeout(180)
@pytest.mark.parametrize("place", ["log", "log in JSON", "reprs", "redis", "database", "answers"])
def test_no_token_is_found(found: Found, place: str) -> None:
    """No place holds a secret; it holds ids, so it is the right place to search."""
    haystack = found.haystacks[place]
    assert len(found.secrets) == CANARIES
    assert all(key_id.encode() in haystack for key_id in found.ids)
    assert hits(haystack, found.secrets) == set()


def test_no_token_is_found_in_a_traceback(found: Found) -> None:
    """Whatever was raised in keylatch's code, caught or not, contains no token."""
    haystack = found.haystacks["tracebacks"]
    for raised in (b"StoreUnavailable", b"HashingBusy", b"Problem"):
        assert raised in haystack
    assert hits(haystack, found.secrets) == set()


def test_a_token_that_leaks_is_found(found: Found) -> None:
    """A broken twin that logs what it was given is caught by the same search."""
    secret = min(found.secrets)
    with every_log_line() as lines:
        logging.getLogger("keylatch").debug("checking kl_live_0123456789AB_%s", secret.decode())
        logging.getLogger("any").info("in a longer word: a%sz", secret.decode())
    for line in lines.getvalue().splitlines():
        assert hits(line.encode(), found.secrets) == {secret}
