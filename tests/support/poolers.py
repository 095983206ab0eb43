"""What operators put between an application and PostgreSQL: PgBouncer, pgpool-II."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg

from tests.support.postgresql_cluster import DATABASE, Node, store_url
from tests.support.servers import eventually, free_port, require_program

NEWER_PGBOUNCER = os.environ.get("KEYLATCH_PGBOUNCER", "")
"""A program beside the distribution's, of 1.21 or newer: see `.ci/pgbouncer`."""

# What PgBouncer itself says on server connections, so that they fit their next client.
_OF_PGBOUNCER = {
    *("application_name", "client_encoding", "DateStyle", "IntervalStyle", "TimeZone"),
    "standard_conforming_strings",
}


class _Pooler:
    """A program that listens on a free port, with its files in a folder of its own."""

    _stop_signal = signal.SIGKILL

    def __init__(self, name: str) -> None:
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix=f"keylatch-{name}-"))
        self._user = "postgres" if os.geteuid() == 0 else None  # neither runs as root
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of the store behind it."""
        return store_url(self.port)

    def connect(self, database: str = DATABASE) -> "psycopg.Connection[Any]":
        """Another program's connection through it."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            dbname=database,
            autocommit=True,
            prepare_threshold=None,
            connect_timeout=5,
        )

    def _start(self, command: list[str], database: str) -> None:
        if self._user:
            account = pwd.getpwnam(self._user)
            for path in (self._folder, *self._folder.iterdir()):
                os.chown(path, account.pw_uid, account.pw_gid)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, user=self._user, cwd=self._folder, stdout=log, stderr=log
            )
        eventually(lambda: self._answers(database))

    def _answers(self, database: str) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()
        with contextlib.suppress(psycopg.OperationalError):
            self.connect(database).close()
            return True
        return False

    def remove(self) -> None:
        """Stop it at once: its other signals let it wait for its clients."""
        if self._process is not None:
            self._process.send_signal(self._stop_signal)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class PgBouncer(_Pooler):
    """PgBouncer in front of a node.

    Args:
        node: the server.
        mode: `session`, `transaction` or `statement`.
        program: which PgBouncer; empty: the distribution's.
        settings: more of its settings.
    """

    def __init__(self, node: Node, mode: str, program: str = "", **settings: object) -> None:
        super().__init__("pgbouncer")
        found = program or shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        self._program = require_program(found, "pgbouncer")
        (self._folder / "users").write_text('"postgres" ""\n')
        self._file = self._folder / "pgbouncer.ini"
        written = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": self._folder,
            "auth_type": "trust",
            "auth_file": self._folder / "users",
            "admin_users": "postgres",
            "pool_mode": mode,
            **settings,
        }
        lines = ["[databases]", f"* = host=127.0.0.1 port={node.port}", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in written.items()]
        self._file.write_text("\n".join(lines) + "\n")
        self.start()

    def start(self) -> None:
        self._start([self._program, str(self._file)], "pgbouncer")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def settings_left(self) -> dict[str, int]:
        """Settings of a session that another program finds on the server connections that it gets:
        what → on how many connections. It takes every idle one of the pool at the same time."""
        found: Counter[str] = Counter()
        with contextlib.ExitStack() as stack, self.connect("pgbouncer") as console:
            servers = [row for row in console.execute("SHOW SERVERS").fetchall() if DATABASE in row]
            for _ in servers or [()]:
                client = stack.enter_context(self.connect())
                stack.enter_context(client.transaction())
                said = client.execute(
                    "SELECT name, setting FROM pg_settings WHERE source = 'session'"
                ).fetchall()
                found.update(f"{n} = {value}" for n, value in said if n not in _OF_PGBOUNCER)
        return dict(found)


class Pgpool(_Pooler):
    """pgpool-II that sends reads to a standby and everything else to the primary.

    Args:
        primary: node 0.
        standby: node 1, which gets all reads.
    """

    _stop_signal = signal.SIGINT  # it ends its children

    def __init__(self, primary: Node, standby: Node) -> None:
        super().__init__("pgpool")
        found = shutil.which("pgpool", path=f"{os.environ['PATH']}:/usr/sbin")
        program = require_program(found, "pgpool2")
        settings = {
            "backend_clustering_mode": "streaming_replication",
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "pcp_port": free_port(),
            "socket_dir": self._folder,
            "unix_socket_directories": self._folder,
            "pcp_socket_dir": self._folder,
            "pid_file_name": self._folder / "pid",
            "backend_hostname0": "127.0.0.1",
            "backend_port0": primary.port,
            "backend_weight0": 0,
            "backend_flag0": "ALWAYS_PRIMARY|DISALLOW_TO_FAILOVER",
            "backend_hostname1": "127.0.0.1",
            "backend_port1": standby.port,
            "backend_weight1": 1,
            "backend_flag1": "DISALLOW_TO_FAILOVER",
            "load_balance_mode": "on",
            "sr_check_period": 0,
            "sr_check_user": "postgres",
            "num_init_children": 40,
            "enable_pool_hba": "off",
        }
        lines = [f"{name} = '{value}'" for name, value in settings.items()]
        (self._folder / "pgpool.conf").write_text("\n".join(lines) + "\n")
        (self._folder / "pool_hba.conf").write_text("host all all all trust\n")
        (self._folder / "pcp.conf").touch()
        files = ["-f", "pgpool.conf", "-a", "pool_hba.conf", "-F", "pcp.conf"]
        self._start([program, "-n", *files], DATABASE)
