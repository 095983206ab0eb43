"""Copies of a store that is a SQLite file: taken while everybody works, and put back the same way.

The law of this file: a copy is taken and put back through SQLite, in one transaction. Whoever
copies the file itself leaves the log beside it behind, and with it the last changes, revokes among
them. And a copy that is put back brings no key to life that was revoked since, as far as the
store that it replaces can still tell.
"""

import asyncio
import json
import os
import secrets as csprng
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from keylatch.sql.schema import VERSION
from keylatch.sql.store_file import StoreFile, created
from keylatch.store import Store

_BUSY_SECONDS: Final = 5.0
_HAS_TABLES: Final = "SELECT 1 FROM sqlite_schema WHERE name = 'keylatch_version'"
_ENDED: Final = """
    SELECT id, deleted_at, revoked_reason FROM keylatch_keys
    WHERE deleted_at IS NOT NULL OR NOT active
"""
_LIVE: Final = """
    SELECT id, permission, expires_at, partial_token FROM keylatch_keys WHERE deleted_at IS NULL
"""
_WRITE_DOWN: Final = """
    INSERT INTO keylatch_audit (at, actor, action, details) VALUES (?, ?, 'store.restore', ?)
"""
_DISABLED: Final = "SELECT id FROM keylatch_organizations WHERE NOT active"


class Unusable(Exception):
    """A file that cannot be copied or put back; nothing was changed.

    Args:
        message: why.
        hint: what to do instead.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Restored:
    """What putting a copy back meant.

    Args:
        ended_again: keys that were revoked or disabled since the copy, and are still.
        lost: keys that were made since, and are gone.
        older: keys that have the permission, expiry or secret back that they had then.
        disabled_again: organisations that were disabled since, and are still.
        compared: whether the store that was replaced could be read.
    """

    ended_again: list[str]
    lost: list[str]
    older: list[str]
    disabled_again: list[str]
    compared: bool


def take(source: Path, target: Path) -> int:
    """Copy a store; return how many keys the copy holds.

    Raises:
        Unusable: see `message`.
    """
    if target.exists():
        raise Unusable(f"{target} is there already", "another name: no backup is overwritten")
    unfinished = target.with_name(target.name + ".unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        os.close(created(unfinished))  # it will hold the store's secrets
        with closing(_reader(source)) as store, closing(sqlite3.connect(unfinished)) as copy:
            _refuse_strangers(store, source)
            store.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, whoever opens it
            # A process that serves the copy itself shares no memory with the original's.
            copy.execute("UPDATE keylatch_meta SET epoch = ?", (csprng.token_hex(8),))
            copy.commit()
            count = _checked(copy, unfinished)
        unfinished.rename(target)
    except (sqlite3.Error, OSError) as error:
        unfinished.unlink(missing_ok=True)
        hint = f"is {target.parent} a folder with room, and {source} a store?"
        raise Unusable(f"no backup was made: {error}", hint) from None
    return count


def put_back(copy: Path, store: Path, now_ms: int, by: str) -> Restored:
    """Replace a store, which may be in use, by a copy of it.

    It gets a new epoch and higher sequence numbers, so whatever any process or Redis remembers
    is believed no more. The audit log goes back as well, and gains a line in the name of `by`.

    Raises:
        Unusable: see `message`.
    """
    folder = Path(tempfile.mkdtemp(prefix="keylatch-", dir=store.parent))
    try:
        prepared = folder / "prepared.db"
        os.close(created(prepared))
        with closing(_reader(copy)) as source, closing(sqlite3.connect(prepared)) as ready:
            _refuse_strangers(source, copy)
            source.backup(ready)
            _checked(ready, copy)
        asyncio.run(_bring_up_to_date(prepared, now_ms))
        with closing(sqlite3.connect(prepared)) as ready:
            restored = _reconciled(ready, store, now_ms)
            ready.execute(_WRITE_DOWN, (now_ms, by, json.dumps(_counted(restored))))
            ready.commit()
            StoreFile(store).create()
            with closing(_writer(store)) as replaced:
                ready.backup(replaced)
    except (sqlite3.Error, OSError) as error:
        hint = f"is {copy} a backup, and {store} on a disk with room?"
        raise Unusable(f"nothing was put back: {error}", hint) from None
    finally:
        shutil.rmtree(folder)
    return restored


async def _bring_up_to_date(path: Path, now_ms: int) -> None:
    store = Store(f"sqlite:///{path}")
    await store.open(now_ms)
    await store.close()


def _reconciled(ready: sqlite3.Connection, store: Path, now_ms: int) -> Restored:
    """End in the copy what was ended in the store since, and make all memory of it worthless."""
    before = _told(store) if store.exists() else None
    made = {key_id for (key_id,) in ready.execute("SELECT id FROM keylatch_keys")}
    live = {key_id: kept for key_id, *kept in ready.execute(_LIVE)}
    ended: list[str] = []
    disabled: list[str] = []
    lost: list[str] = []
    older: list[str] = []
    [seq] = ready.execute("SELECT seq FROM keylatch_meta").fetchone()
    if before is not None:
        seq = max(seq, before.seq)
        ended = [key for key in before.ended if key in made and _end(ready, key, before, now_ms)]
        disabled = [name for name in before.disabled if _disable(ready, name)]
        lost = [key for key in before.live if key not in made]
        older = [key for key, kept in before.live.items() if key in live and live[key] != kept]
    epoch = csprng.token_hex(8)
    ready.execute("UPDATE keylatch_meta SET seq = ?, epoch = ?", (seq + 1, epoch))
    ready.execute("DELETE FROM keylatch_invalidations WHERE seq > ?", (seq,))
    # It names nobody, so it concerns everybody.
    ready.execute("INSERT INTO keylatch_invalidations (seq, at) VALUES (?, ?)", (seq + 1, now_ms))
    return Restored(ended, lost, older, disabled, before is not None)


def _counted(restored: Restored) -> dict[str, int]:
    return {
        "endedAgain": len(restored.ended_again),
        "older": len(restored.older),
        "lost": len(restored.lost),
    }


@dataclass(frozen=True, slots=True)
class _Before:
    """What the store that is replaced tells."""

    seq: int
    ended: Mapping[str, tuple[int | None, str | None]]  # when deleted (None: disabled), and why
    live: Mapping[str, list[object]]  # permission, expiry, the end of the token
    disabled: list[str]


def _told(store: Path) -> _Before | None:
    try:
        with closing(_reader(store)) as reader:
            if not reader.execute(_HAS_TABLES).fetchall():
                return None
            return _Before(
                reader.execute("SELECT seq FROM keylatch_meta").fetchone()[0],
                {key_id: (at, why) for key_id, at, why in reader.execute(_ENDED)},
                {key_id: kept for key_id, *kept in reader.execute(_LIVE)},
                [name for (name,) in reader.execute(_DISABLED)],
            )
    except sqlite3.Error:
        return None


def _end(ready: sqlite3.Connection, key_id: str, before: _Before, now_ms: int) -> bool:
    deleted_at, why = before.ended[key_id]
    done = ready.execute(
        "UPDATE keylatch_keys SET active = 0, deleted_at = coalesce(deleted_at, ?),"
        " revoked_reason = coalesce(revoked_reason, ?), updated_at = max(updated_at, ?)"
        " WHERE id = ? AND (active OR (deleted_at IS NULL AND ? IS NOT NULL))",
        (deleted_at, why, now_ms, key_id, deleted_at),
    )
    return done.rowcount > 0


def _disable(ready: sqlite3.Connection, name: str) -> bool:
    done = ready.execute(
        "UPDATE keylatch_organizations SET active = 0 WHERE id = ? AND active", (name,)
    )
    return done.rowcount > 0


def _reader(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=_BUSY_SECONDS)


def _writer(path: Path) -> sqlite3.Connection:
    writer = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    writer.execute("PRAGMA wal_autocheckpoint = 0")  # why: see `keylatch.sql.sqlite`
    writer.execute("PRAGMA synchronous = FULL")
    writer.execute("BEGIN IMMEDIATE")  # a copy waits for a lock without end: rather fail here
    writer.execute("ROLLBACK")
    return writer


def _refuse_strangers(reader: sqlite3.Connection, path: Path) -> None:
    if not reader.execute(_HAS_TABLES).fetchall():
        raise Unusable(f"{path} is no keylatch store", "nothing was changed")
    [version] = reader.execute("SELECT version_num FROM keylatch_version").fetchone()
    if version > VERSION:
        wrong = f"{path} is at version {version}, this keylatch knows up to {VERSION}"
        raise Unusable(wrong, "upgrade keylatch on this host")


def _checked(copy: sqlite3.Connection, path: Path) -> int:
    [verdict] = copy.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise Unusable(f"{path} is damaged: {verdict}", "an older backup")
    [count] = copy.execute("SELECT count(*) FROM keylatch_keys WHERE deleted_at IS NULL").fetchone()
    return int(count)
