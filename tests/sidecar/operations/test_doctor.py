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

from keylatch_sidecar.operations.doctor import postgresql, redis, tables
from keylatch_sidecar.operations.doctor.finding import Status
from tests.support.command_line import Operator
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
    findings = postgresql._check_server(
        "17.1", False, "off", "on", "on", "on", 100, 90, False, "10.0.0.7"
    )
    assert statuses(findings) == {
        "store": Status.OK,
        "primary": Status.OK,
        "durability": Status.OK,
        "connections": Status.WARNING,
        "encryption": Status.WARNING,
    }


@pytest.mark.anyio
async def test_a_clock_that_is_ahead_is_reported() -> None:
    """By more than the query can have taken."""

    async def fetch(question: str) -> list[tuple[float]]:
        return [(time.time() + 90,)]

    found = await postgresql._check_clock(fetch)
    assert statuses(found)["clocks"] is Status.WARNING
    assert "90.0 s apart" in found[-1].message
