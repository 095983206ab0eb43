"""Patroni: nodes whose primary is chosen through etcd, and HAProxy in front of them.

`synchronous_mode` is on. There is no watchdog, so a primary whose Patroni was killed lives on.
"""

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import psycopg
import yaml

from tests.support.postgresql_cluster import DATABASE, Row, store_url
from tests.support.servers import eventually, free_port, require_program

TTL_SECONDS = 20
"""After which another node takes over: Patroni's least."""

HAPROXY = """
defaults
    mode tcp
    timeout connect 1s
    timeout client 1h
    timeout server 1h
frontend store
    bind 127.0.0.1:{port}
    default_backend primary
backend primary
    option httpchk GET /primary
    default-server check inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions
"""


class PatroniNode:
    """One node: Patroni, and the PostgreSQL that it starts.

    Args:
        name: in the cluster.
        folder: of the node.
        etcd_port: where the cluster's state is.
    """

    def __init__(self, name: str, folder: Path, etcd_port: int) -> None:
        self.name = name
        self.port = free_port()
        self.rest_port = free_port()
        self._data = folder / "data"
        self.file = folder / "patroni.yml"
        self.process: subprocess.Popen[bytes] | None = None
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        parameters = {"fsync": "off", "unix_socket_directories": str(folder)}
        self.file.write_text(
            yaml.safe_dump(
                {
                    "scope": "keylatch",
                    "name": name,
                    "restapi": self._address(self.rest_port),
                    "etcd3": {"hosts": f"127.0.0.1:{etcd_port}"},
                    "bootstrap": {
                        "dcs": {
                            "ttl": TTL_SECONDS,
                            "loop_wait": 1,
                            "retry_timeout": 3,
                            "synchronous_mode": True,
                            "postgresql": {"use_pg_rewind": True, "parameters": parameters},
                        },
                        "initdb": ["no-sync", {"locale": "C"}, {"encoding": "UTF8"}],
                    },
                    "postgresql": {
                        **self._address(self.port),
                        "bin_dir": str(programs[-1]),
                        "data_dir": str(self._data),
                        "pgpass": str(folder / "pgpass"),
                        "parameters": {"unix_socket_directories": str(folder)},
                        "pg_hba": [
                            "local all all trust",
                            "host all all 127.0.0.1/32 trust",
                            "host replication all 127.0.0.1/32 trust",
                        ],
                        "authentication": {
                            "superuser": {"username": "postgres"},
                            "replication": {"username": "postgres"},
                        },
                    },
                }
            )
        )

    @staticmethod
    def _address(port: int) -> dict[str, str]:
        return {"listen": f"127.0.0.1:{port}", "connect_address": f"127.0.0.1:{port}"}

    def role_is(self, role: str) -> bool:
        """Whether its health check for this role (`primary`, `sync`, `replica`) says yes."""
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{self.rest_port}/{role}"
            with urllib.request.urlopen(url, timeout=2) as response:
                return bool(response.status == 200)
        return False

    def query(self, sql: str, database: str = DATABASE) -> list[Row]:
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def live_keys(self) -> set[str]:
        """The ids of keys that are not deleted."""
        live = self.query("SELECT id FROM keylatch_keys WHERE deleted_at IS NULL")
        return {key_id for (key_id,) in live}

    def kill_patroni(self) -> None:
        """kill -9 of Patroni alone, as the OOM killer does: PostgreSQL is left to itself."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def kill_postgresql(self) -> None:
        """kill -9 of PostgreSQL's processes, if there are any."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pid = int((self._data / "postmaster.pid").read_text().split()[0])
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for each in (pid, *map(int, children)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)


class PatroniCluster:
    """etcd, nodes with Patroni, and HAProxy that leads to the primary.

    Args:
        nodes: how many.
    """

    def __init__(self, nodes: int = 2) -> None:
        etcd = require_program(shutil.which("etcd"), "etcd-server")
        self._patroni = require_program(shutil.which("patroni"), "patroni")
        found = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
        self._haproxy = require_program(found, "haproxy")
        self._user = "postgres" if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="keylatch-patroni-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._etcd_port, self._haproxy_port = free_port(), free_port()
        self._own(self._folder)
        self._start_etcd(etcd)
        self.nodes = [self._add_node(f"node{number}") for number in range(nodes)]
        self._start_haproxy()
        eventually(lambda: len(self._with_role("primary")) == 1)
        eventually(lambda: len(self._with_role("sync")) == 1)
        self.primary.query(f"CREATE DATABASE {DATABASE}", "postgres")
        eventually(lambda: self._is_reachable(self._haproxy_port))

    @property
    def url(self) -> str:
        """Of the store behind HAProxy."""
        return store_url(self._haproxy_port)

    @property
    def url_of_all(self) -> str:
        """Of the store, with all nodes in it, for libpq."""
        hosts = ",".join("127.0.0.1" for _ in self.nodes)
        ports = ",".join(str(node.port) for node in self.nodes)
        where = f"host={hosts}&port={ports}&target_session_attrs=read-write"
        return f"postgresql://postgres@/{DATABASE}?{where}"

    @property
    def primary(self) -> PatroniNode:
        """The node that says it is."""
        (node,) = self._with_role("primary")
        return node

    def switch_over(self) -> None:
        """Planned: the other node is the primary when this returns."""
        before = self.primary
        body = json.dumps({"leader": before.name}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{before.rest_port}/switchover", body, method="POST"
        )
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=60).close()
        self.wait_for_another(before)

    def wait_for_another(self, before: PatroniNode) -> PatroniNode:
        """Another node is the primary and takes writes when this returns."""

        def has_moved() -> bool:
            nodes = [node for node in self._with_role("primary") if node is not before]
            return bool(nodes) and nodes[0].query("SELECT pg_is_in_recovery()") == [(False,)]

        eventually(has_moved)
        return next(node for node in self._with_role("primary") if node is not before)

    def remove(self) -> None:
        for node in self.nodes:
            if node.process is not None:
                node.kill_patroni()
            node.kill_postgresql()
        for process in self._processes:
            process.kill()
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _with_role(self, role: str) -> list[PatroniNode]:
        return [node for node in self.nodes if node.role_is(role)]

    def _start_etcd(self, program: str) -> None:
        client = f"http://127.0.0.1:{self._etcd_port}"
        peer = f"http://127.0.0.1:{free_port()}"
        arguments = ["--data-dir", str(self._folder / "etcd"), "--unsafe-no-fsync"]
        arguments += ["--listen-client-urls", client, "--advertise-client-urls", client]
        arguments += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        arguments += ["--initial-cluster", f"default={peer}"]
        self._processes.append(self._start([program, *arguments], "etcd.log"))

        def answers() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{client}/health") as said:
                return bool(json.loads(said.read())["health"] == "true")
            return False

        eventually(answers)

    def _add_node(self, name: str) -> PatroniNode:
        folder = self._folder / name
        folder.mkdir()
        node = PatroniNode(name, folder, self._etcd_port)
        self._own(folder)
        self._own(node.file)
        node.process = self._start([self._patroni, str(node.file)], f"{name}.log")
        return node

    def _start_haproxy(self) -> None:
        file = self._folder / "haproxy.cfg"
        servers = [
            f"    server {node.name} 127.0.0.1:{node.port} check port {node.rest_port}"
            for node in self.nodes
        ]
        file.write_text(HAPROXY.format(port=self._haproxy_port) + "\n".join(servers) + "\n")
        self._processes.append(self._start([self._haproxy, "-f", str(file)], "haproxy.log"))

    def _start(self, command: list[str], log: str) -> "subprocess.Popen[bytes]":
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PATRONI_", "ETCD_"))
        }
        with (self._folder / log).open("ab") as file:
            return subprocess.Popen(
                command,
                user=self._user,
                cwd=self._folder,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def _own(self, path: Path) -> None:
        if self._user:
            os.chown(path, pwd.getpwnam(self._user).pw_uid, -1)

    def _is_reachable(self, port: int) -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(store_url(port), connect_timeout=2).close()
            return True
        return False
