"""The sites of `path_sites` on real servers, and which view a request gets to."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from tests.adapters import grammar
from tests.adapters.path_space import Target
from tests.support.path_sites import ANONYMOUS, SENDING, VIEW
from tests.support.raw_http import exchange
from tests.support.servers import eventually, free_port


@dataclass(frozen=True)
class Server:
    """A real server with a site.

    Args:
        site: of `path_sites`.
        command: how it is started.
        root: the header by which its clients choose the root path, if they may.
    """

    site: str
    command: str
    root: str = ""

    @property
    def name(self) -> str:
        program, *options = self.command.split()
        said = [each for each in options if each in ("httptools", "h11", "wsgi", "asgi", "/api")]
        return " ".join([self.site, "on", program, *said])

    @property
    def below(self) -> str:
        """What paths begin with: uvicorn puts its root path before them, others do not."""
        return "/api" if self.command.endswith("/api") and "uvicorn" not in self.command else ""


UVICORN: Final = (
    "uvicorn tests.support.worker_paths:app --port {port} --lifespan on"
    " --log-level critical --http "
)
HYPERCORN: Final = "hypercorn tests.support.worker_paths:app --bind 127.0.0.1:{port}"
GRANIAN: Final = (
    "granian tests.support.worker_paths:app --port {port} --log-level critical --interface "
)
GUNICORN: Final = "gunicorn tests.support.worker_paths:app --bind 127.0.0.1:{port} --threads 2"
WAITRESS: Final = "waitress --listen 127.0.0.1:{port} tests.support.worker_paths:app"
DAPHNE: Final = "daphne -b 127.0.0.1 -p {port} -v 0 tests.support.worker_paths:app"

SERVERS: Final = (
    Server("starlette", UVICORN + "httptools"),
    Server("fastapi", UVICORN + "h11"),
    Server("litestar", UVICORN + "httptools --root-path /api"),
    Server("django_asgi", UVICORN + "h11 --root-path /api"),
    Server("starlette", HYPERCORN),
    Server("litestar", HYPERCORN + " --root-path /api"),
    Server("quart", HYPERCORN + " --root-path /api"),
    Server("litestar", GRANIAN + "asgi --url-path-prefix /api"),
    Server("quart", GRANIAN + "asgi"),
    Server("flask", GRANIAN + "wsgi"),
    Server("starlette", DAPHNE, "Daphne-Root-Path"),
    Server("litestar", DAPHNE, "Daphne-Root-Path"),
    Server("quart", DAPHNE, "Daphne-Root-Path"),
    Server("django_asgi", DAPHNE, "Daphne-Root-Path"),
    Server("flask", GUNICORN),
    Server("django_wsgi", GUNICORN),
    Server("flask_declared", WAITRESS),
    Server("django_wsgi", WAITRESS),
)


class Served:
    """A site on a running server."""

    def __init__(self, server: Server, tokens: Mapping[str, str], port: int) -> None:
        self._server = server
        self._place = f"http://127.0.0.1:{port}"
        self._tokens = tokens

    def view(self, target: Target, caller: str) -> str | None:
        """Which view was called, if one was."""
        fields = []
        if caller != ANONYMOUS:
            fields.append(f"Authorization: Bearer {self._tokens[caller]}")
        if self._server.root and target.root:
            fields.append(f"{self._server.root}: {quote(target.root)}")
        head = self._head(f"{target.method} {target.path}", *fields)
        named = re.search(rf"^{VIEW}: ([^\r\n]+)", head, re.IGNORECASE | re.MULTILINE)
        return named[1] if named else None

    def _head(self, *lines: str) -> str:
        start, *fields = lines
        fields += ["Host: test", "Connection: close", "Content-Length: 0"]
        request = "\r\n".join([f"{start} HTTP/1.1", *fields, "", ""])
        with contextlib.suppress(OSError):
            return (
                exchange(self._place, request.encode()).partition(b"\r\n\r\n")[0].decode("latin-1")
            )
        return ""

    def is_ready(self) -> bool:
        return self._head("GET /").startswith("HTTP/1.1 ")


@contextlib.contextmanager
def served(server: Server, keys: grammar.Keys) -> Iterator[Served]:
    """The server, until the end of the block."""
    port = free_port()
    command = server.command.format(port=port).split()
    log = keys.folder / f"{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=keys.environ | {"PATH_SITE": server.site},
            cwd=Path(__file__).parents[2],
            stdout=output,
            stderr=output,
        )
    try:
        running = Served(server, {SENDING: keys.tokens["sending"]}, port)
        eventually(lambda: running.is_ready() or process.poll() is not None, 60)
        assert process.poll() is None, f"it did not start: {log.read_text()}"
        yield running
    finally:
        process.terminate()
        process.wait(20)
