"""Real servers for tests: each on a free port, in a temporary folder, stopped by its pid."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import redis
import uvicorn
import yaml


def require_program(program: str | None, package: str) -> str:
    """The program's path; without it the test is skipped, or fails where services are required."""
    if program is not None:
        return program
    how = package if package.startswith("pip ") else f"apt-get install {package}"
    missing = f"a real server is missing: {how}"
    if os.environ.get("KEYLATCH_REQUIRE_SERVICES") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Return once something outside this process is so; fail if it never is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        threading.Event().wait(0.02)


def error_without_package(package: str, program: str) -> str:
    """The last line of a Python program's complaint where a package is not installed."""
    program = f"import sys; sys.modules[{package!r}] = None; {program}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stdout
    return ended.stderr.strip().splitlines()[-1]


class RedisServer:
    """A real Redis that can be killed, paused and emptied.

    Args:
        folder: for its data.
        options: more of its command line.
        program: another one than redis-server, such as Valkey's.
    """

    def __init__(self, folder: Path, *options: str, program: str | None = None) -> None:
        program = program or shutil.which("redis-server")
        self._program = require_program(program, "redis-server")
        self._folder = folder
        self._options = options
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
            + ["--appendonly", "no", "--dir", str(self._folder), *self._options],
            stdout=subprocess.DEVNULL,
        )
        eventually(self._answers)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=5)

    def flush(self) -> None:
        with self.client() as client:
            client.flushall()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.resume()
        self._process.kill()
        self._process.wait()


class PostgresServer:
    """A real PostgreSQL cluster; each test takes a database of its own.

    Args:
        options: settings of the server, instead of the configuration file's.
    """

    def __init__(self, **options: str) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        postgres = require_program(str(programs[-1]) if programs else None, "postgresql")
        # Not below pytest's folder: PostgreSQL does not run as root, and others may not read it.
        self._folder = Path(tempfile.mkdtemp(prefix="keylatch-pg-"))
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            os.chown(self._folder, pwd.getpwnam(self._user).pw_uid, -1)
        self._data = self._folder / "data"
        self._postgres = postgres
        self.port = free_port()
        self._databases = 0
        self._options = {"fsync": "off", "max_connections": "400"} | options
        self._create()
        self.start()

    def _create(self) -> None:
        """Make the data directory."""
        self._run(
            [self._postgres.replace("bin/postgres", "bin/initdb"), "-D", str(self._data)]
            + ["-U", "postgres", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"]
        )

    def _run(self, command: list[str]) -> None:
        subprocess.run(
            command, user=self._user, cwd=self._folder, check=True, stdout=subprocess.DEVNULL
        )

    def start(self) -> None:
        self._launch()
        eventually(self._answers)

    def _launch(self) -> None:
        self._process = subprocess.Popen(
            [self._postgres, "-D", str(self._data), "-p", str(self.port), "-k", str(self._folder)]
            + ["-c", "listen_addresses=127.0.0.1"]
            + [word for option in self._options.items() for word in ("-c", "=".join(option))],
            user=self._user,
            cwd=self._folder,
            stderr=subprocess.DEVNULL,
        )

    def _answers(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            self._connect("postgres").close()
            return True
        return False

    def _connect(self, database: str) -> "psycopg.Connection[Any]":
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname=database, autocommit=True
        )

    def new_database(self, language: str | None = None) -> str:
        """The store URL of an empty database; `language`: that texts are ordered in."""
        self._databases += 1
        name = f"keys{self._databases}"
        order = f" TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE '{language}'"
        with self._connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE {name}{order if language else ''}")
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def kill(self) -> None:
        """Stop at once, as if the power had failed."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self._folder)


class PrometheusServer:
    """A real Prometheus.

    Args:
        folder: for its data, and where its configuration looks for rules.
        configuration: what `prometheus.yml` says.
    """

    def __init__(self, folder: Path, configuration: dict[str, Any]) -> None:
        program = require_program(shutil.which("prometheus"), "prometheus")
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        self._log = folder / "prometheus.log"
        address = f"127.0.0.1:{free_port()}"
        self._client = httpx.Client(base_url=f"http://{address}/api/v1/", trust_env=False)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, f"--config.file={folder}/prometheus.yml"]
                + [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"],
                stdout=log,
                stderr=log,
            )
        eventually(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return self._client.get("query", params={"query": "1"}).status_code == 200
        return False

    def query(self, path: str, **parameters: str) -> Any:
        """What its HTTP API answers; an error of its own fails the test."""
        answer = self._client.get(path, params=parameters).json()
        if answer["status"] != "success":
            pytest.fail(f"{parameters}: {answer['error']}")
        return answer["data"]

    def series(self, expression: str) -> list[dict[str, str]]:
        """The labels of each series that is there now."""
        found = self.query("query", query=expression)
        assert found["resultType"] == "vector", found
        return [each["metric"] for each in found["result"]]

    def kill(self) -> None:
        self._client.close()
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def serving(app: Any, more: Sequence[socket.socket] = (), **options: Any) -> Iterator[str]:
    """An ASGI app on a real socket, in a thread of this process; yields its base URL.

    Args:
        app: to serve.
        more: sockets on which it is served as well.
        options: more of uvicorn's, such as `http="h11"`.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        lifespan="on",
        server_header=False,
        date_header=False,
        **{"ws": "websockets-sansio", **options},
    )
    server = uvicorn.Server(config)
    first = socket.create_server(("127.0.0.1", 0))
    port = first.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([first, *more],), daemon=True)
    thread.start()
    eventually(lambda: server.started or not thread.is_alive())
    assert server.started, "the server did not start"
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
