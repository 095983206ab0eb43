"""The files of `deploy/patroni` and `deploy/cloudnativepg`.

Those of Patroni run in the real programs, with other addresses and folders; what Kubernetes gets is
checked against what can be known without a cluster.
"""

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from compose_spec import PyCompose

from tests.support import manifests
from tests.support.command_line import Operator
from tests.support.manifests import documents, of_kind
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

    def settings(self) -> dict[str, str]:
        """Those of the sidecar in compose.yaml."""
        changes = {
            "secret": quote(PASSWORDS["KEYLATCH_DB"]),
            "pgbouncer:6432": f"127.0.0.1:{self.pooled}",
            "haproxy:5000": f"127.0.0.1:{self.primary}",
        }
        settings = {}
        for name, value in environment_of("keylatch").items():
            for old, new in changes.items():
                value = value.replace(old, new)
            settings[name.removeprefix("KEYLATCH_")] = value
        return settings

    def query(self, port: int, statement: str) -> str:
        """The first value of the first row, or nothing while no server answers."""
        with contextlib.suppress(psycopg.Error), self.connect(port) as connection:
            row = connection.execute(statement.encode()).fetchone()
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
def test_the_files_run(programs: Programs, operator: Operator) -> None:
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
    eventually(lambda: composition.query(composition.primary, names) != "")
    assert composition.query(composition.pooled, "SELECT current_user") == "keylatch"
    assert composition.query(composition.primary, "SHOW max_connections") == "200"
    operator.set(**composition.settings())
    operator.create()
    report = json.loads(operator.run("doctor", "--json").stdout)
    found = {each["check"]: each["status"] for each in report["findings"]}
    assert {found[check] for check in ("pooler", "replication", "rights", "primary")} == {"ok"}
    port = int(composition.query(composition.primary, "SELECT inet_server_port()"))
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
        kept.execute("SELECT 1")  # the twin without the fence stays with the old primary
    assert composition.query(port, "SELECT pg_is_in_recovery()") == "False", "it lives on"

    def has_taken_over() -> bool:
        """Patroni calls a node the primary some moments before it has left recovery."""
        now = composition.query(composition.pooled, "SELECT inet_server_port()")
        is_standby = composition.query(composition.pooled, "SELECT pg_is_in_recovery()")
        return now not in ("", str(port)) and is_standby == "False"

    eventually(has_taken_over)
    # KEYLATCH_DURABLE=replicated: refused until Patroni has made the other standby synchronous.
    eventually(lambda: operator.run("keys", "create", "--name", "a key").exit_code == 0)


# compose.yaml

(COMPOSE,) = documents("patroni/compose.yaml")
SERVICES = COMPOSE["services"]


def environment_of(service: str) -> dict[str, str]:
    """Its variables, with a password in them."""
    return {
        name: re.sub(r"\$\{.*?\}", "secret", value)
        for name, value in SERVICES[service]["environment"].items()
    }


def test_the_composition_is_one() -> None:
    """By the specification; what it names is there, and each service is hardened."""
    PyCompose.from_json(json.dumps(COMPOSE)).validate()
    for name, service in SERVICES.items():
        assert manifests.flaws_of_service(service) == [], name
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert re.fullmatch(r"keylatch|.+:v?[\d.]+", service["image"]), "a tag, and not the latest"
        for volume in service.get("volumes", []):
            source, _, target = volume.partition(":")
            assert source in COMPOSE["volumes"] or (PATRONI / source).exists()
            assert source in COMPOSE["volumes"] or target.endswith(":ro")
        if "build" in service:
            context = PATRONI / service["build"]["context"]
            assert (context / service["build"].get("dockerfile", "Dockerfile")).exists()
    assert [name for name, each in SERVICES.items() if "ports" in each] == ["keylatch"]
    assert COMPOSE["networks"]["back"] == {"internal": True}
    secrets = {"DB_PASSWORD", "SUPERUSER_PASSWORD", "REPLICATION_PASSWORD"}
    text = (PATRONI / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?", text)) == secrets
    assert set(re.findall(r"\$\{(\w+)", text)) - {"name"} == secrets, "`name` is the shell's"
    names = re.findall(r"for name in ([A-Z ]+);", text)[0].split()
    assert {f"{name}_PASSWORD" for name in names} == secrets, "the line at its head"


def test_the_nodes_differ_in_their_names_alone() -> None:
    """As Patroni, HAProxy and the volumes know them."""
    known = re.findall(r"^    server (\w+) (\w+):5432", (PATRONI / "haproxy.cfg").read_text(), re.M)
    assert known == [(name, name) for name in NODES]
    shapes = {json.dumps(SERVICES[name], sort_keys=True).replace(name, "NODE") for name in NODES}
    assert len(shapes) == 1


def test_the_sidecar_has_both_ways_to_the_primary() -> None:
    """Look-ups through the pooler, leases around it, and no lease from a lone primary."""
    environment = environment_of("keylatch")
    assert manifests.settings_mistakes(environment) == []
    assert environment["KEYLATCH_STORE"].endswith("@pgbouncer:6432/keylatch")
    assert environment["KEYLATCH_STORE_DIRECT"].endswith("@haproxy:5000/keylatch")
    assert environment["KEYLATCH_DURABLE"] == "replicated"
    options = manifests.options_of(SERVICES["keylatch"]["command"])
    assert (options["host"], options["port"]) == ("0.0.0.0", 8700)
    assert any(str(options["admin_uds"].parent) in each for each in SERVICES["keylatch"]["tmpfs"])
    (node,) = documents("patroni/patroni.yml")
    assert node["bootstrap"]["dcs"]["synchronous_mode"] is True
    pool = int(
        re.findall(r"^default_pool_size = (\d+)", (PATRONI / "pgbouncer.ini").read_text(), re.M)[0]
    )
    allowed = node["bootstrap"]["dcs"]["postgresql"]["parameters"]["max_connections"]
    assert pool + 3 * 30 + 10 <= allowed, "the sum in patroni.yml"


# Kubernetes

CLUSTER = {
    *("instances", "imageName", "postgresql", "bootstrap", "storage", "affinity"),
    *("smartShutdownTimeout", "resources"),
}
SYNCHRONOUS = {"method", "number", "dataDurability", "failoverQuorum"}
POOLER = {"cluster", "instances", "type", "pgbouncer"}
"""Fields of CloudNativePG 1.28 (`kubectl explain cluster.spec`); its schema is not here."""


def test_the_cluster_waits_for_a_standby() -> None:
    """With documented fields only: an unknown one would be dropped without a word."""
    (cluster,) = documents("cloudnativepg/cluster.yaml")
    (pooler,) = documents("cloudnativepg/pooler.yaml")
    assert {cluster["apiVersion"], pooler["apiVersion"]} == {"postgresql.cnpg.io/v1"}
    assert set(cluster["spec"]) <= CLUSTER
    assert set(pooler["spec"]) == POOLER
    assert set(pooler["spec"]["pgbouncer"]) == {"poolMode", "parameters"}
    synchronous = cluster["spec"]["postgresql"]["synchronous"]
    assert set(synchronous) == SYNCHRONOUS
    assert synchronous["dataDurability"] == "required"
    assert 0 < synchronous["number"] < cluster["spec"]["instances"]
    parameters = {
        **cluster["spec"]["postgresql"]["parameters"],
        **pooler["spec"]["pgbouncer"]["parameters"],
    }
    assert all(isinstance(value, str) for value in parameters.values()), "the operator's type"
    pool = pooler["spec"]["instances"] * int(parameters["default_pool_size"])
    assert pool + 3 * 30 + 10 <= int(parameters["max_connections"]), "the sum in cluster.yaml"
    assert pooler["spec"]["cluster"]["name"] == cluster["metadata"]["name"]


def test_the_sidecar_uses_the_cluster() -> None:
    """Its secret, its Services, and otherwise the Deployment of deploy/kubernetes."""
    (ours,) = documents("cloudnativepg/keylatch.yaml")
    (other,) = of_kind(documents("kubernetes/keylatch.yaml"), "Deployment")
    pod = ours["spec"]["template"]["spec"]
    assert manifests.flaws_of_pod(pod) == []
    (container,) = pod["containers"]
    (cluster,) = documents("cloudnativepg/cluster.yaml")
    (pooler,) = documents("cloudnativepg/pooler.yaml")
    password, *settings = container["env"]
    assert password["valueFrom"]["secretKeyRef"] == {
        "name": f"{cluster['metadata']['name']}-app",
        "key": "password",
    }
    values = {each["name"]: each["value"].replace("$(DB_PASSWORD)", "x") for each in settings}
    assert manifests.settings_mistakes(values) == []
    assert f"@{pooler['metadata']['name']}/" in values["KEYLATCH_STORE"]
    assert f"@{cluster['metadata']['name']}-rw/" in values["KEYLATCH_STORE_DIRECT"]
    assert values["KEYLATCH_DURABLE"] == "replicated"
    container["env"] = other["spec"]["template"]["spec"]["containers"][0]["env"]
    assert ours == other
