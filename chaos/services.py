"""The real Redis and the real PostgreSQL: on free ports, in temporary folders, stopped by pid."""

import asyncio
import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import psycopg
from redis.asyncio import Redis
from redis.exceptions import RedisError

_PORTS: Final = (15_000, 30_000)  # below those that Linux gives to outgoing connections


class ProgramMissing(Exception):
    """A server's program is not installed."""


def free_port() -> int:
    """A port that was free a moment ago, and that no outgoing connection takes in the meantime."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(*_PORTS)))
            return int(probe.getsockname()[1])


async def until(answers: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await answers():
            await asyncio.sleep(0.02)


class RedisService:
    """A Redis that keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise ProgramMissing("apt-get install redis-server")
        self.port = free_port()
        self._command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._command += ["--appendonly", "no", "--dir", str(folder)]

    async def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        await until(self._answers)

    async def _answers(self) -> bool:
        with contextlib.suppress(RedisError, OSError):
            async with self.client() as client:
                return bool(await client.ping())
        return False

    def client(self) -> "Redis":
        """A connection past all proxies."""
        return Redis(port=self.port, socket_timeout=5)

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait()


class PostgresService:
    """A PostgreSQL server of our own.

    Args:
        log: the file it writes its log to.
        name: by which a primary knows it as a standby.
    """

    def __init__(self, log: Path, name: str = "node-0") -> None:
        self._log = log
        self.name = name
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        if not programs:
            raise ProgramMissing("apt-get install postgresql")
        self._program = str(programs[-1])
        self._user = "postgres" if os.geteuid() == 0 else None  # it does not run as root
        self._folder = Path(tempfile.mkdtemp(prefix="keylatch-chaos-pg-"))
        if self._user:
            os.chown(self._folder, pwd.getpwnam(self._user).pw_uid, -1)
        self._data = self._folder / "data"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    async def make(self) -> None:
        """Make an empty data directory and start it."""
        await self._run("initdb", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8")
        await self.start()

    async def copy(self, primary: "PostgresService") -> None:
        """Replicate a primary from now on; what was here before is removed."""
        shutil.rmtree(self._data, ignore_errors=True)
        address = f"host=127.0.0.1 port={primary.port} application_name={self.name}"
        options = ["-R", "-X", "stream", "-c", "fast", "--no-sync"]
        await self._run("pg_basebackup", "-d", address, *options)
        await self.start()

    async def _run(self, program: str, *arguments: str) -> None:
        command = [self._program.replace("bin/postgres", f"bin/{program}"), "-U", "postgres"]
        command += ["-D", str(self._data), *arguments]
        await asyncio.to_thread(
            subprocess.run,
            command,
            user=self._user,
            cwd=self._folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        # Processes are killed here, not machines, so what the kernel has is durable: no fsync.
        options = ["listen_addresses=127.0.0.1", "fsync=off", "max_connections=400"]
        options += ["wal_retrieve_retry_interval=100ms"]  # standbys come back at once
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "-D", str(self._data), "-p", str(self.port)]
                + ["-k", str(self._folder)]
                + [word for option in options for word in ("-c", option)],
                user=self._user,
                cwd=self._folder,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        await until(self._answers)

    async def _answers(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            await (await self.connect("postgres")).close()
            return True
        return False

    async def connect(self, database: str) -> "psycopg.AsyncConnection[Any]":
        """A connection past all proxies."""
        return await psycopg.AsyncConnection.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            dbname=database,
            autocommit=True,
            connect_timeout=2,
        )

    async def query(self, sql: str) -> list[Any]:
        """The rows of a statement."""
        async with await self.connect("postgres") as connection:
            cursor = await connection.execute(sql.encode())
            return await cursor.fetchall() if cursor.description else []

    async def configure(self, name: str, value: str) -> None:
        """Change a setting while it runs."""
        await self.query(f"ALTER SYSTEM SET {name} = '{value}'")
        await self.query("SELECT pg_reload_conf()")

    async def create(self, database: str) -> None:
        """Make an empty database."""
        await self.query(f'CREATE DATABASE "{database}"')

    async def terminate_sessions(self) -> None:
        """End every session but this one."""
        await self.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )

    async def crash(self) -> None:
        """Stop at once, as if it had been killed."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            await asyncio.to_thread(self._process.wait)
            self._process = None

    async def remove(self) -> None:
        """Stop it and remove its folder."""
        await self.crash()
        shutil.rmtree(self._folder, ignore_errors=True)
