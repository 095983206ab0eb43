"""The files of `deploy/patroni` and `deploy/cloudnativepg`.

Those of Patroni run in the real programs, with other addresses and folders; what Kubernetes gets is
checked against what can be known without a cluster.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.proxies import DEPLOY, SEARCHED
from tests.support.servers import eventually, free_port, require_program

PATRONI = DEPLOY / "patroni"
NODES = ("patroni1", "patroni2", "patroni3")
REQUIRED_BY_PATRONI_3 = ("bootstrap.pg_hba ", "postgresql.authentication.rewind ")
"""What its validation asks for, and neither it nor a newer one needs."""
PASSWORDS = {"SUPERUSER": "one", "REPLICATION": "two", "KEYLATCH_DB": "it's"}


def program(name: str, package: str) -> str:
    return require_program(shutil.which(name, path=SEARCHED), package)


def replaced(name: str, changes: Mapping[str, object]) -> str:
    """A file of `deploy/patroni` with other values; each of the old ones is in it."""
    text = (PATRONI / name).read_text()
    for old, new in changes.items():
        assert old in text, f"{name} has no {old}"
        text = text.replace(old, str(new))
    return text


class Programs:
    """Real programs, as the user postgres where the tests run as root."""

    def __init__(self) -> None:
        self._user = "postgres" if os.geteuid() == 0 else None
        # Not below pytest's folder, which other users may not read.
        self.folder = Path(tempfile.mkdtemp(prefix="keylatch-deploy-"))
        self.folder.chmod(0o755)
        self._own(self.folder)
        self._running: list[subprocess.Popen[bytes]] = []

    def _own(self, path: Path) -> None:
        if self._user:
            os.chown(path, pwd.getpwnam(self._user).pw_uid, -1)

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        self._own(path)
        return path

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in command],
            user=self._user,
            cwd=self.folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self, *command: object, log: str, **environment: str) -> "subprocess.Popen[bytes]":
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                user=self._user,
                cwd=self.folder,
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._running.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / name).read_text()

    def end(self) -> None:
        for process in reversed(self._running):
            process.kill()
            process.wait()
        for pid_file in self.folder.glob("*/postmaster.pid"):  # servers whose Patroni was killed
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(pid_file.read_text().split()[0]), signal.SIGQUIT)
        eventually(lambda: not list(self.folder.glob("*/postmaster.pid")))
        shutil.rmtree(self.folder)


@pytest.fixture
def programs() -> Iterator[Programs]:
    started = Programs()
    yield started
    started.end()


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


class Composition:
    """What `compose.yaml` starts, but for keylatch, on free ports of this host."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._patroni = program("patroni", "patroni")
        self.etcd, self.primary, self.pooled = free_port(), free_port(), free_port()
        self.ports = {name: (free_port(), free_port()) for name in NODES}  # PostgreSQL, REST API
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start_etcd(self) -> None:
        url = f"http://127.0.0.1:{self.etcd}"
        self._programs.start(
            *(program("etcd", "etcd-server"), "--data-dir", "etcd", "--name", "etcd"),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", f"http://127.0.0.1:{free_port()}"),
            log="etcd.log",
        )
        eventually(lambda: is_open(self.etcd))

    def configure(self, name: str, **more: str) -> tuple[Path, dict[str, str]]:
        """The file and the environment of a node."""
        newest = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        bin_dir = Path(require_program(str(newest[-1]) if newest else None, "postgresql")).parent
        script = self._programs.write(
            "create_database.sh", replaced("create_database.sh", {}), mode=0o755
        )
        postgresql, rest = self.ports[name]
        changes = {
            "0.0.0.0:8008": f"127.0.0.1:{rest}",
            "0.0.0.0:5432": f"127.0.0.1:{postgresql}",
            "etcd:2379": f"127.0.0.1:{self.etcd}",
            "/var/lib/postgresql/data/keylatch": self._programs.folder / name,
            "/usr/lib/postgresql/17/bin": bin_dir,
            "/tmp/pgpass": self._programs.folder / f"{name}.pgpass",
            "/etc/patroni/create_database.sh": script,
            "wal_log_hints": f"unix_socket_directories: {self._programs.folder}\n"
            "        wal_log_hints",
            "    ttl: 30": "    ttl: 20",
            "loop_wait: 10": "loop_wait: 2",
            "retry_timeout: 10": "retry_timeout: 5",
            **more,
        }
        environment = {
            "PATRONI_NAME": name,
            "PATRONI_RESTAPI_CONNECT_ADDRESS": f"127.0.0.1:{rest}",
            "PATRONI_POSTGRESQL_CONNECT_ADDRESS": f"127.0.0.1:{postgresql}",
            "PATRONI_SUPERUSER_USERNAME": "postgres",
            "PATRONI_SUPERUSER_PASSWORD": PASSWORDS["SUPERUSER"],
            "PATRONI_REPLICATION_USERNAME": "replicator",
            "PATRONI_REPLICATION_PASSWORD": PASSWORDS["REPLICATION"],
            "KEYLATCH_DB_PASSWORD": PASSWORDS["KEYLATCH_DB"],
        }
        return self._programs.write(f"{name}.yml", replaced("patroni.yml", changes)), environment

    def validate(self, name: str, **more: str) -> str:
        """What Patroni says of the node's file; nothing if it is valid."""
        path, environment = self.configure(name, **more)
        environment |= {
            "PATRONI_RESTAPI_CONNECT_ADDRESS": f"{name}:8008",  # as in compose.yaml
            "PATRONI_POSTGRESQL_CONNECT_ADDRESS": f"{name}:5432",
        }
        done = self._programs.run(self._patroni, "--validate-config", path, **environment)
        lines = (done.stdout + done.stderr).splitlines()
        return "\n".join(line for line in lines if not line.startswith(REQUIRED_BY_PATRONI_3))

    def start_node(self, name: str) -> None:
        path, environment = self.configure(name)
        self.daemons[name] = self._programs.start(
            self._patroni, path, log=f"{name}.log", **environment
        )

    def start_haproxy(self, port: int, **more: str) -> None:
        changes: dict[str, object] = {"bind :5000": f"bind 127.0.0.1:{port}", **more}
        for name, (postgresql, rest) in self.ports.items():
            changes[f"{name}:5432"] = f"127.0.0.1:{postgresql} port {rest}"
        path = self._programs.write(f"haproxy{port}.cfg", replaced("haproxy.cfg", changes))
        self._programs.start(program("haproxy", "haproxy"), "-f", path, "-db", log="haproxy.log")
        eventually(lambda: is_open(port))

    def start_pgbouncer(self) -> None:
        users = f'"keylatch" "{PASSWORDS["KEYLATCH_DB"]}"\n'
        changes = {
            "host=haproxy port=5000": f"host=127.0.0.1 port={self.primary}",
            "listen_port = 6432": f"listen_port = {self.pooled}",
            "listen_addr = *": "listen_addr = 127.0.0.1",
            "/run/pgbouncer/userlist.txt": self._programs.write("users", users),
        }
        path = self._programs.write("pgbouncer.ini", replaced("pgbouncer.ini", changes))
        self._programs.start(program("pgbouncer", "pgbouncer"), path, log="pgbouncer.log")
        eventually(lambda: is_open(self.pooled))

    def connect(self, port: int, user: str = "keylatch") -> "psycopg.Connection[Any]":
        password = PASSWORDS["KEYLATCH_DB" if user == "keylatch" else "SUPERUSER"]
        return psycopg.connect(
            host="127.0.0.1", port=port, user=user, password=password, dbname="keylatch",
            autocommit=True, connect_timeout=2, prepare_threshold=None,
        )  # fmt: skip

    def ask(self, port: int, question: str) -> str:
        """The answer, or nothing while there is no server to ask."""
        with contextlib.suppress(psycopg.Error), self.connect(port) as connection:
            row = connection.execute(question.encode()).fetchone()
            return str(row[0]) if row else ""
        return ""


def test_haproxy_takes_the_file(tmp_path: Path) -> None:
    """It knows each word of it, and says so of a misspelled one."""
    haproxy = program("haproxy", "haproxy")
    assert subprocess.run([haproxy, "-c", "-q", "-f", PATRONI / "haproxy.cfg"]).returncode == 0
    broken = tmp_path / "haproxy.cfg"
    broken.write_text(
        replaced("haproxy.cfg", {"shutdown-sessions resolvers": "shutdown resolvers"})
    )
    done = subprocess.run([haproxy, "-c", "-f", broken], capture_output=True, text=True)
    assert done.returncode != 0
    assert "shutdown" in done.stderr


@pytest.mark.long
def test_patroni_takes_the_file(programs: Programs) -> None:
    """By its own validation, which sees a word where a number has to be."""
    composition = Composition(programs)
    composition.start_etcd()
    assert composition.validate("patroni1") == ""
    broken = composition.validate("patroni1", **{"ttl: 20": "ttl: soon"})
    assert "bootstrap.dcs.ttl" in broken


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_files_run(programs: Programs) -> None:
    """Three nodes, one of them a synchronous standby; the database through HAProxy and PgBouncer. A
    primary whose Patroni is killed loses its sessions, and another node takes over."""
    composition = Composition(programs)
    composition.start_etcd()
    for name in NODES:
        composition.start_node(name)
    composition.start_haproxy(composition.primary)
    unfenced = free_port()
    composition.start_haproxy(unfenced, **{"on-marked-down shutdown-sessions": ""})
    composition.start_pgbouncer()
    names = "SELECT current_setting('synchronous_standby_names')"
    eventually(lambda: composition.ask(composition.primary, names) != "")
    assert composition.ask(composition.pooled, "SELECT current_user") == "keylatch"
    assert composition.ask(composition.primary, "SHOW max_connections") == "200"
    port = int(composition.ask(composition.primary, "SELECT inet_server_port()"))
    (old,) = (name for name, (its, _) in composition.ports.items() if its == port)
    with composition.connect(composition.primary) as held, composition.connect(unfenced) as kept:
        composition.daemons[old].kill()
        composition.daemons[old].wait()

        def is_closed() -> bool:
            try:
                held.execute("SELECT 1")
            except psycopg.OperationalError:
                return True
            return False

        eventually(is_closed, seconds=20)
        kept.execute(
            "SELECT 1"
        )  # the twin without shutdown-sessions leaves it with the old primary
    assert composition.ask(port, "SELECT pg_is_in_recovery()") == "False", "it lives on"
    eventually(
        lambda: (
            composition.ask(composition.primary, "SELECT inet_server_port()") not in ("", str(port))
        )
    )
    assert composition.ask(composition.pooled, "SELECT pg_is_in_recovery()") == "False"
