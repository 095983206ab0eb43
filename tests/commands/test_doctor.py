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

from keylatch_sidecar.doctor import cache, server, tables
from keylatch_sidecar.doctor.finding import Grade
from servers import PostgresServer, RedisServer, eventually, free_port
from shell import Operator


class Visit:
    """One examination: its exit code and what was found."""

    def __init__(self, operator: Operator, *words: str) -> None:
        outcome = operator.run("doctor", "--json", *words)
        self.code, self.text = outcome.code, outcome.out
        told = json.loads(outcome.out)
        self.grade = told["grade"]
        self.findings = told["findings"]

    def grade_of(self, check: str) -> str:
        """The grade of a check that was made once."""
        [found] = [each for each in self.findings if each["check"] == check]
        return str(found["grade"])

    def named(self, check: str) -> str:
        """What was found of it, and what to do."""
        return " ".join(
            f"{each['says']} {each['hint']}" for each in self.findings if each["check"] == check
        )


# SQLite


def test_a_healthy_store_is_well(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is looked at, nothing has to be done, and the exit code says so."""
    monkeypatch.setattr("keylatch.sql.sqlite._FIRST_SOUND_SQLITE", (3, 0, 0))
    monkeypatch.setattr("keylatch_sidecar.doctor.file._SCARCE_BYTES", 1 << 20)
    operator.create()
    visit = Visit(operator)
    assert (visit.code, visit.grade) == (0, "ok")
    checks = {each["check"] for each in visit.findings}
    assert checks == {
        *("settings", "hashing", "folder", "disk", "SQLite"),
        *("permissions", "store", "tables", "secrets"),
    }


def test_looking_makes_nothing(operator: Operator) -> None:
    """Where there is no store, none is there afterwards."""
    visit = Visit(operator)
    assert visit.grade_of("store") == "warning"
    assert list(operator.folder.iterdir()) == []


def test_whoever_may_read_the_file_reads_the_secrets(operator: Operator) -> None:
    """Permissions that are too wide are named with the command that mends them."""
    operator.create()
    operator.database.chmod(0o644)
    visit = Visit(operator)
    assert (visit.code, visit.grade_of("permissions")) == (0, "warning")
    assert f"chmod 600 {operator.database}" in visit.named("permissions")
    operator.folder.chmod(0o777)
    assert Visit(operator).grade_of("folder") == "warning"


def test_what_lies_beside_the_file_is_looked_at(operator: Operator) -> None:
    """The log holds the same secrets, and who can hold the lock file keeps the log from ending."""
    operator.create()
    log, lock = (Path(f"{operator.database}{end}") for end in ("-wal", "-owner"))
    log.touch()
    log.chmod(0o604)
    lock.chmod(0o644)
    visit = Visit(operator)
    assert (visit.code, visit.grade_of("permissions")) == (0, "warning")
    assert f"chmod 600 {log}" in visit.named("permissions")
    assert visit.grade_of("lock file") == "warning"
    assert str(lock) in visit.named("lock file")
    log.chmod(0o600)
    lock.chmod(0o600)
    well = Visit(operator)
    assert well.grade_of("permissions") == "ok"
    assert well.named("lock file") == ""


def test_a_link_is_followed(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside the file is looked for where SQLite keeps it."""
    monkeypatch.setattr("keylatch_sidecar.doctor.file._LONG_LOG_BYTES", 1)
    operator.create()
    Path(f"{operator.database}-wal").write_bytes(b"long")
    link = operator.folder / "link.db"
    link.symlink_to(operator.database)
    visit = Visit(operator, "--store", f"sqlite:///{link}")
    assert visit.grade_of("log") == "warning"
    assert str(operator.database) in visit.named("store")


def test_a_second_name_fails(operator: Operator) -> None:
    """As it stops every start."""
    operator.create()
    (operator.folder / "other.db").hardlink_to(operator.database)
    visit = Visit(operator)
    assert (visit.code, visit.grade_of("store")) == (2, "failure")
    assert "2 names" in visit.named("store")


@pytest.mark.parametrize(
    ("mount", "code", "check", "grade"),
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
    grade: str,
) -> None:
    """Those that stop the start fail; an unknown file system is a warning."""
    operator.create()
    mounts = operator.folder / "mounts"
    mounts.write_text(mount.format(file=operator.database, folder=operator.folder))
    monkeypatch.setattr("keylatch.sql.mounts._MOUNTS", mounts)
    visit = Visit(operator)
    assert (visit.code, visit.grade_of(check)) == (code, grade)


def test_a_disk_that_is_full_fails(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key can be revoked any more."""
    operator.create()
    monkeypatch.setattr("keylatch_sidecar.doctor.file._NO_ROOM_BYTES", 1 << 60)
    visit = Visit(operator)
    assert (visit.code, visit.grade_of("disk")) == (2, "failure")


def test_a_file_that_is_no_database_fails(operator: Operator) -> None:
    """It is named, and left as it is."""
    operator.database.write_text("my only copy of something else\n" * 100)
    visit = Visit(operator)
    assert (visit.code, visit.grade_of("store")) == (2, "failure")
    assert operator.database.read_text().startswith("my only copy")


@pytest.mark.parametrize(
    ("change", "check", "grade"),
    [
        ("UPDATE keylatch_version SET version_num = '9999'", "tables", "failure"),
        ("UPDATE keylatch_version SET version_num = '0003'", "tables", "warning"),
        ("DELETE FROM keylatch_secrets WHERE kind = 'pepper'", "secrets", "failure"),
        ("UPDATE keylatch_secrets SET makes = 0", "secrets", "failure"),
        (
            "INSERT INTO keylatch_secrets (kind, value, created_at, makes)"
            " VALUES ('check', x'00', 0, 0)",
            *("secrets", "warning"),
        ),
    ],
)
def test_what_the_tables_tell(operator: Operator, change: str, check: str, grade: str) -> None:
    """A store of another version, one without secrets, and a rotation that was not finished."""
    operator.create()
    with closing(sqlite3.connect(operator.database, isolation_level=None)) as raw:
        raw.execute(change)
    visit = Visit(operator)
    assert visit.grade_of(check) == grade
    assert visit.code == (2 if grade == "failure" else 0)


def test_a_network_file_system_fails(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stops every start."""
    real = Path.read_text
    mounts = f"host:/x {operator.folder} nfs4 rw"
    monkeypatch.setattr(
        Path, "read_text", lambda path, **kw: mounts if "mounts" in str(path) else real(path, **kw)
    )
    visit = Visit(operator)
    assert (visit.code, visit.grade_of("store")) == (2, "failure")


def test_a_pepper_file_is_told(operator: Operator) -> None:
    """Whether there is one where there is Redis, and whether all may read it."""
    assert "pepper file" not in {each["check"] for each in Visit(operator).findings}
    operator.set(REDIS="redis://127.0.0.1:1")
    assert Visit(operator).named("pepper file").startswith("none")
    file = operator.folder / "pepper"
    file.write_text("5e" * 32)
    file.chmod(0o600)
    operator.set(PEPPER_FILE=str(file))
    assert Visit(operator).named("pepper file").startswith("set")
    file.chmod(0o644)
    assert Visit(operator).grade_of("pepper file") == "warning"
    file.write_text("short")
    visit = Visit(operator)
    assert visit.code == 2
    assert "fewer than 32 bytes" in str(visit.findings)
    assert "short" not in str(visit.findings)


def test_wrong_settings_are_all_told(operator: Operator) -> None:
    """As findings, like everything else; what is misspelled as well."""
    operator.set(LEASE="soon", PREFIX="k_l", PROXY_CACHE_TTL="-1")
    visit = Visit(operator)
    assert visit.code == 2
    assert [each["grade"] for each in visit.findings] == ["failure"] * 3
    operator.set(LEASE="1", PREFIX="kl", PROXY_CACHE_TTL="0", LEASES="3")
    visit = Visit(operator)
    assert visit.code == 2, "it would stop any start"
    assert visit.named("settings") == "KEYLATCH_LEASES: no such setting is KEYLATCH_LEASE meant?"


def test_people_get_a_table(operator: Operator) -> None:
    """Each finding with its grade, and hints where something has to be done."""
    told = operator.run("doctor", "--hasher", "argon2id").out
    assert "cold keys a second" in told
    assert "hint: the first start makes it" in told


# Redis


@pytest.mark.parametrize(
    ("settings", "grade"),
    [
        ({"maxmemory": "0"}, "warning"),
        ({"maxmemory": "64mb", "maxmemory-policy": "noeviction"}, "warning"),
        ({"maxmemory": "64mb", "maxmemory-policy": "volatile-lru"}, "ok"),
        ({"maxmemory": "64mb", "maxmemory-policy": "allkeys-lru"}, "ok"),
    ],
)
def test_redis_is_asked_what_it_does_when_it_is_full(
    operator: Operator, redis_server: RedisServer, settings: dict[str, str], grade: str
) -> None:
    """Values of keylatch must be among those that may go."""
    with redis_server.client() as client:
        for name, value in settings.items():
            client.config_set(name, value)
    visit = Visit(operator, "--redis", redis_server.url)
    assert (visit.code, visit.grade_of("Redis memory")) == (0, grade)
    assert visit.grade_of("Redis") == "ok"
    assert "ms for a question" in visit.named("Redis latency")


def test_a_redis_that_takes_nothing_fails(operator: Operator, redis_server: RedisServer) -> None:
    """A replica, a wrong password, a paused one and none at all; the password is never told."""
    with redis_server.client() as client:
        client.replicaof("127.0.0.1", "1")
        assert Visit(operator, "--redis", redis_server.url).grade_of("Redis role") == "failure"
        client.replicaof("NO", "ONE")
        client.config_set("requirepass", "right")
    operator.set(REDIS=redis_server.url.replace("//", "//:hunter2secret@"))
    refused = Visit(operator)
    assert (refused.code, refused.grade_of("Redis")) == (2, "failure")
    assert "password" in refused.named("Redis")
    redis_server.pause()
    silent = Visit(operator)
    assert (silent.code, silent.grade_of("Redis")) == (2, "failure")
    redis_server.kill()
    gone = Visit(operator)
    assert (gone.code, gone.grade_of("Redis")) == (2, "failure")
    for visit in (refused, silent, gone):
        assert "hunter2secret" not in visit.text


# PostgreSQL


def test_a_server_is_examined(operator: Operator, postgres: PostgresServer) -> None:
    """The tests' server does without fsync, which is what fails; an empty database is no fault."""
    operator.set(STORE=postgres.new_database())
    empty = Visit(operator)
    assert empty.grade_of("tables") == "warning"
    operator.create()
    visit = Visit(operator, "--lease", "0.1")
    assert visit.code == 2
    assert [each["check"] for each in visit.findings if each["grade"] == "failure"] == [
        "durability"
    ]
    assert "fsync is off" in visit.named("durability")
    assert {visit.grade_of(name) for name in ("primary", "clocks", "secrets", "processes")} == {
        "ok"
    }


def test_a_process_that_renews_no_lease_is_told(
    operator: Operator, postgres: PostgresServer
) -> None:
    """It was killed, say; the next revoke will remove it."""
    url = postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    with psycopg.connect(url, autocommit=True) as raw:
        raw.execute("INSERT INTO keylatch_members VALUES ('killed', 7, 1, 0)")
    visit = Visit(operator, "--lease", "0.1")
    assert visit.named("processes").startswith("1 of 1 renew no lease")


def test_a_store_that_cannot_be_written_fails(operator: Operator, postgres: PostgresServer) -> None:
    """Read only by a setting, or by rights."""
    url = postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    with psycopg.connect(url, autocommit=True) as raw:
        raw.execute("CREATE ROLE reader LOGIN")
        raw.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
        raw.execute("ALTER ROLE reader SET default_transaction_read_only = on")
    visit = Visit(operator, "--store", url.replace("postgres@", "reader@"), "--lease", "0.1")
    assert visit.grade_of("primary") == "failure"
    assert visit.grade_of("rights") == "failure"


def test_a_server_that_is_gone_fails(operator: Operator) -> None:
    """In a moment, without its password."""
    operator.set(STORE="postgresql://u:hunter2secret@127.0.0.1:1/keys")
    visit = Visit(operator)
    assert (visit.code, visit.grade_of("store")) == (2, "failure")
    assert "hunter2secret" not in visit.text


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
    """A real hot standby: it answers every question and grants no lease."""
    url = postgres.new_database()
    operator.set(STORE=url)
    operator.create()
    standby = request.getfixturevalue("replica") + "/" + url.rpartition("/")[2]
    visit = Visit(operator, "--store", standby, "--lease", "0.1")
    assert (visit.code, visit.grade_of("primary")) == (2, "failure")
    assert "this is a replica" in visit.named("primary")


# What cannot be had from a server in a test


def graded(findings: Any) -> dict[str, Grade]:
    return {finding.check: finding.grade for finding in findings}


def test_answers_that_no_test_server_gives() -> None:
    """A cluster, a full cache, few places, a far server without encryption."""
    full = {"maxmemory": 100, "used_memory": 95, "maxmemory_policy": "volatile-ttl"}
    assert graded(cache._of_server({**full, "cluster_enabled": 1})) == {
        "Redis": Grade.OK,
        "Redis role": Grade.WARNING,
        "Redis memory": Grade.WARNING,
    }
    assert graded(cache._of_server({}))["Redis"] is Grade.WARNING
    assert graded(cache._of_latency([0.001, 0.06]))["Redis latency"] is Grade.WARNING
    assert graded(cache._of_latency([0.006] * 3))["Redis latency"] is Grade.WARNING
    many = [("check", True)] * 7 + [("pepper", True)] * 7
    assert graded(tables.of_secrets(many)) == {"secrets": Grade.WARNING}
    told = server._of_server("17.1", False, "off", "on", "on", "on", 100, 90, False, "10.0.0.7")
    assert graded(told) == {
        "store": Grade.OK,
        "primary": Grade.OK,
        "durability": Grade.OK,
        "connections": Grade.WARNING,
        "encryption": Grade.WARNING,
    }


@pytest.mark.anyio
async def test_a_clock_that_is_ahead_is_told() -> None:
    """By more than the question can have taken."""

    async def ask(question: str) -> list[tuple[float]]:
        return [(time.time() + 90,)]

    found = await server._of_clock(ask)
    assert graded(found)["clocks"] is Grade.WARNING
    assert "90.0 s apart" in found[-1].says
