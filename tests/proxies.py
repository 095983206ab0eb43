"""What every reverse proxy promises with the files in `deploy/`, and what it takes to prove it.

The proxies, the sidecar and the app are real; the configuration is the very file that operators
copy, with only addresses and folders replaced. A file `test_<proxy>.py` says how its proxy is
started and inherits `ProxyContract`.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

import pytest
from starlette.types import Receive, Scope, Send
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from keylatch.engine import Engine
from keylatch.keyring import Created
from keylatch.settings import Settings
from servers import eventually, free_port, needs, serving
from wire import Answer, exchange, read, send

DEPLOY = Path(__file__).parent.parent / "deploy"
SIDECAR = "127.0.0.1:8700"
APP = "127.0.0.1:8000"
NAME = "Grüße, 日本"
IDENTITY = [
    f"x-keylatch-{word}"
    for word in ("key-id", "key-name", "organization-id", "permission", "environment")
]
SEARCHED = os.environ.get("PATH", os.defpath) + ":/usr/sbin"
PATIENCE_SECONDS = 20  # a third of what proxies wait for by default; measured: 1 to 2
BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
NAMED = b"".join(name.encode() + b": x\r\n" for name in IDENTITY)

JSON = dict[str, Any]


class Echo:
    """An app that says what it was asked, and counts: for each test, did a request get here?"""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
            return
        self.asked += 1
        if scope["type"] == "websocket":
            await self._talk(scope, receive, send)
            return
        length, more = 0, True
        while more:
            message = await receive()
            length += len(message.get("body", b""))
            more = message.get("more_body", False)
        body = json.dumps(self.seen(scope) | {"length": length}).encode()
        path = scope["path"]
        status = int(path.removeprefix("/status/")) if path.startswith("/status/") else 200
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-echo", b"the app"),
        ]
        if status == 401:
            headers.append((b"www-authenticate", b'Basic realm="the app"'))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _talk(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": json.dumps(self.seen(scope))})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})

    @staticmethod
    def seen(scope: Scope) -> JSON:
        """What came in. The headers are read last, when trailers would be among them."""
        return {
            "method": scope.get("method", "GET"),
            "path": scope["raw_path"].decode("latin-1"),
            "query": scope["query_string"].decode("latin-1"),
            "headers": [[n.decode("latin-1"), v.decode("latin-1")] for n, v in scope["headers"]],
        }


class SidecarProcess:
    """`keylatch serve` as a process of its own, and its operator, who makes and revokes keys.

    Args:
        folder: for the store, and for the log.
        place: a Unix socket, or None for a free port.
        settings: more `KEYLATCH_*` variables, without that prefix.
    """

    def __init__(self, folder: Path, place: Path | None = None, **settings: str) -> None:
        self._folder = folder
        self._uds = place
        self.port = free_port()
        self.place: str | Path = place or f"http://127.0.0.1:{self.port}"
        store = f"sqlite:///{folder}/keys.db"
        outside = {k: v for k, v in os.environ.items() if not k.startswith("KEYLATCH_")}
        given = {"STORE": store, "HASHER": "sha256", **settings}
        self._environment = outside | {f"KEYLATCH_{name}": value for name, value in given.items()}
        self._operator = Engine(Settings.load(store=store, redis="", hasher="sha256"))
        self._runner = asyncio.Runner()
        self.start()

    def start(self) -> None:
        where = ["--uds", str(self._uds)] if self._uds else ["--port", str(self.port)]
        with (self._folder / "sidecar.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "keylatch_sidecar", "serve", *where],
                env=self._environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        eventually(self._is_ready)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, (self._folder / "sidecar.log").read_text()
        with contextlib.suppress(OSError):
            return send(self.place, b"GET /readyz").status == 200
        return False

    def stop(self) -> None:
        """Stop as an operator does."""
        self._process.terminate()
        assert self._process.wait(timeout=20) == 0

    def kill(self) -> None:
        """Stop without a word to those who are connected."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Let connections come and answer none of them."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def create(self, permission: str = "FULL", name: str = NAME, **fields: Any) -> Created:
        """A new key of the organisation `acme`."""

        async def create() -> Created:
            keyring = await self._operator.keyring()
            return await keyring.create("acme", name, permission=permission, **fields)

        return self._runner.run(create())

    def revoke(self, key: Created) -> None:
        """It is so everywhere when this returns."""

        async def revoke() -> None:
            await (await self._operator.keyring()).delete("acme", key.record.id)

        self._runner.run(revoke())

    def says(self, *fields: bytes, permission: str = "FULL") -> Answer:
        """The sidecar's own answer, asked without a proxy, with the facts it is told to expect."""
        facts = (b"X-Forwarded-Method: GET", b"X-Forwarded-Uri: /")
        return send(self.place, f"GET /verify?permission={permission}".encode(), *facts, *fields)

    def close(self) -> None:
        self._runner.run(self._operator.stop())
        self._runner.close()
        if self._process.poll() is None:
            self.resume()
            self.kill()


class Stand:
    """Stands between a proxy and its sidecar: counts connections, and may answer by itself.

    Args:
        port: of the sidecar.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.questions: list[bytes] = []
        """Each question as it was written, while `answer` is set."""
        self.answer: bytes | None = None
        """What every question gets before its connection is closed; None: the sidecar's answer."""
        self.is_tired = False
        """Whether it closes a connection only when a second question has come, unanswered."""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                proxy, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._one, args=[proxy], daemon=True).start()

    def _one(self, proxy: socket.socket) -> None:
        with proxy, contextlib.suppress(OSError):
            if self.answer is not None:
                self.questions.append(proxy.recv(65536))
                proxy.sendall(self.answer)
                if self.is_tired:
                    proxy.recv(65536)
                proxy.shutdown(socket.SHUT_WR)
                return
            with socket.create_connection(("127.0.0.1", self._port)) as sidecar:
                for end in (proxy, sidecar):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                back = threading.Thread(target=pump, args=[sidecar, proxy], daemon=True)
                back.start()
                pump(proxy, sidecar)
                back.join()

    @contextlib.contextmanager
    def answering(self, answer: bytes, is_tired: bool = False) -> Iterator[None]:
        """Answer so until the end of the block."""
        self.answer, self.is_tired = answer, is_tired
        self.questions.clear()
        try:
            yield
        finally:
            self.answer, self.is_tired = None, False

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for the next one
        self._listener.close()


def pump(source: socket.socket, drain: socket.socket) -> None:
    """Hand on all bytes, and the end."""
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            drain.sendall(piece)
        drain.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Kind:
    """How to run one proxy from its files in `deploy/`.

    Args:
        name: of its folder there.
        program: its executable.
        package: what to install for it.
        command: its arguments; `{folder}` is where the files are.
        check: arguments with which it judges its files and ends.
        front: where the files make it listen.
        files: which of the folder's files it needs.
        folders: those that the files name, to be replaced by temporary ones.
        files_named: the same for single files.
        sockets: names that are global on the machine, to be made unique.
        unix: how the files' sidecar address is spelled for a Unix socket; None: it cannot.
    """

    name: str
    program: str
    package: str
    command: Sequence[str]
    check: Sequence[str]
    front: str = "127.0.0.1:8080"
    files: Sequence[str] = ()
    folders: Sequence[str] = ()
    files_named: Sequence[str] = ()
    sockets: Sequence[str] = ()
    unix: str | None = None
    only_root: str = ""
    """Lines (a pattern) that only root may use: others run it without."""


class Proxy:
    """A proxy that runs."""

    def __init__(self, port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.folder = folder


def written(kind: Kind, folder: Path, substitutions: Mapping[str, str]) -> int:
    """Copy a proxy's files with their addresses and folders replaced; its own port."""
    port = free_port()
    replace = {kind.front: f"127.0.0.1:{port}", **substitutions}
    replace |= {name: f"{name}-{port}" for name in kind.sockets}
    replace |= {name: str(folder / Path(name).name) for name in kind.files_named}
    for number, name in enumerate(kind.folders):
        (folder / str(number)).mkdir()
        replace[name] = str(folder / str(number))
    unseen = set(replace)
    for file in kind.files:
        lines = (DEPLOY / kind.name / file).read_text().splitlines(keepends=True)
        for number, line in enumerate(lines):
            if line.lstrip().startswith(("#", "--")):
                continue
            if os.geteuid() != 0 and kind.only_root and re.match(kind.only_root, line):
                lines[number] = ""
                continue
            for old, new in replace.items():
                if old in line:
                    unseen.discard(old)
                    line = line.replace(old, new)
            lines[number] = line
        (folder / file).write_text("".join(lines))
    assert not unseen, f"{kind.name} does not name {unseen}"
    return port


@contextlib.contextmanager
def proxy(
    kind: Kind, app: str, sidecar: int | Path, twin: Mapping[str, str] | None = None
) -> Iterator[Proxy]:
    """A proxy that runs until the end of the block.

    Args:
        kind: which one.
        app: the app's base URL.
        sidecar: its port, or its Unix socket.
        twin: further texts to replace: a mistake that tests look at.
    """
    program = needs(shutil.which(kind.program, path=SEARCHED), kind.package)
    place = f"127.0.0.1:{sidecar}"
    if isinstance(sidecar, Path):
        assert kind.unix is not None
        place = kind.unix.format(sidecar)
    # Not below pytest's folder: a worker process of another user could not reach it.
    folder = Path(tempfile.mkdtemp(prefix=f"keylatch-{kind.name}-"))
    folder.chmod(0o755)
    substitutions = {SIDECAR: place, APP: urlsplit(app).netloc, **(twin or {})}
    port = written(kind, folder, substitutions)
    with (folder / "output.log").open("ab") as log:
        process = subprocess.Popen(
            [program, *(part.format(folder=folder) for part in kind.command)],
            cwd="/",  # as a service manager starts it
            stdout=log,
            stderr=log,
        )

    def listens() -> bool:
        assert process.poll() is None, (folder / "output.log").read_text()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True
        return False

    try:
        eventually(listens)
        yield Proxy(port, folder)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder)


def complaints(kind: Kind) -> str:
    """What a proxy has to say about its files; empty: nothing."""
    program = needs(shutil.which(kind.program, path=SEARCHED), kind.package)
    with tempfile.TemporaryDirectory(prefix=f"keylatch-{kind.name}-") as temporary:
        folder = Path(temporary)
        written(kind, folder, {})
        command = [program, *(part.format(folder=folder) for part in kind.check)]
        ended = subprocess.run(command, capture_output=True, text=True, cwd="/")
        # Who is not root is warned by some that they cannot change to another user.
        return ended.stderr if ended.returncode or os.geteuid() == 0 else ""


class Rig:
    """A proxy, its sidecar, an app, and two keys: one FULL, one SENDING."""

    def __init__(self, kind: Kind, app: Echo, app_url: str, sidecar: SidecarProcess) -> None:
        self.kind = kind
        self.app = app
        self.app_url = app_url
        self.sidecar = sidecar
        self.full = sidecar.create()
        self.sender = sidecar.create("SENDING", "mailer", environment="test")
        self.proxy: Proxy

    @property
    def url(self) -> str:
        return self.proxy.url

    def ask(self, start: bytes, *fields: bytes) -> Answer:
        """One request to the proxy."""
        return send(self.url, start, *fields)

    def refused(self, start: bytes, *fields: bytes) -> Answer:
        """One request that must not get to the app."""
        asked = self.app.asked
        answered = self.ask(start, *fields)
        assert self.app.asked == asked, answered
        assert b"x-echo" not in lowered(answered)
        return answered


@contextlib.contextmanager
def rig(kind: Kind) -> Iterator[Rig]:
    """All of it, on free ports, until the end of the block."""
    needs(shutil.which(kind.program, path=SEARCHED), kind.package)
    app = Echo()
    with tempfile.TemporaryDirectory(prefix="keylatch-sidecar-") as folder, serving(app) as app_url:
        sidecar = SidecarProcess(Path(folder), VERIFY_FACTS="forwarded")
        try:
            made = Rig(kind, app, app_url, sidecar)
            with proxy(kind, app_url, sidecar.port) as made.proxy:
                yield made
        finally:
            sidecar.close()


@contextlib.contextmanager
def stand_in(rig: Rig) -> Iterator[tuple[Stand, Proxy]]:
    """A second proxy, with somebody between it and the sidecar."""
    stand = Stand(rig.sidecar.port)
    try:
        with proxy(rig.kind, rig.app_url, stand.port) as other:
            yield stand, other
    finally:
        stand.close()


def bearing(key: Created) -> bytes:
    """The header field that presents a key."""
    return b"Authorization: Bearer " + key.token.reveal().encode()


def lowered(answer: Answer) -> dict[bytes, bytes]:
    """An answer's header fields by lower-case name; none may come twice."""
    headers = {name.lower(): value for name, value in answer.headers}
    assert len(headers) == len(answer.headers), answer
    return headers


def told(answer: Answer) -> JSON:
    """What the app says that it was asked."""
    assert answer.status == 200, answer
    seen: JSON = json.loads(answer.body)
    return seen


def identity(seen: JSON) -> dict[str, list[str]]:
    """What the app takes for keylatch's headers, as apps fold names that read their environment."""
    folded: dict[str, list[str]] = {}
    for name, value in seen["headers"]:
        name = re.sub("[^a-z0-9]", "-", name.lower())
        if name.startswith("x-keylatch"):
            folded.setdefault(name, []).append(value)
    return {name: values for name, values in folded.items() if values != [""]}


def identity_of(key: Created) -> dict[str, list[str]]:
    """What the app must be told about a key."""
    record = key.record
    values = [record.id, quote(record.name, safe=""), "acme", record.permission, record.environment]
    return {name: [value] for name, value in zip(IDENTITY, values, strict=True)}


def values_of(seen: JSON, name: str) -> list[str]:
    """The values of a header that the app was sent."""
    return [value for known, value in seen["headers"] if known.lower() == name]


def is_unavailable(answer: Answer) -> None:
    """503 in the sidecar's own words, with the time to try again."""
    headers = lowered(answer)
    assert answer.status == 503
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"retry-after"] == b"1"
    assert headers[b"x-keylatch-error"] == b"unavailable"
    assert headers[b"cache-control"] == b"no-store"
    assert b"www-authenticate" not in headers
    assert json.loads(answer.body) == {
        "error": "unavailable",
        "error_description": "The API key could not be checked; try again in a moment",
    }


def is_as_the_sidecar_says(answer: Answer, said: Answer) -> None:
    """A refusal has the sidecar's status, body, and headers that matter, each of them once."""
    headers, expected = lowered(answer), lowered(said)
    assert answer.status == said.status
    assert answer.body == said.body
    for name in (b"www-authenticate", b"content-type", b"cache-control", b"x-keylatch-error"):
        assert headers[name] == expected[name], name


def with_trailer(key: Created) -> bytes:
    """A request whose body is followed by a lie about who calls."""
    lines = [b"POST /v1/emails HTTP/1.1", b"Host: test", bearing(key)]
    lines += [b"Transfer-Encoding: chunked", b"TE: trailers", b"Trailer: X-Keylatch-Key-Id"]
    lines += [b"Connection: close", b"", b"5", b"hello", b"0", b"X-Keylatch-Key-Id: evil"]
    return b"\r\n".join([*lines, b"", b""])


SPELLINGS = [
    b"X-Keylatch-Key-Id",
    b"x-keylatch-KEY-ID",
    b"X_Keylatch_Key_Id",
    b"X-Keylatch_Key-Id",
    b"x_KEYLATCH-key_id",
    b"X.Keylatch.Key.Id",
    b"X-Keylatch-Key-Name",
    b"X-Keylatch-Organization-Id",
    b"X_Keylatch_Organization_Id",
    b"X-Keylatch-Permission",
    b"X_KEYLATCH_PERMISSION",
    b"X-Keylatch-Environment",
    b"X-Keylatch-Require",
    b"X-Keylatch-Error",
]


class ProxyContract:
    """What every proxy must do. A subclass takes a module-scoped fixture `rig`."""

    chunked_bodies: ClassVar[bool] = True
    """Whether bodies without a length arrive; if not, they are refused with 411."""

    def test_it_has_no_complaint_about_its_files(self, rig: Rig) -> None:
        """The files are right for this version, in its own judgement."""
        assert complaints(rig.kind) == ""

    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "PROPFIND"])
    def test_a_good_key_is_let_in_and_the_app_knows_whose_it_is(
        self, rig: Rig, method: str
    ) -> None:
        """All identity headers, once each; method, path and query as they came."""
        start = f"{method} /v1/me?a=1&b=%2F".encode()
        answered = rig.ask(start, bearing(rig.full), b"Content-Length: 0")
        seen = told(answered)
        assert identity(seen) == identity_of(rig.full)
        assert (seen["method"], seen["path"], seen["query"]) == (method, "/v1/me", "a=1&b=%2F")
        assert lowered(answered)[b"x-echo"] == b"the app"

    def test_the_app_never_sees_the_key(self, rig: Rig) -> None:
        """`Authorization` ends at the proxy, on public routes too."""
        for start in (b"GET /v1/me", b"GET /healthz"):
            assert values_of(told(rig.ask(start, bearing(rig.full))), "authorization") == []

    def test_the_longest_name_and_address_pass(self, rig: Rig) -> None:
        """1.2 kB of a key's name in the sidecar's answer, 7 kB of a query in the question."""
        key = rig.sidecar.create(name=100 * "\N{MUSICAL SYMBOL G CLEF}")
        seen = told(rig.ask(b"GET /v1/me?" + 7_000 * b"x", bearing(key)))
        assert identity(seen) == identity_of(key)
        assert seen["query"] == 7_000 * "x"

    def test_head_is_answered_without_a_body(self, rig: Rig) -> None:
        """The app is asked HEAD; a refused HEAD has no body either."""
        asked = rig.app.asked
        allowed = rig.ask(b"HEAD /v1/me", bearing(rig.full))
        assert (allowed.status, allowed.body, rig.app.asked) == (200, b"", asked + 1)
        refused = rig.refused(b"HEAD /v1/me")
        assert (refused.status, refused.body) == (401, b"")

    @pytest.mark.parametrize(
        "value",
        [
            None,
            "",
            "Bearer",
            "Bearer ",
            "Basic dXNlcjpwYXNz",
            "Bearer wrong",
            "Bearer kl_live_000000000000_00000000000000000000000000000000000000000",
            "Bearer {token}x",
            "Bearer {token}, Bearer {token}",
            "Bearer {token} {token}",
            "Bearer x" + 600 * "x",
        ],
    )
    def test_without_a_good_key_it_is_401(self, rig: Rig, value: str | None) -> None:
        """Challenge once, JSON body, error word: as the sidecar says it."""
        fields = []
        if value is not None:
            value = value.replace("{token}", rig.full.token.reveal())
            fields = [f"Authorization: {value}".encode()]
        refused = rig.refused(b"GET /v1/me", *fields)
        assert refused.status == 401
        is_as_the_sidecar_says(refused, rig.sidecar.says(*fields))
        assert lowered(refused)[b"www-authenticate"].startswith(b'Bearer realm="keylatch"')

    def test_a_revoked_key_is_refused_on_the_very_next_request(self, rig: Rig) -> None:
        """On the same kept connection too; nothing on the way remembers it."""
        for _ in range(5):
            key = rig.sidecar.create()
            assert rig.ask(b"GET /v1/me", bearing(key)).status == 200
            rig.sidecar.revoke(key)
            refused = rig.refused(b"GET /v1/me", bearing(key))
            is_as_the_sidecar_says(refused, rig.sidecar.says(bearing(key)))
            assert refused.status == 401

    @pytest.mark.parametrize(
        ("start", "status"),
        [
            ("POST /v1/emails", 200),
            ("POST /v1/emails?x=1", 200),
            ("POST /v1/emails?permission=FULL", 200),
            ("POST /v1/emails/batch", 200),
            ("GET /v1/emails", 403),
            ("DELETE /v1/emails", 403),
            ("OPTIONS /v1/emails", 403),
            ("post /v1/emails", 403),
            ("POSTX /v1/emails", 403),
            ("POST /v1/emails/", 403),
            ("POST /v1/emails/x", 403),
            ("POST /v1/emailsx", 403),
            ("POST /V1/emails", 403),
            ("POST /v1/email%73", 403),
            ("POST /v1/emails;a=b", 403),
            ("POST /v1/me", 403),
            ("GET /v1/me?permission=SENDING", 403),
            ("GET /v1/me?x=/v1/emails", 403),
            ("GET /v1/me?permission=FULL&permission=", 403),
        ],
    )
    def test_a_key_may_call_what_the_table_names_and_nothing_else(
        self, rig: Rig, start: str, status: int
    ) -> None:
        """Method and whole path decide; a refusal says what would have sufficed."""
        fields = (bearing(rig.sender), b"Content-Length: 0")
        if status == 200:
            answered = rig.ask(start.encode(), *fields)
            assert identity(told(answered)) == identity_of(rig.sender)
            return
        refused = rig.refused(start.encode(), *fields)
        if refused.status == 400:  # some refuse unusual methods by themselves
            assert start.startswith("post")
            return
        assert refused.status == 403
        is_as_the_sidecar_says(refused, rig.sidecar.says(bearing(rig.sender)))
        challenge = lowered(refused)[b"www-authenticate"]
        assert b'error="insufficient_scope"' in challenge

    @pytest.mark.parametrize(
        "field",
        [
            b"X-Forwarded-Method: POST",
            b"X-Forwarded-Uri: /v1/emails",
            b"X-Original-Method: POST",
            b"X-Original-URL: /v1/emails",
            b"X-Original-URI: /v1/emails",
            b"X-Rewrite-URL: /v1/emails",
            b"X-HTTP-Method-Override: POST",
            b"X-Keylatch-Require: SENDING",
            b"X-Keylatch-Permission: FULL",
            b"Host: 127.0.0.1:8700",
            b"X-Forwarded-Host: 127.0.0.1:8700",
            b"Accept: */*\r\nX-Forwarded-Method: POST\r\nX-Forwarded-Uri: /v1/emails",
        ],
    )
    def test_no_header_changes_what_a_request_asks_of_its_key(self, rig: Rig, field: bytes) -> None:
        """A SENDING key stays out, a FULL key in, and the facts for the sidecar are the proxy's."""
        assert rig.refused(b"GET /v1/emails", bearing(rig.sender), field).status in (400, 403)
        answered = rig.ask(b"GET /v1/emails", bearing(rig.full), field)
        if b"Host" not in field.split(b":")[0] or answered.status != 400:
            assert identity(told(answered)) == identity_of(rig.full)

    @pytest.mark.parametrize(
        "name",
        [
            b"X-HTTP-Method-Override",
            b"X_HTTP_Method_Override",
            b"X-HTTP-Method",
            b"X-Method-Override",
        ],
    )
    def test_a_judged_method_is_the_method(self, rig: Rig, name: bytes) -> None:
        """The app never hears of another one: it was judged as what it is."""
        fields = (bearing(rig.sender), b"Content-Length: 0", name + b": DELETE")
        seen = told(rig.ask(b"POST /v1/emails", *fields))
        assert "DELETE" not in json.dumps(seen)

    @pytest.mark.parametrize("name", SPELLINGS)
    def test_nobody_can_say_for_himself_who_he_is(self, rig: Rig, name: bytes) -> None:
        """In no spelling, once or twice, with a key or without one: the app hears the sidecar."""
        lies = (name + b": evil", name + b": evil2")
        keyed = told(rig.ask(b"GET /v1/me", bearing(rig.full), *lies))
        public = told(rig.ask(b"GET /healthz", *lies))
        assert identity(keyed) == identity_of(rig.full)
        assert identity(public) == {}
        assert "evil" not in json.dumps([keyed, public])

    @pytest.mark.parametrize("name", [*(name.encode() for name in IDENTITY), b"Authorization"])
    def test_a_connection_header_takes_nothing_away(self, rig: Rig, name: bytes) -> None:
        """`Connection: X-Keylatch-Key-Id` would make an anonymous request of an allowed one."""
        lines = [b"GET /v1/me HTTP/1.1", b"Host: test", bearing(rig.full)]
        lines += [b"Connection: close, " + name, b"", b""]
        answered = read(exchange(rig.url, b"\r\n".join(lines)))
        if answered.status != 401:
            seen = told(answered)
            assert identity(seen) == identity_of(rig.full)
            assert name.decode() not in "".join(values_of(seen, "connection"))

    @pytest.mark.parametrize("order", ["good bad", "bad good", "good good", "good empty"])
    def test_two_credentials_are_never_allowed(self, rig: Rig, order: str) -> None:
        """Whichever comes first: who reads the other one would be deceived."""
        fields = {
            "good": bearing(rig.full),
            "bad": b"Authorization: Bearer wrong",
            "empty": b"Authorization: Basic",
        }
        refused = rig.refused(b"GET /v1/me", *(fields[word] for word in order.split()))
        assert refused.status in (400, 401)

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/emails/../me",
            "/v1/emails/..",
            "/v1/./emails",
            "/v1/../v1/emails",
            "//v1/emails",
            "/v1//emails",
            "/v1/emails/%2e%2e/me",
            "/v1/emails/.%2E/me",
            "/v1/emails%2f..%2fme",
            "/v1/emails%2F%2e%2e%2Fme",
            "/v1/emails\\..\\me",
            "/v1/emails/..;/me",
            "/v1/emails;/../me",
            "/v1/me/../emails",
            "/v1/me#/../emails",
            "/v1/emails%00",
            "/v1/emails%3F",
            "/v1/emails%",
            "http://test/v1/me",
            "*",
        ],
    )
    def test_no_way_to_spell_a_path_reaches_another_permission(self, rig: Rig, path: str) -> None:
        """A SENDING key: refused, or what the app gets is the very path that the table names."""
        asked = rig.app.asked
        answered = rig.ask(f"POST {path}".encode(), bearing(rig.sender), b"Content-Length: 0")
        if answered.status == 200:
            assert told(answered)["path"] == "/v1/emails"
            return
        assert answered.status in (400, 403, 404)
        assert rig.app.asked == asked

    @pytest.mark.parametrize(
        "path",
        [
            "/healthz/../v1/me",
            "/v1/me/../../healthz",
            "/healthz/",
            "/healthz/x",
            "/healthz;/v1/me",
            "/healthz%2f..%2fv1%2fme",
            "/healthz%00",
            "/healthz#/../v1/me",
            "//healthz",
            "/./healthz",
            "/%68ealthz",
            "/HEALTHZ",
            "http://test/v1/me",
        ],
    )
    def test_no_way_to_spell_a_path_makes_it_public(self, rig: Rig, path: str) -> None:
        """Without a key: refused, or what the app gets is the very path that is public."""
        asked = rig.app.asked
        answered = rig.ask(f"GET {path}".encode())
        if answered.status == 200:
            seen = told(answered)
            assert (seen["path"], identity(seen)) == ("/healthz", {})
            return
        assert answered.status in (400, 401, 404)
        assert rig.app.asked == asked

    @pytest.mark.parametrize("fields", [[], [b"Authorization: Bearer wrong"]])
    def test_what_is_public_needs_no_key(self, rig: Rig, fields: list[bytes]) -> None:
        """And a bad one does no harm there; its query arrives."""
        seen = told(rig.ask(b"GET /healthz?deep=1", *fields))
        assert (seen["path"], seen["query"], identity(seen)) == ("/healthz", "deep=1", {})

    @pytest.mark.parametrize("fields", [[], [b"X-Keylatch-Key-Id: evil"]])
    def test_a_preflight_is_answered_by_the_app(self, rig: Rig, fields: list[bytes]) -> None:
        """Browsers send it without the key; it comes from nobody."""
        asking = (b"Origin: https://a.test", b"Access-Control-Request-Method: DELETE")
        seen = told(rig.ask(b"OPTIONS /v1/emails", *asking, *fields))
        assert (seen["method"], seen["path"], identity(seen)) == ("OPTIONS", "/v1/emails", {})

    @pytest.mark.parametrize(
        ("method", "fields"),
        [
            (b"OPTIONS", []),
            (b"OPTIONS", [b"Origin: https://a.test"]),
            (b"OPTIONS", [b"Access-Control-Request-Method: GET"]),
            (b"OPTIONS", [b"Origin:", b"Access-Control-Request-Method: GET b"]),
            (b"GET", [b"Origin: https://a.test", b"Access-Control-Request-Method: GET"]),
        ],
    )
    def test_nothing_else_passes_for_a_preflight(
        self, rig: Rig, method: bytes, fields: list[bytes]
    ) -> None:
        """An OPTIONS that no browser asks ahead, and what is no OPTIONS, need a key."""
        assert rig.refused(method + b" /v1/me", *fields).status in (400, 401)

    @pytest.mark.parametrize("key", ["full", "sender"])
    def test_a_large_body_arrives_whole(self, rig: Rig, key: str) -> None:
        """300 kB, as the sidecar never waits for any of it."""
        lines = [b"POST /v1/emails HTTP/1.1", b"Host: test", bearing(getattr(rig, key))]
        lines += [b"Content-Length: 300000", b"Connection: close", b"", 300_000 * b"x"]
        seen = told(read(exchange(rig.url, b"\r\n".join(lines))))
        assert seen["length"] == 300_000
        assert identity(seen) == identity_of(getattr(rig, key))

    def test_a_large_body_without_a_key_is_refused(self, rig: Rig) -> None:
        """401, and nothing of it gets to the app."""
        asked = rig.app.asked
        lines = [b"POST /v1/emails HTTP/1.1", b"Host: test", b"Content-Length: 300000"]
        lines += [b"Expect: 100-continue", b"Connection: close", b"", b""]
        received = exchange_until_idle(rig.proxy.port, b"\r\n".join(lines))
        assert received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").startswith(b"HTTP/1.1 401 ")
        assert rig.app.asked == asked

    def test_trailers_never_become_headers(self, rig: Rig) -> None:
        """Some app servers add them to the headers: they could say who calls."""
        answered = read(exchange(rig.url, with_trailer(rig.full)))
        if not self.chunked_bodies:
            assert answered.status == 411
            return
        seen = told(answered)
        assert (seen["length"], identity(seen)) == (5, identity_of(rig.full))

    def test_two_lengths_are_not_two_requests(self, rig: Rig) -> None:
        """What is smuggled behind a length that contradicts the encoding never gets to the app."""
        smuggled = b"0\r\n\r\nGET /v1/smuggled HTTP/1.1\r\nHost: test\r\n\r\n"
        lines = [b"POST /v1/emails HTTP/1.1", b"Host: test", bearing(rig.full)]
        lines += [b"Content-Length: %d" % len(smuggled), b"Transfer-Encoding: chunked", b""]
        received = exchange_until_idle(rig.proxy.port, b"\r\n".join([*lines, smuggled]))
        assert b"/v1/smuggled" not in received

    def test_requests_on_one_connection_are_judged_one_by_one(self, rig: Rig) -> None:
        """Who came before on the same connection lends nothing to who comes after."""
        good = [b"GET /v1/me HTTP/1.1", b"Host: test", bearing(rig.full), b"", b""]
        keyless = [b"GET /v1/me HTTP/1.1", b"Host: test", b"Connection: close", b"", b""]
        asked = rig.app.asked
        received = exchange(rig.url, b"\r\n".join(good) + b"\r\n".join(keyless))
        assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"401"]
        assert rig.app.asked == asked + 1

    def test_at_the_same_time_everybody_is_himself(self, rig: Rig) -> None:
        """Forty callers at once, on routes that both may call: no identity is mixed up."""

        def ask(key: Created) -> dict[str, list[str]]:
            return identity(told(rig.ask(b"POST /v1/emails", bearing(key), b"Content-Length: 0")))

        keys = [rig.full, rig.sender] * 20
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, keys)) == [identity_of(key) for key in keys]

    @pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 502, 503])
    def test_what_the_app_answers_is_not_touched(self, rig: Rig, status: int) -> None:
        """Its own refusals and faults are its own: never turned into the sidecar's."""
        answered = rig.ask(b"GET /status/%d" % status, bearing(rig.full))
        headers = lowered(answered)
        assert answered.status == status
        assert headers[b"x-echo"] == b"the app"
        assert json.loads(answered.body)["path"] == f"/status/{status}"
        assert b"x-keylatch-error" not in headers
        if status == 401:
            assert headers[b"www-authenticate"] == b'Basic realm="the app"'

    def test_a_websocket_opens_with_a_good_key(self, rig: Rig) -> None:
        """The app knows whose it is; messages go both ways."""
        headers = {
            "Authorization": f"Bearer {rig.full.token.reveal()}",
            "X-Keylatch-Key-Id": "evil",
        }
        url = f"ws://127.0.0.1:{rig.proxy.port}/v1/live"
        with connect(url, additional_headers=headers, proxy=None) as chat:
            seen = json.loads(chat.recv(timeout=10))
            assert identity(seen) == identity_of(rig.full)
            for text in ("one", "two"):
                chat.send(text)
                assert chat.recv(timeout=10) == text

    @pytest.mark.parametrize(("who", "status"), [("nobody", 401), ("bad", 401), ("sender", 403)])
    def test_a_websocket_does_not_open_otherwise(self, rig: Rig, who: str, status: int) -> None:
        """The handshake is refused like any other request."""
        token = {"nobody": "", "bad": "wrong", "sender": rig.sender.token.reveal()}[who]
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        asked = rig.app.asked
        url = f"ws://127.0.0.1:{rig.proxy.port}/v1/live"
        with pytest.raises(InvalidStatus) as refused:
            connect(url, additional_headers=headers, proxy=None)
        assert refused.value.response.status_code == status
        assert rig.app.asked == asked

    def test_only_websockets_are_upgrades(self, rig: Rig) -> None:
        """With `Upgrade: h2c` a client could talk to the app past the proxy."""
        lines = [b"GET /v1/me HTTP/1.1", b"Host: test", bearing(rig.full)]
        lines += [b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"]
        lines += [b"Connection: Upgrade, HTTP2-Settings", b"", b""]
        received = exchange_until_idle(rig.proxy.port, b"\r\n".join(lines))
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b"h2c" not in received

    def test_no_key_is_written_anywhere(self, rig: Rig) -> None:
        """Not into a log, not into a temporary file: allowed, refused or upgraded."""
        secrets = [key.token.reveal().encode()[-40:] for key in (rig.full, rig.sender)]
        rig.ask(b"GET /v1/me", bearing(rig.full))
        rig.ask(b"GET /v1/me", bearing(rig.sender))
        for file in (file for file in rig.proxy.folder.rglob("*") if file.is_file()):
            written = file.read_bytes()
            assert not any(secret in written for secret in secrets), file

    def test_a_sidecar_that_is_gone_means_503_until_it_is_back(self, rig: Rig) -> None:
        """In time; public routes go on; the first request after the restart is served."""
        assert rig.ask(b"GET /v1/me", bearing(rig.full)).status == 200
        rig.sidecar.stop()
        began = time.monotonic()
        for fields in ([bearing(rig.full)], []):
            is_unavailable(rig.refused(b"GET /v1/me", *fields))
        assert time.monotonic() - began < 2 * PATIENCE_SECONDS
        assert rig.ask(b"GET /healthz").status == 200
        rig.sidecar.start()
        assert rig.ask(b"GET /v1/me", bearing(rig.full)).status == 200

    def test_connections_that_a_restart_closed_are_not_missed(self, rig: Rig) -> None:
        """Killed and restarted between two requests: the kept connections lead nowhere."""
        with ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(rig.ask, b"GET /v1/me", bearing(rig.full)) for _ in range(24)]
            assert {asked.result().status for asked in asking} == {200}
        rig.sidecar.kill()
        rig.sidecar.start()
        answers = [rig.ask(b"GET /v1/me", bearing(rig.full)).status for _ in range(12)]
        assert answers == 12 * [200]

    def test_a_sidecar_that_hangs_means_503_in_time(self, rig: Rig) -> None:
        """Long before a proxy's usual minute, for seventy callers at once; and all is well when it
        goes on."""

        def ask(_: int) -> float:
            began = time.monotonic()
            is_unavailable(rig.refused(b"GET /v1/me", bearing(rig.full)))
            return time.monotonic() - began

        rig.sidecar.pause()
        try:
            with ThreadPoolExecutor(70) as pool:
                assert max(pool.map(ask, range(70))) < PATIENCE_SECONDS
            assert rig.ask(b"GET /healthz").status == 200
        finally:
            rig.sidecar.resume()
        assert rig.ask(b"GET /v1/me", bearing(rig.full)).status == 200

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"HTTP/1.1",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1 200 OK\r\nContent-",
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            BROKEN,
            BROKEN.replace(b"Content-Length", NAMED + b"Content-Length"),
        ],
    )
    def test_nothing_but_an_allow_is_an_allow(
        self, rig: Rig, between: tuple[Stand, Proxy], answer: bytes
    ) -> None:
        """Whatever else comes from the sidecar's address is 503, and the app is not asked."""
        stand, other = between
        asked = rig.app.asked
        with stand.answering(answer):
            is_unavailable(send(other.url, b"GET /v1/me", bearing(rig.full)))
        assert rig.app.asked == asked

    def test_an_allow_that_names_nobody_lets_nobody_speak_for_himself(
        self, rig: Rig, between: tuple[Stand, Proxy]
    ) -> None:
        """200 from something that is no sidecar: refused, or the app hears of no identity."""
        stand, other = between
        lies = [name + b": evil" for name in SPELLINGS]
        with stand.answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"):
            answered = send(other.url, b"GET /v1/me", bearing(rig.full), *lies)
        if answered.status != 503:
            seen = told(answered)
            assert identity(seen) == {}
            assert "evil" not in json.dumps(seen)

    def test_the_question_holds_what_it_must_and_nothing_of_the_clients(
        self, rig: Rig, between: tuple[Stand, Proxy]
    ) -> None:
        """One question for a request: the permission, the credential, the facts; no body."""
        stand, other = between
        with stand.answering(BROKEN):
            head = [b"POST /v1/emails?permission=X HTTP/1.1", b"Host: test", b"Cookie: secret=1"]
            head += [bearing(rig.full), b"X-Forwarded-Method: GET", b"X-Evil: 1"]
            head += [b"Content-Length: 5", b"Connection: close", b"", b"hello"]
            exchange(other.url, b"\r\n".join(head))
        (question,) = stand.questions
        first, *fields = question.partition(b"\r\n\r\n")[0].split(b"\r\n")
        assert first.split(b" ")[1] == b"/verify?permission=SENDING"
        assert question.endswith(b"\r\n\r\n")
        sent = [
            (name.lower(), value.strip()) for name, _, value in (f.partition(b":") for f in fields)
        ]
        for name, value in (
            (b"authorization", bearing(rig.full).partition(b": ")[2]),
            (b"x-forwarded-method", b"POST"),
            (b"x-forwarded-uri", b"/v1/emails?permission=X"),
        ):
            assert [v for n, v in sent if n == name] == [value]
        names = {name for name, _ in sent}
        assert names.isdisjoint({b"content-length", b"transfer-encoding", b"cookie", b"x-evil"})

    def test_a_kept_connection_that_ends_under_a_question_is_not_missed(
        self, rig: Rig, between: tuple[Stand, Proxy]
    ) -> None:
        """Closed by the sidecar while a question is on its way: it is asked again on a new one."""
        stand, other = between
        allow = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + NAMED + b"\r\n"
        with stand.answering(allow, is_tired=True):
            answers = [send(other.url, b"GET /v1/me", bearing(rig.full)) for _ in range(6)]
        assert [answered.status for answered in answers] == 6 * [200]
        assert len(stand.questions) == 6

    @pytest.mark.parametrize("who", ["full", "nobody"])
    def test_many_requests_share_few_connections_to_the_sidecar(
        self, rig: Rig, between: tuple[Stand, Proxy], who: str
    ) -> None:
        """Allowed or refused: a flood of bad keys opens no connection each."""
        stand, other = between
        fields = [bearing(rig.full)] if who == "full" else []
        before = stand.connections
        for _ in range(60):
            assert send(other.url, b"GET /v1/me", *fields).status == (200 if fields else 401)
        assert stand.connections - before <= 2 * (os.cpu_count() or 1)

    def test_it_asks_over_a_unix_socket_as_well(self, rig: Rig) -> None:
        """The other spelling that the files name; the sidecar with its default settings."""
        if rig.kind.unix is None:
            pytest.skip(f"{rig.kind.name} cannot")
        with tempfile.TemporaryDirectory(prefix="keylatch-uds-") as temporary:
            folder = Path(temporary)
            folder.chmod(0o755)
            place = folder / "keylatch.sock"
            sidecar = SidecarProcess(folder, place)
            try:
                with proxy(rig.kind, rig.app_url, place) as other:
                    key = sidecar.create()
                    seen = told(send(other.url, b"GET /v1/me", bearing(key)))
                    assert identity(seen) == identity_of(key)
                    refused = send(other.url, b"GET /v1/me", bearing(rig.full))
                    assert refused.status == 401  # a key of the other sidecar
                    sidecar.stop()
                    is_unavailable(send(other.url, b"GET /v1/me", bearing(key)))
            finally:
                sidecar.close()


def exchange_until_idle(port: int, request: bytes) -> bytes:
    """Write a request; all that comes back until the connection closes or is silent."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(0.5)
        connection.sendall(request)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while piece := connection.recv(65536):
                received += piece
        return received
