"""Checks of a store in a SQLite file. It is opened read-only, so that no check changes it."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import quote

from keylatch.storage.sqlite import SQLite
from keylatch_sidecar.operations.doctor import tables
from keylatch_sidecar.operations.doctor.finding import Finding, failure, ok, warning

_BUSY_SECONDS: Final = 1.0
_SCARCE_BYTES: Final = 1 << 30
_NO_ROOM_BYTES: Final = 16 << 20
_LONG_LOG_BYTES: Final = 64 << 20
_HAS_TABLES: Final = "SELECT name FROM sqlite_schema WHERE name = 'keylatch_version'"


def examine(database: SQLite, path: Path) -> list[Finding]:
    """The findings for the file and its contents. Blocks: call it in a thread."""
    findings = [*_check_folder(path), *_check_file_system(database), *_check_library(database)]
    if not path.exists():
        hint = "the first start creates it; is KEYLATCH_STORE right?"
        return [*findings, warning("store", f"{path} does not exist", hint)]
    findings += [*_check_permissions(database, path), *_check_log(database)]
    place = f"file:{quote(str(path))}?mode=ro"
    try:
        with closing(sqlite3.connect(place, uri=True, timeout=_BUSY_SECONDS)) as reader:
            return [*findings, *_check_contents(reader, path)]
    except sqlite3.Error as error:
        hint = f"is {path} a keylatch store, readable, and on a disk that works?"
        return [*findings, failure("store", f"cannot be read: {error}", hint)]


def _check_contents(reader: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    has_tables = reader.execute(_HAS_TABLES).fetchall()
    yield ok("store", f"SQLite at {path}")
    if not has_tables:
        yield tables.check_version(None)
        return
    yield tables.check_version(reader.execute(tables.STORED_VERSION).fetchone()[0])
    yield from tables.check_secrets(reader.execute(tables.SECRETS).fetchall())


def _check_folder(path: Path) -> Iterator[Finding]:
    folder = path.parent
    if not folder.is_dir():
        yield failure("folder", f"{folder} does not exist", "create it, or set KEYLATCH_STORE")
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        hint = "SQLite keeps its log beside the file: chown the folder to the account of keylatch"
        yield failure("folder", f"{folder} is not writable", hint)
    elif folder.stat().st_mode & 0o002 and not folder.stat().st_mode & 0o1000:
        yield warning(
            "folder",
            f"every account may write to {folder}, and so replace the store",
            f"chmod o-w {folder}",
        )
    else:
        yield ok("folder", f"{folder} is writable")
    free = shutil.disk_usage(folder).free
    room = f"{free / (1 << 20):,.0f} MiB are free"
    if free < _NO_ROOM_BYTES:
        yield failure("disk", room, "free some space: without it no key can be created or revoked")
    elif free < _SCARCE_BYTES:
        yield warning("disk", room, "free some space before it runs out")
    else:
        yield ok("disk", room)


def _check_file_system(database: SQLite) -> Iterator[Finding]:
    # An unsuitable file system, a mount of the file alone and a second hard link are not findings
    # of this check: they stop every start, and this examination in `database_of`.
    kind = database.file.unknown_file_system()
    if kind is not None:
        yield warning(
            "file system",
            f"keylatch does not know {kind}, which needs POSIX locks and shared memory",
            "use a local disk: without them, revoked keys may become active again",
        )


def _check_permissions(database: SQLite, path: Path) -> Iterator[Finding]:
    too_open = database.file.exposed_files()
    if not os.access(path, os.W_OK):
        hint = "chown it to the account that runs keylatch"
        yield failure("permissions", f"{path} is not writable", hint)
    elif too_open:
        named = ", ".join(f"{each} ({mode:04o})" for each, mode in too_open)
        yield warning(
            "permissions",
            f"other accounts than the owner may use {named}: it contains the store's secrets",
            f"chmod 600 {' '.join(str(each) for each, _ in too_open)}",
        )
    else:
        yield ok("permissions", f"accessible to its owner only ({path.stat().st_mode & 0o777:04o})")
    lock = database.file.unsafe_lock()
    if lock is not None:
        yield warning(
            "lock file",
            f"another account can hold {lock}, which blocks checkpoints",
            "keylatch replaces it, unless the folder's permissions forbid that",
        )


def _check_log(database: SQLite) -> Iterator[Finding]:
    log = database.file.beside("-wal")
    length = log.stat().st_size if log.exists() else 0
    if length > _LONG_LOG_BYTES:
        yield warning(
            "log",
            f"{length / (1 << 20):,.0f} MiB are not checkpointed yet",
            "keylatch checkpoints every 30 s: does another program hold the file open for reading?",
        )


def _check_library(database: SQLite) -> Iterator[Finding]:
    for message in database.version_warnings:
        yield warning(
            "SQLite", message, "use a newer SQLite, or let no other program write to the file"
        )
    if not database.version_warnings:
        yield ok("SQLite", sqlite3.sqlite_version)
