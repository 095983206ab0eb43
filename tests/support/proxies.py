"""Real proxies in front of a real app and a real sidecar, whose requests are recorded.

The configuration is the very file in `deploy/` that operators copy, with only addresses and folders
replaced. A file `test_<proxy>.py` says how its proxy is started and inherits `ProxyContract`.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.types import Receive, Scope, Send

from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.settings import Settings
from tests.support.raw_http import RawResponse, send
from tests.support.servers import eventually, free_port, require_program, serving

DEPLOY = Path(__file__).parents[2] / "deploy"
SIDECAR = "127.0.0.1:8700"
APP = "127.0.0.1:8000"
NAME = "Grüße, 日本"
IDENTITY = [
    f"x-keylatch-{word}"
    for word in ("key-id", "key-name", "organization-id", "permission", "environment")
]
SEARCHED = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin"

JSON = dict[str, Any]


class Echo:
    """An app that echoes its requests, and counts them: for each test, did a request get here?"""

    def __init__(self) -> None:
        self.request_count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
            return
        self.request_count += 1
        if scope["type"] == "websocket":
            await self._echo_websocket(scope, receive, send)
            return
        length, more = 0, True
        while more:
            message = await receive()
            length += len(message.get("body", b""))
            more = message.get("more_body", False)
        body = json.dumps(self.describe(scope) | {"length": length}).encode()
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

    async def _echo_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": json.dumps(self.describe(scope))})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})

    @staticmethod
    def describe(scope: Scope) -> JSON:
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

    def __init__(self, folder: Path, address: Path | None = None, **settings: str) -> None:
        self._folder = folder
        self._uds = address
        self.port = free_port()
        self.place: str | Path = address or f"http://127.0.0.1:{self.port}"
        outside = {k: v for k, v in os.environ.items() if not k.startswith("KEYLATCH_")}
        given = {"STORE": f"sqlite:///{folder}/keys.db", "HASHER": "sha256", **settings}
        self._environment = outside | {f"KEYLATCH_{name}": value for name, value in given.items()}
        self._operator = Engine(
            Settings.load(store=given["STORE"], redis="", hasher=given["HASHER"])
        )
        self._runner = asyncio.Runner()
        self.start()

    def start(self) -> None:
        self._launch(sys.executable, "-m", "keylatch_sidecar", "serve")
        self.wait_until_ready()

    def _launch(self, *command: str) -> None:
        with (self._folder / "sidecar.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._listen_arguments()],
                env=self._environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )

    def wait_until_ready(self) -> None:
        eventually(self._is_ready)

    def _listen_arguments(self) -> list[str]:
        """Arguments that say where it listens."""
        return ["--uds", str(self._uds)] if self._uds else ["--port", str(self.port)]

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
        """Stop without closing connections."""
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
            created = await keyring.create("acme", name, permission=permission, **fields)
            if self._operator.store.is_shared:  # a member that does not run is waited for
                await self._operator.stop()
            return created

        return self._runner.run(create())

    def revoke(self, key: Created) -> None:
        """It is so everywhere when this returns."""

        async def revoke() -> None:
            await (await self._operator.keyring()).delete("acme", key.record.id)

        self._runner.run(revoke())

    def decision(self, *fields: bytes, permission: str = "FULL") -> RawResponse:
        """The sidecar's response, without a proxy, to a request with the headers of its source."""
        facts = (b"X-Forwarded-Method: GET", b"X-Forwarded-Uri: /")
        return send(self.place, f"GET /verify?permission={permission}".encode(), *facts, *fields)

    def close(self) -> None:
        self._runner.run(self._operator.stop())
        self._runner.close()
        if self._process.poll() is None:
            self.resume()
            self.kill()


class FaultInjector:
    """Stands between a proxy and its sidecar: counts connections, and may answer by itself.

    Args:
        port: of the sidecar.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.requests: list[bytes] = []
        """Each request as it was received, while `answer` is set."""
        self.response: bytes | None = None
        """The response to every request before its connection is closed; None: the sidecar's."""
        self.closes_after_next_request = False
        """Whether it closes a connection only after a second request, which it does not answer."""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                proxy, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._handle, args=[proxy], daemon=True).start()

    def _handle(self, proxy: socket.socket) -> None:
        with proxy, contextlib.suppress(OSError):
            if (answer := self.response) is not None:
                self.requests.append(proxy.recv(65536))
                proxy.sendall(answer)
                if self.closes_after_next_request:
                    proxy.recv(65536)
                proxy.shutdown(socket.SHUT_WR)
                return
            with socket.create_connection(("127.0.0.1", self._port)) as sidecar:
                for end in (proxy, sidecar):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                back = threading.Thread(target=relay, args=[sidecar, proxy], daemon=True)
                back.start()
                relay(proxy, sidecar)
                back.join()

    @contextlib.contextmanager
    def responding(self, answer: bytes, closes_after_next_request: bool = False) -> Iterator[None]:
        """Answer so until the end of the block."""
        self.response, self.closes_after_next_request = answer, closes_after_next_request
        self.requests.clear()
        try:
            yield
        finally:
            self.response, self.closes_after_next_request = None, False

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the reader of the next one
        self._listener.close()


def relay(source: socket.socket, drain: socket.socket) -> None:
    """Hand on all bytes, and the end."""
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            drain.sendall(piece)
        drain.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Kind:
    """How to run one proxy from its files in `deploy/`.

    Args:
        name: of its directory in `deploy/`.
        program: its executable.
        package: what to install for it.
        command: its arguments; `{folder}` is the directory of the files.
        check: arguments with which it validates its files and exits.
        front: its address in the files.
        sidecar_address: the sidecar's address in the files.
        sidecar: how to run one that the proxy can use.
        front_format: the format of that address.
        address_format: the format of other addresses in the files.
        files: which of the folder's files it needs.
        folders: those that the files name, to be replaced by temporary ones.
        files_named: the same for single files.
        sockets: names that are global on the machine, to be made unique.
        unix_format: the format of a Unix socket as the sidecar's address; None: not supported.
        inner: further addresses that it listens on, for itself.
        home: the folder it is started in; `{folder}` is where the files are.
        first: a request that is 404 until it has read its files, and is then refused without a
            check; empty: it has read them when it listens.
        environment: variables that say where it writes; `{folder}` is where the files are.
    """

    name: str
    program: str
    package: str
    command: Sequence[str]
    check: Sequence[str]
    front: str = "127.0.0.1:8080"
    sidecar_address: str = SIDECAR
    sidecar: type[SidecarProcess] = SidecarProcess
    front_format: str = "127.0.0.1:{port}"
    address_format: str = "{host}:{port}"
    files: Sequence[str] = ()
    folders: Sequence[str] = ()
    files_named: Sequence[str] = ()
    sockets: Sequence[str] = ()
    unix_format: str | None = None
    other_addresses: Sequence[str] = ()
    cwd: str = "/"  # as a service manager starts it
    ready_request: bytes = b""
    environment: Mapping[str, str] = field(default_factory=dict)
    only_root: str = ""
    """Lines (a pattern) that only root may use: others run it without."""
    limited: Mapping[str, str] = field(default_factory=dict)
    """What to replace so that a key is limited to two requests; empty: there is no limit."""
    unlimited: Mapping[str, str] = field(default_factory=dict)
    """What to replace so that no key is limited."""

    def format_address(self, address: str) -> str:
        """An address, which is given as host:port, as the files spell it."""
        host, _, port = address.partition(":")
        return self.address_format.format(host=host, port=port)


class Proxy:
    """A proxy that runs."""

    def __init__(self, port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.folder = folder


def write_config(kind: Kind, folder: Path, substitutions: Mapping[str, str]) -> int:
    """Copy a proxy's files with their addresses and folders replaced; its own port."""
    port = free_port()
    front = kind.front_format.format(port=port)
    replace = {kind.format_address(kind.front): kind.format_address(front), **substitutions}
    replace |= {name: f"{name}-{port}" for name in kind.sockets}
    replace |= {name: str(folder / Path(name).name) for name in kind.files_named}
    replace |= {address: f"127.0.0.1:{free_port()}" for address in kind.other_addresses}
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
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("".join(lines))
    assert not unseen, f"{kind.name} does not name {unseen}"
    return port


@contextlib.contextmanager
def running_proxy(
    kind: Kind, app: str, sidecar: int | Path, twin: Mapping[str, str] | None = None
) -> Iterator[Proxy]:
    """A proxy that runs until the end of the block.

    Args:
        kind: which one.
        app: the app's base URL.
        sidecar: its port, or its Unix socket.
        twin: further texts to replace: a mistake that tests look at.
    """
    program = require_program(shutil.which(kind.program, path=SEARCHED), kind.package)
    place = kind.format_address(f"127.0.0.1:{sidecar}")
    if isinstance(sidecar, Path):
        assert kind.unix_format is not None
        place = kind.unix_format.format(sidecar)
    # Not below pytest's folder: a worker process of another user could not reach it.
    folder = Path(tempfile.mkdtemp(prefix=f"keylatch-{kind.name}-"))
    folder.chmod(0o755)
    addresses = {kind.sidecar_address: place, APP: kind.format_address(urlsplit(app).netloc)}
    substitutions = {kind.format_address(old): new for old, new in addresses.items()} | dict(
        twin or {}
    )
    port = write_config(kind, folder, substitutions)
    with (folder / "output.log").open("ab") as log:
        process = subprocess.Popen(
            [program, *(part.format(folder=folder) for part in kind.command)],
            cwd=kind.cwd.format(folder=folder),
            env={**os.environ, **{n: v.format(folder=folder) for n, v in kind.environment.items()}},
            stdout=log,
            stderr=log,
        )

    def listens() -> bool:
        assert process.poll() is None, (folder / "output.log").read_text()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return (
                not kind.ready_request
                or send(f"http://127.0.0.1:{port}", kind.ready_request).status != 404
            )
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


def config_errors(kind: Kind) -> str:
    """What a proxy has to say about its files; empty: nothing."""
    program = require_program(shutil.which(kind.program, path=SEARCHED), kind.package)
    with tempfile.TemporaryDirectory(prefix=f"keylatch-{kind.name}-") as temporary:
        folder = Path(temporary)
        write_config(kind, folder, {})
        command = [program, *(part.format(folder=folder) for part in kind.check)]
        ended = subprocess.run(command, capture_output=True, text=True, cwd="/")
        # Who is not root is warned by some that they cannot change to another user.
        return ended.stderr if ended.returncode or os.geteuid() == 0 else ""


class ProxyStack:
    """A proxy, its sidecar, an app, and two keys: one FULL, one SENDING."""

    def __init__(self, kind: Kind, app: Echo, app_url: str, sidecar: SidecarProcess) -> None:
        self.kind = kind
        self.app = app
        self.app_url = app_url
        self.sidecar = sidecar
        self.full = sidecar.create()
        self.sender = sidecar.create("SENDING", "mailer", environment="test")
        self.running: Proxy

    @property
    def url(self) -> str:
        return self.running.url

    def request(self, start: bytes, *fields: bytes) -> RawResponse:
        """One request to the proxy."""
        return send(self.url, start, *fields)

    def request_refused(self, start: bytes, *fields: bytes) -> RawResponse:
        """One request that must not get to the app."""
        count_before = self.app.request_count
        answered = self.request(start, *fields)
        assert self.app.request_count == count_before, answered
        assert b"x-echo" not in header_dict(answered)
        return answered


@contextlib.contextmanager
def running_stack(kind: Kind) -> Iterator[ProxyStack]:
    """All of it, on free ports, until the end of the block."""
    require_program(shutil.which(kind.program, path=SEARCHED), kind.package)
    app = Echo()
    with tempfile.TemporaryDirectory(prefix="keylatch-sidecar-") as folder, serving(app) as app_url:
        sidecar = kind.sidecar(Path(folder), VERIFY_REQUEST="forwarded")
        try:
            made = ProxyStack(kind, app, app_url, sidecar)
            with running_proxy(kind, app_url, sidecar.port) as made.running:
                yield made
        finally:
            sidecar.close()


@contextlib.contextmanager
def faulty_proxy(
    proxy: ProxyStack, twin: Mapping[str, str] | None = None
) -> Iterator[tuple[FaultInjector, Proxy]]:
    """A second proxy, with a fault injector between it and the sidecar."""
    injector = FaultInjector(proxy.sidecar.port)
    try:
        with running_proxy(proxy.kind, proxy.app_url, injector.port, twin) as other:
            yield injector, other
    finally:
        injector.close()


def auth_header(key: Created) -> bytes:
    """The header field that presents a key."""
    return b"Authorization: Bearer " + key.token.reveal().encode()


def header_dict(answer: RawResponse) -> dict[bytes, bytes]:
    """An answer's header fields by lower-case name; none may come twice."""
    headers = {name.lower(): value for name, value in answer.headers}
    assert len(headers) == len(answer.headers), answer
    return headers


def echoed(answer: RawResponse) -> JSON:
    """The request as the app received it."""
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
    """The identity headers that the app must get for a key."""
    record = key.record
    values = [record.id, quote(record.name, safe=""), "acme", record.permission, record.environment]
    return {name: [value] for name, value in zip(IDENTITY, values, strict=True)}


def values_of(seen: JSON, name: str) -> list[str]:
    """The values of a header that the app was sent."""
    return [value for known, value in seen["headers"] if known.lower() == name]


def assert_unavailable(answer: RawResponse) -> None:
    """503 in the sidecar's own words, with the time to try again."""
    headers = header_dict(answer)
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


def assert_rate_limited(answer: RawResponse) -> None:
    """429 as JSON, with the time to try again."""
    headers = header_dict(answer)
    assert answer.status == 429
    assert headers[b"content-type"] == b"application/json"
    assert int(headers[b"retry-after"]) > 0
    assert headers[b"x-keylatch-error"] == b"rate_limited"
    assert headers[b"cache-control"] == b"no-store"
    assert b"www-authenticate" not in headers
    assert json.loads(answer.body)["error"] == "rate_limited"


def assert_same_refusal(answer: RawResponse, expected_answer: RawResponse) -> None:
    """A refusal has the sidecar's status, body, and headers that matter, each of them once."""
    headers, expected = header_dict(answer), header_dict(expected_answer)
    assert answer.status == expected_answer.status
    assert answer.body == expected_answer.body
    for name in (b"www-authenticate", b"content-type", b"cache-control", b"x-keylatch-error"):
        assert headers[name] == expected[name], name


def with_trailer(key: Created) -> bytes:
    """A request whose body is followed by a forged identity."""
    lines = [b"POST /v1/emails HTTP/1.1", b"Host: test", auth_header(key)]
    lines += [b"Transfer-Encoding: chunked", b"TE: trailers", b"Trailer: X-Keylatch-Key-Id"]
    lines += [b"Connection: close", b"", b"5", b"hello", b"0", b"X-Keylatch-Key-Id: evil"]
    return b"\r\n".join([*lines, b"", b""])


def exchange_until_idle(port: int, request: bytes) -> bytes:
    """Write a request; all that comes back until the connection closes or is silent."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(60)  # for the beginning of the answer, on a busy machine
        connection.sendall(request)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while piece := connection.recv(65536):
                received += piece
                connection.settimeout(0.5)
        return received
