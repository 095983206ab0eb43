"""The peer of a connection, on every server: as reported, never by a missing address."""

import importlib.util
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.servers import eventually, free_port, require_program

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
RESETS = 100
NO_LINGER = struct.pack("ii", 1, 0)  # close() resets the connection: socket(7), SO_LINGER


@dataclass(frozen=True)
class Server:
    """How a server is started.

    Args:
        name: of the variant.
        command: the module and its options.
        app: which app of `worker_identity` it takes.
        tcp: options to listen on a port.
        uds: options to listen on a Unix socket.
        marks_unix: whether it reports that a request came over a Unix socket.
    """

    name: str
    command: str
    app: str = "asgi"
    tcp: str = "--port {port}"
    uds: str = "--uds {path}"
    marks_unix: bool = True

    def __str__(self) -> str:
        return self.name


BIND = ("--bind 127.0.0.1:{port}", "--bind unix:{path}")
UVICORN = "uvicorn --no-proxy-headers --log-level warning --http"
SERVERS = (
    Server("uvicorn-httptools", f"{UVICORN} httptools"),
    Server("uvicorn-h11", f"{UVICORN} h11"),
    Server("granian", "granian --interface asgi"),
    Server("hypercorn", "hypercorn", "asgi", *BIND, marks_unix=False),
    Server("daphne", "daphne", "asgi", "-b 127.0.0.1 -p {port}", "-u {path}", marks_unix=False),
    Server("granian-wsgi", "granian --interface wsgi", "wsgi"),
    Server("gunicorn", "gunicorn", "wsgi", *BIND),
    Server("gunicorn-gthread", "gunicorn -k gthread --threads 2", "wsgi", *BIND),
    Server("waitress", "waitress", "wsgi", "--listen 127.0.0.1:{port}", "--unix-socket {path}"),
)
on_every_server = pytest.mark.parametrize("server", SERVERS, ids=str)


class Running:
    """A server, and the keys that it accepted."""

    def __init__(self, address: tuple[str, int] | str, acts: Path) -> None:
        self.in_the_end: list[str] = []
        self._address = address
        self._acts = acts

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        if isinstance(self._address, str):
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self._address)
            except OSError:
                connection.close()
                raise
            return connection
        return socket.create_connection(self._address, source_address=(source, 0))

    def status(self, key_id: str, source: str = "127.0.0.1") -> int:
        """What a request that claims to be of this key is answered."""
        with self.connect(source) as connection:
            connection.settimeout(60)
            connection.sendall(claiming(key_id))
            return int(connection.recv(4096).split(b" ")[1])

    def reset(self, source: str = "127.0.0.1") -> None:
        """Claim an identity, and reset the connection before the server asks for its peer."""
        connection = self.connect(source)
        connection.sendall(claiming("key_forged"))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        connection.close()

    def accepted_keys(self) -> list[str]:
        return self._acts.read_text().split() if self._acts.exists() else []


def claiming(key_id: str) -> bytes:
    """A request with a whole identity, and a Host that some servers take for their own name."""
    return (
        "POST /transfer HTTP/1.1\r\nHost: /run/app.sock:0\r\nContent-Length: 0\r\n"
        f"X-Keylatch-Key-Id: {key_id}\r\nX-Keylatch-Key-Name: forged\r\n"
        "X-Keylatch-Organization-Id: acme\r\nX-Keylatch-Permission: FULL\r\n"
        "X-Keylatch-Environment: live\r\n\r\n"
    ).encode()


@contextmanager
def running(server: Server, over: str, trusted: str, app: str = "") -> Iterator[Running]:
    """The server until the end of the block, and then until it has answered everything."""
    module = server.command.split()[0]
    require_program(module if importlib.util.find_spec(module) else None, f"pip install {module}")
    folder = Path(tempfile.mkdtemp(prefix="keylatch-"))  # a Unix socket's path must be short
    port, path, acts = free_port(), str(folder / "s"), folder / "acts"
    place = (server.tcp if over == "TCP" else server.uds).format(port=port, path=path)
    process = subprocess.Popen(
        [sys.executable, "-m", *server.command.split(), *place.split()]
        + [f"tests.support.worker_identity:{app or server.app}"],
        cwd=ROOT,
        env={**os.environ, "ACTS": str(acts), "TRUSTED": trusted, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = Running(("127.0.0.1", port) if over == "TCP" else path, acts)

    def listens() -> bool:
        assert process.poll() is None, "the server has ended"
        with suppress(OSError):
            run.connect().close()
            return True
        return False

    try:
        eventually(listens)
        yield run
        process.terminate()
        process.wait(60)
        run.in_the_end = run.accepted_keys()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


@on_every_server
def test_a_connection_that_is_reset_is_no_unix_socket(server: Server) -> None:
    """It has no address when the server asks for it, which does not make it a Unix socket. Trusted
    connections are still accepted."""
    with running(server, "TCP", "127.0.0.1,unix") as run:
        assert run.status("key_good") == 200
        assert run.status("key_forged", "127.0.0.2") == 401
        for _ in range(RESETS):
            run.reset("127.0.0.2")
        assert run.status("key_good") == 200
    assert run.in_the_end == ["key_good"] * 2


@on_every_server
def test_a_unix_socket_is_one_by_the_word_of_the_server(server: Server) -> None:
    """Where the server says so, `unix` is trusted; where it does not, every request is refused.
    Both whatever the client writes in `Host`."""
    with running(server, "unix", "unix") as run:
        assert run.status("key_good") == (200 if server.marks_unix else 401)
    with running(server, "unix", "127.0.0.1") as run:
        assert run.status("key_good") == 401


@pytest.mark.parametrize("server", SERVERS[:2], ids=str)
def test_a_twin_that_guesses_accepts_other_clients(server: Server) -> None:
    """On uvicorn a connection that was reset has no address: the twin calls that a Unix socket."""
    with running(server, "TCP", "unix", app="guessing") as run:

        def is_accepted() -> bool:
            run.reset("127.0.0.2")
            return "key_forged" in run.accepted_keys()

        eventually(is_accepted)
        assert run.status("key_honest") == 401
