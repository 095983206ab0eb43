"""Backup and restore of a store in a SQLite file, both while the store is in use.

The law of this file: data is copied through SQLite, in one transaction. A copy of the file alone
lacks the write-ahead log, and with it the last changes, which may be revocations. And a restore
re-activates no key that was revoked after the backup, if the replaced store can be read.
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

from keylatch.errors import BackupError
from keylatch.storage.schema import VERSION
from keylatch.storage.store import Store
from keylatch.storage.store_file import StoreFile, create_private

_BUSY_SECONDS: Final = 5.0
_HAS_TABLES: Final = "SELECT 1 FROM sqlite_schema WHERE name = 'keylatch_version'"
_INACTIVE_KEYS: Final = """
    SELECT id, deleted_at, revoked_reason FROM keylatch_keys
    WHERE deleted_at IS NOT NULL OR NOT active
"""
_LIVE_KEYS: Final = """
    SELECT id, permission, expires_at, partial_token FROM keylatch_keys WHERE deleted_at IS NULL
"""
_INSERT_AUDIT_EVENT: Final = """
    INSERT INTO keylatch_audit (at, actor, action, details) VALUES (?, ?, 'store.restore', ?)
"""
_DISABLED_ORGANIZATIONS: Final = "SELECT id FROM keylatch_organizations WHERE NOT active"


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore changed. The lists hold ids.

    Args:
        revoked_again: keys revoked or disabled after the backup, which stay so.
        lost: keys created after the backup, which are lost.
        reverted: keys whose permission, expiry or secret is that of the backup again.
        disabled_again: organisations disabled after the backup, which stay so.
        compared: whether the replaced store could be read.
    """

    revoked_again: list[str]
    lost: list[str]
    reverted: list[str]
    disabled_again: list[str]
    compared: bool


def create_backup(source: Path, target: Path) -> int:
    """Copy a store; return the number of live keys in the copy.

    Raises:
        BackupError: see `message`.
    """
    if target.exists():
        raise BackupError(f"{target} exists", "another name: backups are not overwritten")
    unfinished = target.with_name(target.name + ".unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        os.close(create_private(unfinished))  # it will contain the store's secrets
        with (
            closing(_open_read_only(source)) as store,
            closing(sqlite3.connect(unfinished)) as copy,
        ):
            _require_keylatch_store(store, source)
            store.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # a single file, without a log beside it
            # Values cached for the original are invalid for processes that use the copy.
            copy.execute("UPDATE keylatch_meta SET epoch = ?", (csprng.token_hex(8),))
            copy.commit()
            count = _check_integrity(copy, unfinished)
        unfinished.rename(target)
    except (sqlite3.Error, OSError) as error:
        unfinished.unlink(missing_ok=True)
        hint = f"is {target.parent} a folder with room, and {source} a store?"
        raise BackupError(f"no backup was created: {error}", hint) from None
    return count


def restore_backup(copy: Path, store: Path, now_ms: int, by: str) -> RestoreReport:
    """Replace a store, which may be in use, by a backup.

    The store gets a new epoch and higher sequence numbers, which invalidates what processes and
    Redis have cached. The audit log is that of the backup, with one more event, of actor `by`.

    Raises:
        BackupError: see `message`.
    """
    folder = Path(tempfile.mkdtemp(prefix="keylatch-", dir=store.parent))
    try:
        prepared = folder / "prepared.db"
        os.close(create_private(prepared))
        with (
            closing(_open_read_only(copy)) as source,
            closing(sqlite3.connect(prepared)) as prepared_store,
        ):
            _require_keylatch_store(source, copy)
            source.backup(prepared_store)
            _check_integrity(prepared_store, copy)
        asyncio.run(_migrate(prepared, now_ms))
        with closing(sqlite3.connect(prepared)) as prepared_store:
            report = _reconcile(prepared_store, store, now_ms)
            prepared_store.execute(_INSERT_AUDIT_EVENT, (now_ms, by, json.dumps(_counts(report))))
            prepared_store.commit()
            StoreFile(store).create()
            with closing(_open_for_writing(store)) as replaced_store:
                prepared_store.backup(replaced_store)
    except (sqlite3.Error, OSError) as error:
        hint = f"is {copy} a backup, and {store} on a disk with room?"
        raise BackupError(f"nothing was restored: {error}", hint) from None
    finally:
        shutil.rmtree(folder)
    return report


async def _migrate(path: Path, now_ms: int) -> None:
    store = Store(f"sqlite:///{path}")
    await store.open(now_ms)
    await store.close()


def _reconcile(prepared: sqlite3.Connection, store: Path, now_ms: int) -> RestoreReport:
    """Revoke and disable in the backup what was revoked and disabled in the store since, and
    invalidate all cached values."""
    previous = _read_previous(store) if store.exists() else None
    existing = {key_id for (key_id,) in prepared.execute("SELECT id FROM keylatch_keys")}
    live = {key_id: fields for key_id, *fields in prepared.execute(_LIVE_KEYS)}
    revoked: list[str] = []
    disabled: list[str] = []
    lost: list[str] = []
    reverted: list[str] = []
    [seq] = prepared.execute("SELECT seq FROM keylatch_meta").fetchone()
    if previous is not None:
        seq = max(seq, previous.seq)
        revoked = [
            key
            for key in previous.inactive
            if key in existing and _revoke_again(prepared, key, previous, now_ms)
        ]
        disabled = [name for name in previous.disabled if _disable_again(prepared, name)]
        lost = [key for key in previous.live if key not in existing]
        reverted = [
            key for key, fields in previous.live.items() if key in live and live[key] != fields
        ]
    epoch = csprng.token_hex(8)
    prepared.execute("UPDATE keylatch_meta SET seq = ?, epoch = ?", (seq + 1, epoch))
    prepared.execute("DELETE FROM keylatch_invalidations WHERE seq > ?", (seq,))
    # An invalidation without a key and an organisation is for all keys.
    prepared.execute(
        "INSERT INTO keylatch_invalidations (seq, row_id, at) VALUES (?, ?, ?)",
        (seq + 1, csprng.randbits(62) + 1, now_ms),
    )
    return RestoreReport(revoked, lost, reverted, disabled, previous is not None)


def _counts(report: RestoreReport) -> dict[str, int]:
    return {
        "revokedAgain": len(report.revoked_again),
        "reverted": len(report.reverted),
        "lost": len(report.lost),
    }


@dataclass(frozen=True, slots=True)
class _PreviousStore:
    """What is needed from the store that is replaced."""

    seq: int
    inactive: Mapping[str, tuple[int | None, str | None]]  # when deleted (None: disabled), and why
    live: Mapping[str, list[object]]  # permission, expiry, the end of the token
    disabled: list[str]


def _read_previous(store: Path) -> _PreviousStore | None:
    try:
        with closing(_open_read_only(store)) as reader:
            if not reader.execute(_HAS_TABLES).fetchall():
                return None
            return _PreviousStore(
                reader.execute("SELECT seq FROM keylatch_meta").fetchone()[0],
                {key_id: (at, why) for key_id, at, why in reader.execute(_INACTIVE_KEYS)},
                {key_id: fields for key_id, *fields in reader.execute(_LIVE_KEYS)},
                [name for (name,) in reader.execute(_DISABLED_ORGANIZATIONS)],
            )
    except sqlite3.Error:
        return None


def _revoke_again(
    prepared: sqlite3.Connection, key_id: str, previous: _PreviousStore, now_ms: int
) -> bool:
    deleted_at, reason = previous.inactive[key_id]
    updated = prepared.execute(
        "UPDATE keylatch_keys SET active = 0, deleted_at = coalesce(deleted_at, ?),"
        " revoked_reason = coalesce(revoked_reason, ?), updated_at = max(updated_at, ?)"
        " WHERE id = ? AND (active OR (deleted_at IS NULL AND ? IS NOT NULL))",
        (deleted_at, reason, now_ms, key_id, deleted_at),
    )
    return updated.rowcount > 0


def _disable_again(prepared: sqlite3.Connection, name: str) -> bool:
    updated = prepared.execute(
        "UPDATE keylatch_organizations SET active = 0 WHERE id = ? AND active", (name,)
    )
    return updated.rowcount > 0


def _open_read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=_BUSY_SECONDS)


def _open_for_writing(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # why: see `keylatch.storage.sqlite`
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(
        "BEGIN IMMEDIATE"
    )  # `backup` waits for a lock without a limit: fail here instead
    connection.execute("ROLLBACK")
    return connection


def _require_keylatch_store(reader: sqlite3.Connection, path: Path) -> None:
    if not reader.execute(_HAS_TABLES).fetchall():
        raise BackupError(f"{path} is not a keylatch store", "nothing was changed")
    [version] = reader.execute("SELECT version_num FROM keylatch_version").fetchone()
    if version > VERSION:
        message = f"{path} is at version {version}, this keylatch knows up to {VERSION}"
        raise BackupError(message, "upgrade keylatch on this host")


def _check_integrity(copy: sqlite3.Connection, path: Path) -> int:
    [result] = copy.execute("PRAGMA quick_check(1)").fetchone()
    if result != "ok":
        raise BackupError(f"{path} is damaged: {result}", "an older backup")
    [count] = copy.execute("SELECT count(*) FROM keylatch_keys WHERE deleted_at IS NULL").fetchone()
    return int(count)
