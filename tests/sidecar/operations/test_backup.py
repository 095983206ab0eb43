"""Backup and restore: what comes back, what must not, and what is reported."""

import asyncio
import json
import logging
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from keylatch.core.decisions import Allow
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.settings import Settings
from tests.support.command_line import Operator
from tests.support.servers import PostgresServer, eventually


class Running:
    """A process that goes on checking keys on the operator's store."""

    def __init__(self, url: str) -> None:
        self._runner = asyncio.Runner()
        self.engine = Engine(Settings.load(store=url, redis="", hasher="sha256"))
        self._runner.run(self.engine.start())

    def check(self, key: dict[str, Any]) -> str:
        """`ALLOWED`, or why not."""
        token = Token(key["token"])
        decision = self._runner.run(
            self.engine.authenticate([b"Bearer " + token.reveal().encode()])
        )
        return "ALLOWED" if isinstance(decision, Allow) else decision.reason.name

    def change(self, key: dict[str, Any], **values: Any) -> None:
        async def change() -> None:
            await (await self.engine.keyring()).change("default", key["id"], **values)

        self._runner.run(change())

    def meanwhile(self, work: Callable[[], object]) -> None:
        """Call in the background, again and again, until the end of the block."""
        self._runner.run(asyncio.to_thread(work))

    def has_said(self, words: str, log: pytest.LogCaptureFixture) -> bool:
        """Whether its background tasks, which run on for a short time, have logged that."""
        self._runner.run(asyncio.sleep(0.02))
        return words in log.text

    def end(self) -> None:
        self._runner.run(self.engine.stop())
        self._runner.close()


@pytest.fixture
def running(operator: Operator) -> Iterator[Callable[[], Running]]:
    """Begins processes that end with the test."""
    begun: list[Running] = []

    def begin(url: str = f"sqlite:///{operator.database}") -> Running:
        begun.append(Running(url))
        return begun[-1]

    yield begin
    for each in begun:
        each.end()


def test_a_backup_is_whole_and_a_copied_file_is_not(operator: Operator) -> None:
    """It contains the last commits, which are in the write-ahead log beside the file: copying
    the file alone re-activates a revoked key."""
    backup, copy = operator.folder / "backup.db", operator.folder / "copy.db"
    key = operator.create()
    with closing(sqlite3.connect(operator.database)) as reader:  # another process, say
        reader.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM keylatch_meta").fetchall()
        assert operator.run("keys", "revoke", key["id"]).exit_code == 0
        made = operator.run("backup", str(backup))
        assert (made.exit_code, made.stdout) == (0, "")
        shutil.copy(operator.database, copy)
    assert backup.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in operator.folder.glob("backup*")) == ["backup.db"]
    operator.set(STORE=f"sqlite:///{backup}")
    assert operator.run("verify", stdin=key["token"]).exit_code == 1
    operator.set(STORE=f"sqlite:///{copy}")
    assert operator.run("verify", stdin=key["token"]).exit_code == 0, "the twin"


def test_a_backup_is_written_into_a_file_of_its_own(operator: Operator) -> None:
    """What another account put in its place is replaced: a file that it has open, or a link to one
    that it may read."""
    operator.create()
    theirs = operator.folder / "theirs"
    theirs.touch(mode=0o666)
    unfinished = operator.folder / "backup.db.unfinished"
    unfinished.symlink_to(theirs)
    assert operator.run("backup", str(operator.folder / "backup.db")).exit_code == 0
    unfinished = operator.folder / "another.db.unfinished"
    unfinished.touch(mode=0o666)
    with unfinished.open("rb") as held:
        assert operator.run("backup", str(operator.folder / "another.db")).exit_code == 0
        assert held.read() == b""
    assert theirs.read_bytes() == b""
    for name in ("backup.db", "another.db"):
        assert (operator.folder / name).stat().st_mode & 0o777 == 0o600


def test_a_backup_overwrites_nothing(operator: Operator) -> None:
    """Neither a backup nor anything else, and what is no store is not backed up."""
    operator.create()
    precious = operator.folder / "precious"
    precious.write_text("mine")
    assert operator.run("backup", str(precious)).exit_code == 1
    assert precious.read_text() == "mine"
    assert operator.run("backup", str(operator.folder / "missing" / "backup.db")).exit_code == 1
    operator.set(STORE=f"sqlite:///{precious}")
    assert operator.run("backup", str(operator.folder / "backup.db")).exit_code == 1
    operator.set(STORE=f"sqlite:///{operator.folder}/nothing.db")
    assert operator.run("backup", str(operator.folder / "backup.db")).exit_code == 2
    assert sorted(path.name for path in operator.folder.glob("*backup*")) == []


@pytest.mark.long
def test_what_was_revoked_since_stays_revoked(
    operator: Operator,
    running: Callable[[], Running],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While a process goes on checking: it accepts neither what it has cached nor what the backup
    says of a key that was revoked, raises the alarm, and lets the others in."""
    process = running()
    kept, revoked, disabled, changed = (operator.create() for _ in range(4))
    operator.create("--organization", "acme")
    backup = operator.folder / "backup.db"
    assert operator.run("backup", str(backup)).exit_code == 0
    assert {process.check(key) for key in (kept, revoked, disabled)} == {"ALLOWED"}
    operator.run("keys", "revoke", revoked["id"])
    process.change(disabled, active=False)
    process.change(changed, permission="SENDING")
    operator.run("organizations", "disable", "acme")
    newer = operator.create()
    with caplog.at_level(logging.CRITICAL, "keylatch"):
        outcome = operator.run("restore", str(backup))
        assert outcome.exit_code == 0
        assert process.check(kept) == "ALLOWED"
    assert "was it restored from a backup?" in caplog.text
    # Until the process has asked the restored store what it lacks, these are refused with 503.
    eventually(lambda: process.check(revoked) == "REVOKED")
    eventually(lambda: process.check(disabled) == "DISABLED")
    assert process.check(newer) == "UNKNOWN"
    [ended, organizations, older, lost] = outcome.stderr.splitlines()[1:]
    assert set(ended.partition(": ")[2].split()) == {revoked["id"], disabled["id"]}
    assert organizations.endswith(": acme")
    assert older.endswith(f": {changed['id']}")
    assert lost.endswith(f": {newer['id']}")
    assert [path.name for path in operator.folder.glob("keylatch-*")] == []
    assert "store.restore" in operator.run("audit").stdout


@pytest.mark.long
def test_a_store_that_is_lost_is_restored(operator: Operator) -> None:
    """Nothing to compare with: it says so, and a given list of revocations is applied."""
    backup, listed = operator.folder / "backup.db", operator.folder / "revocations.jsonl"
    kept, revoked = operator.create(), operator.create()
    operator.run("backup", str(backup))
    operator.run("keys", "revoke", revoked["id"])
    listed.write_text(operator.run("revocations", "export").stdout)
    operator.database.write_bytes(b"rubbish" * 1000)
    for suffix in ("-wal", "-shm"):
        operator.database.with_name(f"keys.db{suffix}").unlink(missing_ok=True)
    assert operator.run("restore", str(backup)).exit_code == 1, "not over what is no store"
    operator.database.unlink()
    outcome = operator.run("restore", str(backup))
    assert (outcome.exit_code, "could not be read" in outcome.stderr) == (0, True)
    assert operator.run("verify", stdin=revoked["token"]).exit_code == 0, "it lives again"
    assert (
        operator.run("revocations", "apply", str(listed), "--dry-run").stdout
        == revoked["id"] + "\n"
    )
    assert operator.run("verify", stdin=revoked["token"]).exit_code == 0
    assert operator.run("revocations", "apply", str(listed)).stdout == revoked["id"] + "\n"
    assert operator.run("verify", stdin=revoked["token"]).exit_code == 1
    assert operator.run("verify", stdin=kept["token"]).exit_code == 0
    assert operator.run("revocations", "apply", str(listed)).stdout == ""


def test_a_store_that_is_held_is_left_as_it_is(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer's transaction does not end: the restore fails after the busy time."""
    monkeypatch.setattr("keylatch_sidecar.operations.backup._BUSY_SECONDS", 0.05)
    key = operator.create()
    backup = operator.folder / "backup.db"
    operator.run("backup", str(backup))
    with closing(sqlite3.connect(operator.database, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        outcome = operator.run("restore", str(backup))
        assert (outcome.exit_code, "database is locked" in outcome.stderr) == (1, True)
    assert operator.run("verify", stdin=key["token"]).exit_code == 0


def test_a_list_that_is_none_changes_nothing(operator: Operator) -> None:
    """Every line must be one of ours."""
    key = operator.create()
    listed = operator.folder / "revocations.jsonl"
    for line in ("rubbish", '{"id": 1}', "[]", '{"id": "x"}', '{"id": "a b", "revokedAt": null}'):
        mine = json.dumps({"id": key["id"], "revokedAt": "2026-01-01T00:00:00.000Z"})
        listed.write_text(f"{mine}\n{line}\n")
        outcome = operator.run("revocations", "apply", str(listed))
        assert (outcome.exit_code, "line 2" in outcome.stderr) == (2, True)
    assert operator.run("revocations", "apply", str(operator.folder / "missing")).exit_code == 2
    assert operator.run("verify", stdin=key["token"]).exit_code == 0


@pytest.mark.parametrize("damage", ["newer", "rubbish", "foreign", "damaged"])
def test_what_is_no_backup_is_not_put_back(operator: Operator, damage: str) -> None:
    """The store is as it was."""
    key = operator.create()
    backup = operator.folder / "backup.db"
    operator.run("backup", str(backup))
    if damage == "rubbish":
        backup.write_text("my only copy of something else\n" * 100)
    elif damage == "damaged":
        content = bytearray(backup.read_bytes())
        content[4096 * 2 : 4096 * 20] = b"\xff" * (4096 * 18)
        backup.write_bytes(content)
    else:
        with closing(sqlite3.connect(backup, isolation_level=None)) as raw:
            change = "UPDATE keylatch_version SET version_num = '9999'"
            raw.execute(change if damage == "newer" else "DROP TABLE keylatch_version")
    outcome = operator.run("restore", str(backup))
    assert (outcome.exit_code, outcome.stderr.count("error: "), outcome.stderr.count("hint: ")) == (
        1,
        1,
        1,
    )
    assert operator.run("verify", stdin=key["token"]).exit_code == 0
    assert operator.run("restore", str(operator.folder / "missing")).exit_code == 2


def test_postgresql_is_backed_up_by_its_own_means(
    operator: Operator,
    postgres: PostgresServer,
    running: Callable[..., Running],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """pg_dump and psql, then `keylatch revocations apply`: a process that knew more raises the
    alarm, and revokes again what it remembers; the list has nothing left to do."""
    url = postgres.new_database()
    operator.set(STORE=url)
    assert (
        operator.run("backup", "x.db").exit_code == operator.run("restore", "x.db").exit_code == 2
    )
    kept, revoked = operator.create(), operator.create()
    programs = Path(postgres._postgres).parent
    dump = subprocess.run(
        [str(programs / "pg_dump"), "--clean", url], capture_output=True, check=True
    ).stdout
    process = running(url)
    assert {process.check(key) for key in (kept, revoked)} == {"ALLOWED"}
    process.meanwhile(lambda: operator.run("keys", "revoke", revoked["id"]))
    assert process.check(revoked) == "REVOKED"
    listed = operator.folder / "revocations.jsonl"
    listed.write_text(operator.run("revocations", "export").stdout)
    with caplog.at_level(logging.CRITICAL, "keylatch"):
        psql = [str(programs / "psql"), "-q", "-v", "ON_ERROR_STOP=1", "-1", url]
        process.meanwhile(
            lambda: subprocess.run(psql, input=dump, stdout=subprocess.DEVNULL, check=True)
        )
        alarm = f"the store had lost a revocation of key {revoked['id']}: it is revoked again"
        eventually(lambda: process.has_said(alarm, caplog))
    assert "was it restored from a backup?" in caplog.text
    eventually(lambda: process.check(revoked) == "REVOKED")
    assert operator.run("revocations", "apply", str(listed)).stdout == ""
    assert process.check(revoked) == "REVOKED"
    assert process.check(kept) == "ALLOWED"
