"""What `keylatch doctor` finds, on real servers, well and ill; and that it changes nothing."""

import json
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from keylatch_sidecar.operations.doctor import (
    connections,
    postgresql,
    redis,
    replication,
    tables,
)
from keylatch_sidecar.operations.doctor.finding import Status
from tests.support.command_line import Operator
from tests.support.poolers import PgBouncer
from tests.support.postgresql_cluster import Machines
from tests.support.servers import PostgresServer, RedisServer, eventually, free_port


class DoctorRun:
    """One examination: its exit code and what was found."""

    def __init__(self, operator: Operator, *words: str) -> None:
        outcome = operator.run("doctor", "--json", *words)
        self.code, self.text = outcome.exit_code, outcome.stdout
        report = json.loads(outcome.stdout)
        self.status = report["status"]
        self.findings = report["findings"]

    def status_of(self, check: str) -> str:
        """The status of a check that was made once."""
        [found] = [each for each in self.findings if each["check"] == check]
        return str(found["status"])

    def findings_of(self, check: str) -> str:
        """What was found of it, and what to do."""
        return " ".join(
            f"{each['message']} {each['hint']}" for each in self.findings if each["check"] == check
        )


# SQLite


def test_a_healthy_store_is_well(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is looked at, nothing has to be done, and the exit code says so."""
    monkeypatch.setattr("keylatch.storage.sqlite._FIRST_FIXED_SQLITE", (3, 0, 0))
    monkeypatch.setattr("keylatch_sidecar.operations.doctor.sqlite._SCARCE_BYTES", 1 << 20)
    operator.create()
    doctor_run = DoctorRun(operator)
    assert (doctor_run.code, doctor_run.status) == (0, "ok")
    checks = {each["check"] for each in doctor_run.findings}
    assert checks == {
        *("settings", "hashing", "folder", "disk", "SQLite"),
        *("permissions", "store", "tables", "secrets"),
    }


def test_looking_makes_nothing(operator: Operator) -> None:
    """Where there is no store, none is there afterwards."""
    doctor_run = DoctorRun(operator)
    assert doctor_run.status_of("store") == "warning"
    assert list(operator.folder.iterdir()) == []


def test_a_readable_store_file_is_reported(operator: Operator) -> None:
    """Permissions that are too wide are named with the command that mends them."""
    operator.create()
    operator.database.chmod(0o644)
    doctor_run = DoctorRun(operator)
    assert (doctor_run.code, doctor_run.status_of("permissions")) == (0, "warning")
    assert f"chmod 600 {operator.database}" in doctor_run.findings_of("permissions")
    operator.folder.chmod(0o777)
    assert DoctorRun(operator).status_of("folder") == "warning"


def test_what_lies_beside_the_file_is_looked_at(operator: Operator) -> None:
    """The log holds the same secrets, and who can hold the lock file keeps the log from ending."""
    operator.create()
    log, lock = (Path(f"{operator.database}{end}") for end in ("-wal", "-lock"))
    log.touch()
    log.chmod(0o604)
    lock.chmod(0o644)
    doctor_run = DoctorRun(operator)
    assert (doctor_run.code, doctor_run.status_of("permissions")) == (0, "warning")
    assert f"chmod 600 {log}" in doctor_run.findings_of("permissions")
    assert doctor_run.status_of("lock file") == "warning"
    assert str(lock) in doctor_run.findings_of("lock file")
    log.chmod(0o600)
    lock.chmod(0o600)
    well = DoctorRun(operator)
    assert well.status_of("permissions") == "ok"
    assert well.findings_of("lock file") == ""


def test_a_link_is_followed(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside the file is looked for where SQLite keeps it."""
    monkeypatch.setattr("keylatch_sidecar.operations.doctor.sqlite._LONG_LOG_BYTES", 1)
    operator.create()
    Path(f"{operator.database}-wal").write_bytes(b"long")
    link = operator.folder / "link.db"
    link.symlink_to(operator.database)
    doctor_run = DoctorRun(operator, "--store", f"sqlite:///{link}")
    assert doctor_run.status_of("log") == "warning"
    assert str(operator.database) in doctor_run.findings_of("store")


def test_a_second_name_fails(operator: Operator) -> None:
    """As it stops every start."""
    operator.create()
    (operator.folder / "other.db").hardlink_to(operator.database)
    doctor_run = DoctorRun(operator)
    assert (doctor_run.code, doctor_run.status_of("store")) == (2, "failure")
    assert "2 names" in doctor_run.findings_of("store")


@pytest.mark.parametrize(
    ("mount", "code", "check", "status"),
    [
        ("/dev/sdb1 {file} ext4 rw", 2, "store", "failure"),
        ("/dev/sdb1 {file}-wal ext4 rw", 2, "store", "failure"),
        ("bucket {folder} fuse.gcsfuse rw", 2, "store", "failure"),
        ("host {folder} virtiofs rw", 2, "store", "failure"),
        ("x {folder} fuse.of-tomorrow rw", 0, "file system", "warning"),
    ],
)
def test_places_where_sqlite_loses_changes(
    operator: Operator,
    monkeypatch: pytest.MonkeyPatch,
    *,
    mount: str,
    code: int,
    check: str,
    status: str,
) -> None:
    """Those that stop the start fail; an unknown file system is a warning."""
    operator.create()
    mounts = operator.folder / "mounts"
    mounts.write_text(mount.format(file=operator.database, folder=operator.folder))
    monkeypatch.setattr("keylatch.storage.mounts._MOUNT_TABLE", mounts)
    doctor_run = DoctorRun(operator)
    assert (doctor_run.code, doctor_run.status_of(check)) == (code, status)


def test_a_disk_that_is_full_fails(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key can be revoked any more."""
    operator.create()
    monkeypatch.setattr("keylatch_sidecar.operations.doctor.sqlite._NO_ROOM_BYTES", 1 << 60)
    doctor_run = DoctorRun(operator)
    assert (doctor_run.code, doctor_run.status_of("disk")) == (2, "failure")


def test_a_file_that_is_no_database_fails(operator: Operator) -> None:
    """It is named, and left as it is."""
    operator.database.write_text("my only copy of something else\n" * 100)
    doctor_run = DoctorRun(operator)
    assert (doctor_run.code, doctor_run.status_of("store")) == (2, "failure")
    assert operator.database.read_text().startswith("my only copy")


@pytest.mark.parametrize(
    ("change", "check", "status"),
    [
        ("UPDATE keylatch_version SET version_num = '9999'", "tables", "failure"),
        ("UPDATE keylatch_version SET version_num = '0003'", "tables", "warning"),
        ("DELETE FROM keylatch_secrets WHERE kind = 'pepper'", "secrets", "failure"),
        ("UPDATE keylatch_secrets SET enabled = 0", "secrets", "failure"),
        (
            "INSERT INTO keylatch_secrets (kind, value, status_since, enabled)"
            " VALUES ('mac', x'00', 0, 0)",
            *("secrets", "warning"),
        ),
    ],
)
def test_what_the_tables_tell(operator: Operator, change: str, check: str, status: str) -> None:
    """A store of another version, one without secrets, and a rotation that was not finished."""
    operator.create()
    with closing(sqlite3.connect(operator.database, isolation_level=None)) as raw:
        raw.execute(change)
    doctor_run = DoctorRun(operator)
    assert doctor_run.status_of(check) == status
    assert doctor_run.code == (2 if status == "failure" else 0)


def test_a_network_file_system_fails(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stops every start."""
    real = Path.read_text
    mounts = f"host:/x {operator.folder} nfs4 rw"
    monkeypatch.setattr(
        Path, "read_text", lambda path, **kw: mounts if "mounts" in str(path) else real(path, **kw)
    )
    doctor_run = DoctorRun(operator)
    assert (doctor_run.code, doctor_run.status_of("store")) == (2, "failure")


def test_a_pepper_file_is_reported(operator: Operator) -> None:
    """Whether there is one where there is Redis, and whether all may read it."""
    assert "pepper file" not in {each["check"] for each in DoctorRun(operator).findings}
    operator.set(REDIS="redis://127.0.0.1:1")
    assert DoctorRun(operator).findings_of("pepper file").startswith("none")
    file = operator.folder / "pepper"
    file.write_text("5e" * 32)
    file.chmod(0o600)
    operator.set(PEPPER_FILE=str(file))
    assert DoctorRun(operator).findings_of("pepper file").startswith("set")
    file.chmod(0o644)
    assert DoctorRun(operator).status_of("pepper file") == "warning"
    file.write_text("short")
    doctor_run = DoctorRun(operator)
    assert doctor_run.code == 2
    assert "fewer than 32 bytes" in str(doctor_run.findings)
    assert "short" not in str(doctor_run.findings)


def test_all_wrong_settings_are_reported(operator: Operator) -> None:
    """As findings, like everything else; what is misspelled as well."""
    operator.set(LEASE="soon", PREFIX="k_l", PROXY_CACHE_TTL="-1")
    doctor_run = DoctorRun(operator)
    assert doctor_run.code == 2
    assert [each["status"] for each in doctor_run.findings] == ["failure"] * 3
    operator.set(LEASE="1", PREFIX="kl", PROXY_CACHE_TTL="0", LEASES="3")
    doctor_run = DoctorRun(operator)
    assert doctor_run.code == 2, "it would stop any start"
    assert (
        doctor_run.findings_of("settings")
        == "KEYLATCH_LEASES: no such setting is KEYLATCH_LEASE meant?"
    )


def test_people_get_a_table(operator: Operator) -> None:
    """Each finding with its status, and hints where something has to be done."""
    output = operator.run("doctor", "--hasher", "argon2id").stdout
    assert "uncached keys per second" in output
    assert "hint: the first start creates it" in output


# Redis


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"maxmemory": "0"}, "warning"),
        ({"maxmemory": "64mb", "maxmemory-policy": "noeviction"}, "warning"),
        ({"maxmemory": "64mb", "maxmemory-policy": "volatile-lru"}, "ok"),
        ({"maxmemory": "64mb", "maxmemory-policy": "allkeys-lru"}, "ok"),
    ],
)
def test_redis_is_asked_what_it_does_when_it_is_full(
    operator: Operator, redis_server: RedisServer, settings: dict[str, str], status: str
) -> None:
    """Values of keylatch must be among those that may go."""
    with redis_server.client() as client:
        for name, value in settings.items():
            client.config_set(name, value)
    doctor_run = DoctorRun(operator, "--redis", redis_server.url)
    assert (doctor_run.code, doctor_run.status_of("Redis memory")) == (0, status)
    assert doctor_run.status_of("Redis") == "ok"
    assert "ms for a query" in doctor_run.findings_of("Redis latency")


def test_a_redis_that_takes_nothing_fails(operator: Operator, redis_server: RedisServer) -> None:
    """A replica, a wrong password, a paused one and none at all; the password is never printed."""
    with redis_server.client() as client:
        client.replicaof("127.0.0.1", "1")
        assert DoctorRun(operator, "--redis", redis_server.url).status_of("Redis role") == "failure"
        client.replicaof("NO", "ONE")
        client.config_set("requirepass", "right")
    operator.set(REDIS=redis_server.url.replace("//", "//:hunter2secret@"))
    refused = DoctorRun(operator)
    assert (refused.code, refused.status_of("Redis")) == (2, "failure")
    assert "password" in refused.findings_of("Redis")
    redis_server.pause()
    silent = DoctorRun(operator)
    assert (silent.code, silent.status_of("Redis")) == (2, "failure")
    redis_server.kill()
    gone = DoctorRun(operator)
    assert (gone.code, gone.status_of("Redis")) == (2, "failure")
    for doctor_run in (refused, silent, gone):
        assert "hunter2secret" not in doctor_run.text


# PostgreSQL


def test_a_server_is_examined(operator: Operator, postgres: PostgresServer) -> None:
    """The tests' server does without fsync, which is what fails; an empty database is no fault."""
    operator.set(STORE=postgres.new_database())
    empty = DoctorRun(operator)
    assert empty.status_of("tables") == "warning"
    operator.create()
    doctor_run = DoctorRun(operator, "--lease", "0.1")
    assert doctor_run.code == 2
    assert [each["check"] for each in doctor_run.findings if each["status"] == "failure"] == [
        "durability"
    ]
    assert "fsync is off" in doctor_run.findings_of("durability")
    assert {
        doctor_run.status_of(name) for name in ("primary", "clocks", "secrets", "processes")
    } == {"ok"}


def test_a_process_that_renews_no_lease_is_reported(
    operator: Operator, postgres: PostgresServer
) -> None:
    """It was killed, say; the next revoke will remove it."""
    url = postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    with psycopg.connect(url, autocommit=True) as raw:
        raw.execute("INSERT INTO keylatch_members VALUES ('killed', 7, 1, 0)")
    doctor_run = DoctorRun(operator, "--lease", "0.1")
    assert doctor_run.findings_of("processes").startswith("1 of 1 do not renew their lease")


def test_a_store_that_cannot_be_written_fails(operator: Operator, postgres: PostgresServer) -> None:
    """Read only by a setting, or by rights."""
    url = postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    with psycopg.connect(url, autocommit=True) as raw:
        raw.execute("CREATE ROLE reader LOGIN")
        raw.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
        raw.execute("ALTER ROLE reader SET default_transaction_read_only = on")
    doctor_run = DoctorRun(
        operator, "--store", url.replace("postgres@", "reader@"), "--lease", "0.1"
    )
    assert doctor_run.status_of("primary") == "failure"
    assert doctor_run.status_of("rights") == "failure"


def as_role(url: str, role: str, *grants: str) -> str:
    """The URL of a new role with these rights."""
    with psycopg.connect(url, autocommit=True) as raw:
        raw.execute(f"CREATE ROLE {role} LOGIN")
        for grant in grants:
            raw.execute(f"GRANT {grant} TO {role}".encode())
    return url.replace("postgres@", f"{role}@")


CHECKS = [
    "SELECT ON keylatch_meta, keylatch_organizations, keylatch_keys, keylatch_secrets,"
    " keylatch_invalidations, keylatch_version",
    "SELECT, INSERT, UPDATE, DELETE ON keylatch_members, keylatch_usage, keylatch_clients",
    "UPDATE (last_used, previous_last_used) ON keylatch_keys",
]
SEQUENCES = "USAGE ON SEQUENCE keylatch_audit_id_seq, keylatch_secrets_id_seq"
DML = "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public"


@pytest.mark.parametrize(
    ("role", "grants", "status", "message"),
    [
        ("checker", CHECKS, "ok", "can neither create nor change one"),
        ("uncounting", CHECKS[:1], "failure", "INSERT on keylatch_members"),
        ("manager", [DML, SEQUENCES], "ok", "check and change"),
        ("unnumbered", [DML], "warning", "USAGE on keylatch_audit_id_seq"),
    ],
)
def test_what_the_role_may_do_is_reported(
    operator: Operator,
    postgres: PostgresServer,
    *,
    role: str,
    grants: list[str],
    status: str,
    message: str,
) -> None:
    """A role that only checks is no fault; one that lacks a right is told which."""
    url = postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    operator.set(STORE=as_role(url, role, *grants))
    doctor_run = DoctorRun(operator, "--lease", "0.1")
    assert doctor_run.status_of("rights") == status
    assert message in doctor_run.findings_of("rights")


def test_rows_that_are_hidden_fail(operator: Operator, postgres: PostgresServer) -> None:
    """Row-level security makes valid keys unknown; it does not concern the tables' owner."""
    url = postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    other = as_role(url, "tenant", DML, "USAGE ON ALL SEQUENCES IN SCHEMA public")
    with psycopg.connect(url, autocommit=True) as raw:
        for table in ("keylatch_keys", "keylatch_version"):
            raw.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY".encode())
    assert DoctorRun(operator, "--lease", "0.1").findings_of("row-level security") == ""
    operator.set(STORE=other)
    doctor_run = DoctorRun(operator, "--lease", "0.1")
    assert (doctor_run.code, doctor_run.status_of("row-level security")) == (2, "failure")
    assert "ALTER TABLE keylatch_keys DISABLE" in doctor_run.findings_of("row-level security")


def test_another_isolation_is_no_fault(operator: Operator, postgres: PostgresServer) -> None:
    """It is named, because keylatch's transactions do not have it."""
    url = postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    with psycopg.connect(url, autocommit=True) as raw:
        database = url.rpartition("/")[2]
        raw.execute(
            f"ALTER DATABASE {database} SET default_transaction_isolation = 'serializable'".encode()
        )
    doctor_run = DoctorRun(operator, "--lease", "0.1")
    assert doctor_run.status_of("isolation") == "ok"
    assert doctor_run.findings_of("isolation").startswith("serializable")


def test_more_processes_than_the_server_takes(operator: Operator, postgres: PostgresServer) -> None:
    """The tests' server allows 397 connections; 70 processes may use 490."""
    url = postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    assert DoctorRun(operator, "--lease", "0.1").status_of("connections") == "ok"
    with psycopg.connect(url, autocommit=True) as raw:
        raw.execute(
            "INSERT INTO keylatch_members (id, grants, acked_seq, joined_at)"
            " SELECT number, 1, 1, 0 FROM generate_series(1, 70) AS number"
        )
    doctor_run = DoctorRun(operator, "--lease", "0.1")
    assert doctor_run.status_of("connections") == "warning"
    assert "70 processes x 7 = 490" in doctor_run.findings_of("connections")


def test_a_server_that_is_gone_fails(operator: Operator) -> None:
    """At once, without its password."""
    operator.set(STORE="postgresql://u:hunter2secret@127.0.0.1:1/keys")
    doctor_run = DoctorRun(operator)
    assert (doctor_run.code, doctor_run.status_of("store")) == (2, "failure")
    assert "hunter2secret" not in doctor_run.text


@pytest.fixture
def replica(postgres: PostgresServer, tmp_path: Path) -> Iterator[str]:
    """The URL of a hot standby of the tests' server, but for the database's name."""
    folder = postgres._folder / "standby"
    program = Path(postgres._postgres)
    port = free_port()
    postgres._run(
        [str(program.with_name("pg_basebackup")), "-h", "127.0.0.1", "-p", str(postgres.port)]
        + ["-U", "postgres", "-D", str(folder), "-R", "-X", "stream", "-c", "fast", "--no-sync"]
    )
    process = subprocess.Popen(
        [str(program), "-D", str(folder), "-p", str(port), "-k", str(postgres._folder)]
        + ["-c", "listen_addresses=127.0.0.1", "-c", "max_connections=400"],
        user=postgres._user,
        cwd=postgres._folder,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    eventually(answers)
    yield f"postgresql://postgres@127.0.0.1:{port}"
    process.send_signal(3)  # SIGQUIT: at once
    process.wait()
    shutil.rmtree(folder)


def test_a_replica_fails(
    operator: Operator, postgres: PostgresServer, request: pytest.FixtureRequest
) -> None:
    """A real hot standby: it answers every query and grants no lease."""
    url = postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    standby = request.getfixturevalue("replica") + "/" + url.rpartition("/")[2]
    doctor_run = DoctorRun(operator, "--store", standby, "--lease", "0.1")
    assert (doctor_run.code, doctor_run.status_of("primary")) == (2, "failure")
    assert "this is a replica" in doctor_run.findings_of("primary")


def test_the_other_two_urls_are_examined(
    operator: Operator, postgres: PostgresServer, request: pytest.FixtureRequest
) -> None:
    """The direct URL leads to the store itself, and the one for reading to a standby that has it;
    without that standby the primary answers, so it is a warning."""
    url, other = postgres.new_database(), postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    replica = request.getfixturevalue("replica")
    standby = f"{replica}/{url.rpartition('/')[2]}"

    def status(check: str, **urls: str) -> str:
        operator.set(**urls)
        return DoctorRun(operator, "--lease", "0.1").status_of(check)

    assert [status("direct", STORE_DIRECT=each) for each in (url, other, standby)] == [
        "ok",
        "failure",
        "failure",
    ]
    operator.set(STORE_DIRECT="")
    readable = (standby, url, f"{replica}/{other.rpartition('/')[2]}", f"{replica}/nothing")
    assert [status("standby", STORE_READ=each) for each in readable] == [
        "ok",
        "warning",
        "warning",
        "warning",
    ]


def test_standbys_that_are_not_synchronous_are_a_warning(
    operator: Operator, postgres: PostgresServer, request: pytest.FixtureRequest
) -> None:
    """A real standby, before and after its primary waits for it."""
    url = postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    request.getfixturevalue("replica")
    doctor_run = DoctorRun(operator, "--lease", "0.1")
    assert doctor_run.status_of("replication") == "warning"
    assert "synchronous_mode=true" in doctor_run.findings_of("replication")

    def waits() -> bool:
        return DoctorRun(operator, "--lease", "0.1").status_of("replication") == "ok"

    with psycopg.connect(url, autocommit=True) as raw:
        raw.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        raw.execute("SELECT pg_reload_conf()")
        try:
            eventually(
                lambda: DoctorRun(operator, "--lease", "0.1").status_of("replication") == "ok"
            )
        finally:
            raw.execute("ALTER SYSTEM RESET synchronous_standby_names")
            raw.execute("SELECT pg_reload_conf()")


@pytest.fixture
def machines() -> Iterator[Machines]:
    with Machines() as machines:
        yield machines


@pytest.mark.long
@pytest.mark.parametrize(("mode", "status"), [("session", "ok"), ("transaction", "failure")])
def test_a_pooler_is_found(
    operator: Operator, machines: Machines, *, mode: str, status: str
) -> None:
    """A real PgBouncer, and which mode it is in; with a direct URL both modes will do."""
    node = machines.primary()
    operator.set(STORE=node.url)
    operator.create()
    assert DoctorRun(operator, "--lease", "0.1").findings_of("pooler") == ""
    pooler = machines.add(PgBouncer(node, mode))
    operator.set(STORE=pooler.url)
    doctor_run = DoctorRun(operator, "--lease", "0.1")
    assert doctor_run.status_of("pooler") == status
    assert doctor_run.findings_of("pooler").startswith(f"{mode} mode")
    assert doctor_run.status_of("rights") == "ok"
    operator.set(STORE_DIRECT=node.url)
    assert DoctorRun(operator, "--lease", "0.1").status_of("pooler") == "ok"
    operator.set(STORE_DIRECT="postgresql://postgres@127.0.0.1:1/keys")
    assert "KEYLATCH_STORE_DIRECT: " in DoctorRun(operator, "--lease", "0.1").findings_of("pooler")


# What cannot be had from a server in a test


def statuses(findings: Any) -> dict[str, Status]:
    return {finding.check: finding.status for finding in findings}


def test_answers_that_no_test_server_gives() -> None:
    """A cluster, a full cache, few places, a far server without encryption."""
    full = {"maxmemory": 100, "used_memory": 95, "maxmemory_policy": "volatile-ttl"}
    assert statuses(redis._check_server("Redis", {**full, "cluster_enabled": 1}, False)) == {
        "Redis": Status.OK,
        "Redis role": Status.FAILURE,
        "Redis memory": Status.WARNING,
    }
    assert statuses(redis._check_server("Redis", {}, False))["Redis"] is Status.WARNING
    assert statuses(redis._check_latency([0.001, 0.06]))["Redis latency"] is Status.WARNING
    assert statuses(redis._check_latency([0.006] * 3))["Redis latency"] is Status.WARNING
    many = [("mac", True)] * 7 + [("pepper", True)] * 7
    assert statuses(tables.check_secrets(many)) == {"secrets": Status.WARNING}
    server = postgresql._Server(
        "17.1",
        "PostgreSQL 17.1 on x86_64",
        False,
        "off",
        "read committed",
        "on",
        "on",
        "0",
        False,
        "10.0.0.7",
    )
    found = {"store": Status.OK, "primary": Status.OK, "durability": Status.OK}
    far = {**found, "encryption": Status.WARNING}
    assert statuses(postgresql._check_server(server)) == far
    for other in (server._replace(client_check=None), server._replace(build="msvc-19.44, 64-bit")):
        found = statuses(postgresql._check_server(other._replace(is_encrypted=True)))
        assert found["lost clients"] is Status.WARNING


@pytest.mark.parametrize(
    ("names", "standbys", "must_replicate", "status", "message"),
    [
        ("", 0, False, Status.OK, "no standby"),
        ("", 2, False, Status.WARNING, "no standby is synchronous (2 "),
        ("", 1, False, Status.WARNING, "no standby is synchronous (1 "),
        ("", 2, True, Status.FAILURE, "answers every check with 503"),
        ("", 0, True, Status.FAILURE, "answers every check with 503"),
        ("ANY 1 (*)", 0, False, Status.FAILURE, "no lease is granted"),
        ("ANY 1 (*)", 1, True, Status.OK, "wait for a synchronous standby"),
        ("db2", 2, True, Status.OK, "wait for a synchronous standby"),
        ("2 (db2, db3)", 2, True, Status.OK, "wait for a synchronous standby"),
        ("FIRST 2 (*)", 2, True, Status.OK, "wait for a synchronous standby"),
        ("db2, db3", 2, True, Status.WARNING, "keep the old primary going"),
        ('ANY 1 (db2,"db 3")', 1, True, Status.WARNING, "keep the old primary going"),
        ("*", 2, True, Status.WARNING, "keep the old primary going"),
    ],
)
def test_what_a_failover_can_lose(
    names: str, standbys: int, *, must_replicate: bool, status: Status, message: str
) -> None:
    """Nothing, answered revocations, or the service itself; the hint has the lines to type."""
    [found] = replication.check_replication(names, standbys, must_replicate=must_replicate)
    assert found.status is status
    assert message in found.message
    if standbys and not names:
        assert "synchronous_mode=true" in found.hint
        value = "ANY 1 (*)" if standbys == 1 else "FIRST 1 (NAME"
        assert f"ALTER SYSTEM SET synchronous_standby_names = '{value}" in found.hint


@pytest.mark.parametrize(
    ("allowed", "in_use", "of_keylatch", "processes", "status"),
    [
        (97, 40, 20, 11, Status.OK),
        (97, 40, 20, 12, Status.WARNING),  # 84 + 20
        (97, 3, 3, 13, Status.OK),
        (97, 80, 3, 1, Status.WARNING),  # 17 are free
    ],
)
def test_the_budget_of_connections_is_multiplied(
    allowed: int, in_use: int, of_keylatch: int, processes: int, status: Status
) -> None:
    """Seven for each process, beside what other programs have; and some are free."""
    found = connections.check_connections(allowed, in_use, of_keylatch, processes)
    assert found.status is status


def test_a_pooler_is_judged_by_its_mode() -> None:
    """Session mode needs a pool for all processes; transaction mode, another URL for leases."""
    assert list(connections.check_pooler(None, None, 3)) == []
    [session] = connections.check_pooler("session", "session", 3)
    assert session.status is Status.OK
    assert "a pool of 21 or more" in session.message
    [transaction] = connections.check_pooler("transaction", "transaction", 3)
    assert transaction.status is Status.FAILURE
    assert "KEYLATCH_STORE_DIRECT" in transaction.hint
    [direct] = connections.check_pooler("transaction", None, 3)
    assert direct.status is Status.OK


@pytest.mark.anyio
async def test_a_clock_that_is_ahead_is_reported() -> None:
    """By more than the query can have taken."""

    async def fetch(question: str) -> list[tuple[float]]:
        return [(time.time() + 90,)]

    found = await postgresql._check_clock(fetch)
    assert statuses(found)["clocks"] is Status.WARNING
    assert "90.0 s apart" in found[-1].message
