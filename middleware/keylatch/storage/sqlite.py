"""The store as a file on this host: work runs on threads; one connection reads on the event loop.

Queries go to SQLite as text, reads and transactions through SQLAlchemy. Each of the three has
threads of its own: a cold check runs queries, and waits for no list, no page of the audit log and
no transaction. `store_file` decides which file it is and who may open it, and creates it: SQLite
opens a file that exists and creates none.

`wal_autocheckpoint` is off everywhere, because SQLite 3.7.0 to 3.51.2 can lose commits when a
checkpoint overlaps the commit that resets the log, and a lost commit is a lost revocation. Commits
of keys are synced (`synchronous = FULL`), those of usage are not.
"""

import contextlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.engine import URL

from keylatch.errors import ConfigurationError, StoreUnavailable
from keylatch.storage.database import Database, Query, Rows, Work, translate_errors
from keylatch.storage.mounts import mounts, mounts_over
from keylatch.storage.store_file import StoreFile
from keylatch.storage.thread_pool import ThreadPool
from keylatch.storage.wal_index import WalIndex

T = TypeVar("T")

_DIALECT: Final = sqlite_dialect()
_QUERY_THREADS: Final = 4
_READ_THREADS: Final = 2
_WRITE_THREADS: Final = 2  # one writes, the other waits for its lock
_BUSY_SECONDS: Final = 5.0
_CHECKPOINT_BYTES: Final = 1 << 20
_FIRST_FIXED_SQLITE: Final = (3, 51, 3)


class SQLite(Database):
    """A file; see `keylatch.storage.database.Database`.

    Args:
        path: of the file; it is created on first use, for its owner only.

    Raises:
        ConfigurationError: SQLite would not work there, or lose changes.
    """

    def __init__(self, path: Path) -> None:
        self.file = StoreFile(path)
        self._path = self.file.path
        _refuse_network_file_system(self._path)
        self.file.refuse_aliases()
        self._hint = f"is {self._path} writable, on a disk with space, and not locked by a backup?"
        self._inline_connection: sqlite3.Connection | None = None
        self._wal_index: WalIndex | None = None
        self._readers: list[sqlite3.Connection] = []
        self._engines: dict[str, Engine] = {}
        self._query_threads = ThreadPool("keylatch-store", _QUERY_THREADS)
        self._read_threads = ThreadPool("keylatch-store-read", _READ_THREADS)
        self._write_threads = ThreadPool("keylatch-store-write", _WRITE_THREADS)
        self._pools = self._query_threads, self._read_threads, self._write_threads

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self.version_warnings, *self.file.warnings)

    @property
    def version_warnings(self) -> tuple[str, ...]:
        """What an operator should know about this version of SQLite."""
        if sqlite3.sqlite_version_info >= _FIRST_FIXED_SQLITE:
            return ()
        return (
            f"SQLite {sqlite3.sqlite_version} has the WAL-reset bug (fixed in 3.51.3); keylatch"
            " avoids it by truncating checkpoints, other programs that write to this file may not",
        )

    async def fetch(self, query: Query, *, seconds: float | None = None, **parameters: Any) -> Rows:
        text, values = _compile(query, parameters)
        return await self._query_threads.run(lambda: self._fetch(text, values))

    async def read(self, work: Work[T], *, seconds: float | None = None) -> T:
        return await self._read_threads.run(
            lambda: self._run(self._durable_engine(), work, "BEGIN")
        )

    async def write(
        self,
        work: Work[T],
        *,
        durable: bool = True,
        seconds: float | None = None,
        is_urgent: bool = False,
    ) -> T:
        engine = self._durable_engine() if durable else self._usage_engine()
        return await self._write_threads.run(lambda: self._run(engine, work, "BEGIN IMMEDIATE"))

    def pools(self) -> Mapping[str, int]:
        under_way = [pool.under_way for pool in self._pools]
        return dict(zip(("checks", "reads", "writes"), under_way, strict=True))

    def fetch_nowait(self, query: Query, **parameters: Any) -> Rows | None:
        # A reader of a WAL database never waits for a writer, and the pages that it reads here are
        # in memory: 2 us. fetchall() ends the statement, so no snapshot stays open.
        if self._inline_connection is None:
            return None
        text, values = _compile(query, parameters)
        try:
            return self._inline_connection.execute(text, values).fetchall()
        except sqlite3.Error:
            return None

    def data_version(self) -> bytes | None:
        index = self._wal_index
        return None if index is None else index.header.raw

    async def identity(self) -> str:
        with self._translate_errors():
            place = self._path.stat()
        return f"{place.st_dev}/{place.st_ino}"

    async def listen(self, channel: str, on_notification: Callable[[str], None]) -> None:
        raise StoreUnavailable("SQLite has no LISTEN", "it needs none: every check reads the file")

    async def run_maintenance(self) -> None:
        await self._write_threads.run(self._checkpoint)

    async def close(self) -> None:
        for pool in self._pools:
            pool.close()
        self._close_connections()
        self._engines = {}

    def before_fork(self) -> None:
        # SQLite records its locks in memory, per file. A child inherits the records and not the
        # locks, so it must inherit no open file (sqlite.org/howtocorrupt.html section 2.6).
        for pool in self._pools:
            pool.pause()
        self._close_connections()

    def after_fork_in_parent(self) -> None:
        for pool in self._pools:
            pool.resume()

    def after_fork_in_child(self) -> None:
        for pool in self._pools:
            pool.reset()
        self._engines = {}

    def _close_connections(self) -> None:
        self._wal_index = None
        if self._inline_connection is not None:
            self._inline_connection.close()
            self._inline_connection = None
        while self._readers:
            self._readers.pop().close()
        for engine in self._engines.values():
            engine.dispose()

    def _run(self, engine: Engine, work: Work[T], begin: str) -> T:
        with self._translate_errors(), engine.connect() as connection:
            connection.execution_options(keylatch_begin=begin)
            with connection.begin():
                result = work(connection)
            self._open_inline_connection()
            return result

    def _fetch(self, text: str, values: Sequence[Any]) -> Rows:
        # Without SQLAlchemy, which holds the interpreter's lock ten times as long: many cold keys
        # on four threads would delay the event loop.
        with self._translate_errors():
            reader = self._readers.pop() if self._readers else self._connect(_BUSY_SECONDS)
            try:
                rows = reader.execute(text, values).fetchall()
            except sqlite3.Error:
                reader.close()
                raise
            self._readers.append(reader)
            self._open_inline_connection()
            return rows

    def _open_inline_connection(self) -> None:
        if self._inline_connection is None:
            private = self._connect(timeout=0)
            private.execute("SELECT count(*) FROM sqlite_schema").fetchall()  # maps the index
            self._inline_connection = private
            self._wal_index = WalIndex.of(self._path)

    def _translate_errors(self) -> contextlib.AbstractContextManager[None]:
        return translate_errors(sqlite3.Error, self._hint)

    def _durable_engine(self) -> Engine:
        return self._engine_for("FULL")

    def _usage_engine(self) -> Engine:
        return self._engine_for("NORMAL")

    def _engine_for(self, synchronous: str) -> Engine:
        if synchronous not in self._engines:
            engine = create_engine(
                URL.create("sqlite", database=str(self._path)),
                creator=lambda: self._open(_BUSY_SECONDS),
                hide_parameters=True,
            )
            event.listen(engine, "connect", lambda raw, _: self._configure(raw, synchronous))
            event.listen(engine, "begin", _begin)
            self._engines[synchronous] = engine
        return self._engines[synchronous]

    def _configure(self, raw: sqlite3.Connection, synchronous: str) -> None:
        if raw.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            with self.file.exclusive_lock(wait=True):  # two processes at once would get "locked"
                raw.execute("PRAGMA journal_mode = WAL")
        raw.execute("PRAGMA wal_autocheckpoint = 0")
        raw.execute(f"PRAGMA synchronous = {synchronous}")
        raw.execute("PRAGMA foreign_keys = ON")

    def _connect(self, timeout: float) -> sqlite3.Connection:
        """A connection that only reads."""
        reader = self._open(timeout)
        reader.execute("PRAGMA wal_autocheckpoint = 0")
        reader.execute("PRAGMA query_only = ON")
        return reader

    def _open(self, timeout: float) -> sqlite3.Connection:
        """A connection that begins no transactions on its own; the file is created if needed."""
        with contextlib.suppress(FileNotFoundError):  # of its folder: SQLite reports it
            self.file.create()
        return sqlite3.connect(
            f"file:{quote(bytes(self._path))}?mode=rw",
            uri=True,
            timeout=timeout,
            isolation_level=None,
            check_same_thread=False,
        )

    def _checkpoint(self) -> None:
        log = self.file.beside("-wal")
        if not log.exists() or log.stat().st_size < _CHECKPOINT_BYTES:
            return
        with (
            self._translate_errors(),
            self._durable_engine().connect() as connection,
            contextlib.suppress(BlockingIOError),
            self.file.exclusive_lock(wait=False),
        ):
            connection.execution_options(keylatch_begin="")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all()


def _compile(query: Query, parameters: Mapping[str, Any]) -> tuple[str, list[Any]]:
    text, fixed, order = query.compile_for(_DIALECT)
    named = {**fixed, **parameters}
    return text, [named[name] for name in order]


def _begin(connection: Connection) -> None:
    statement = connection.get_execution_options()["keylatch_begin"]
    if statement:
        connection.exec_driver_sql(statement)


def _refuse_network_file_system(path: Path) -> None:
    """SQLite's locks and its shared memory do not work across a network or a virtual machine."""
    kinds = [mount.fs_type for mount in mounts_over(path, mounts()) if mount.is_network]
    if kinds:
        raise ConfigurationError(
            [
                (
                    f"KEYLATCH_STORE: {path} is on a network file system ({kinds[0]})",
                    "put the file on a local disk, or use postgresql:// for several hosts",
                )
            ]
        )
