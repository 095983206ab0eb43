"""The store as a file on this host: work runs on threads, one private connection reads in place.

Questions go to SQLite as text, reads and transactions through SQLAlchemy.

`wal_autocheckpoint` is off everywhere, because SQLite 3.7.0 to 3.51.2 can lose commits when a
checkpoint overlaps the commit that resets the log, and a lost commit is a lost revoke. Commits
of keys are synced (`synchronous = FULL`), those of lastUsed are not.
"""

import asyncio
import contextlib
import fcntl
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.engine import URL

from keylatch.errors import ConfigurationError, StoreUnavailable
from keylatch.sql.database import Question, Rows, Work, errors_translated
from keylatch.sql.wal_index import WalIndex

T = TypeVar("T")

_DIALECT: Final = sqlite_dialect()
_THREADS: Final = 4
_BUSY_SECONDS: Final = 5.0
_CHECKPOINT_AT_BYTES: Final = 1 << 20
_FIRST_SOUND_SQLITE: Final = (3, 51, 3)
_NETWORK_FILE_SYSTEMS: Final = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "ocfs2"),
    *("smb2", "smb3", "smbfs", "fuse.ceph", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs"),
)


class SQLite:
    """A file; see `keylatch.sql.database.Database`.

    Args:
        path: of the file; it is made if it is not there.
    """

    is_shared = False

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        _refuse_network_file_system(self._path)
        self._hint = f"is {self._path} writable, on a disk with room, and not held by a backup?"
        self._private: sqlite3.Connection | None = None
        self._index: WalIndex | None = None
        self._readers: list[sqlite3.Connection] = []
        self._engines: dict[str, Engine] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._places = threading.Semaphore(_THREADS)

    @property
    def warnings(self) -> tuple[str, ...]:
        if sqlite3.sqlite_version_info >= _FIRST_SOUND_SQLITE:
            return ()
        return (
            f"SQLite {sqlite3.sqlite_version} has the WAL-reset bug (fixed in 3.51.3); keylatch"
            " avoids it by truncating checkpoints, other programs that write to this file may not",
        )

    async def ask(
        self, question: Question, *, seconds: float | None = None, **parameters: Any
    ) -> Rows:
        text, values = _spelled(question, parameters)
        return await self._on_thread(lambda: self._answer(text, values))

    async def read(self, work: Work[T], *, seconds: float | None = None) -> T:
        return await self._on_thread(lambda: self._run(self._keys(), work, "BEGIN"))

    async def write(
        self, work: Work[T], *, durable: bool = True, seconds: float | None = None
    ) -> T:
        engine = self._keys() if durable else self._usage()
        return await self._on_thread(lambda: self._run(engine, work, "BEGIN IMMEDIATE"))

    def ask_now(self, question: Question, **parameters: Any) -> Rows | None:
        # A reader of a WAL database never waits for a writer, and the pages it touches here are
        # in memory: 2 us. fetchall() ends the statement, so no snapshot is held open.
        if self._private is None:
            return None
        text, values = _spelled(question, parameters)
        try:
            return self._private.execute(text, values).fetchall()
        except sqlite3.Error:
            return None

    def mark_now(self) -> bytes | None:
        index = self._index
        return None if index is None else index.header.raw

    async def identity(self) -> str:
        with self._errors_translated():
            place = self._path.stat()
        return f"{place.st_dev}/{place.st_ino}"

    async def listen(self, channel: str, heard: Callable[[str], None]) -> None:
        raise StoreUnavailable("SQLite has no bell", "and needs none: every check reads it")

    async def tidy(self) -> None:
        await self._on_thread(self._checkpoint)

    async def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True)
            self._threads = None
        self._close_connections()
        self._engines = {}

    def before_fork(self) -> None:
        # SQLite keeps books on its locks in memory, per file. A child inherits the books and not
        # the locks, so it must inherit no open file at all (sqlite.org/howtocorrupt.html 2.6).
        for _ in range(_THREADS):
            self._places.acquire()  # until no thread is at work, and none can begin
        self._close_connections()

    def after_fork(self) -> None:
        for _ in range(_THREADS):
            self._places.release()

    def forget(self) -> None:
        self._places = threading.Semaphore(_THREADS)
        self._threads = None  # they are the parent's
        self._engines = {}

    def _close_connections(self) -> None:
        self._index = None
        if self._private is not None:
            self._private.close()
            self._private = None
        while self._readers:
            self._readers.pop().close()
        for engine in self._engines.values():
            engine.dispose()

    async def _on_thread(self, work: Callable[[], T]) -> T:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="keylatch-store")
        try:
            place = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RuntimeError:  # the interpreter ends and starts no more threads: nobody is kept
            return work()
        return await place

    def _run(self, engine: Engine, work: Work[T], begin: str) -> T:
        with self._places, self._errors_translated(), engine.connect() as connection:
            connection.execution_options(keylatch_begin=begin)
            with connection.begin():
                result = work(connection)
            self._look_in_place()
            return result

    def _answer(self, text: str, values: Sequence[Any]) -> Rows:
        # Around SQLAlchemy, which holds the interpreter's lock ten times as long: a herd of cold
        # keys on four threads would hold the event loop up.
        with self._places, self._errors_translated():
            reader = self._readers.pop() if self._readers else self._connect(_BUSY_SECONDS)
            try:
                rows = reader.execute(text, values).fetchall()
            except sqlite3.Error:
                reader.close()
                raise
            self._readers.append(reader)
            self._look_in_place()
            return rows

    def _look_in_place(self) -> None:
        if self._private is None:
            private = self._connect(timeout=0)
            private.execute("SELECT count(*) FROM sqlite_schema").fetchall()  # maps the index
            self._private = private
            self._index = WalIndex.of(self._path)

    def _errors_translated(self) -> contextlib.AbstractContextManager[None]:
        return errors_translated(sqlite3.Error, self._hint)

    def _keys(self) -> Engine:
        return self._engine("FULL")

    def _usage(self) -> Engine:
        return self._engine("NORMAL")

    def _engine(self, synchronous: str) -> Engine:
        if synchronous not in self._engines:
            engine = create_engine(
                URL.create("sqlite", database=str(self._path)),
                connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False},
                hide_parameters=True,
            )
            event.listen(engine, "connect", lambda raw, _: self._configure(raw, synchronous))
            event.listen(engine, "begin", _begin)
            self._engines[synchronous] = engine
        return self._engines[synchronous]

    def _configure(self, raw: sqlite3.Connection, synchronous: str) -> None:
        raw.isolation_level = None  # sqlite3 must not begin transactions on its own
        if raw.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            with self._owned(wait=True):  # two processes at once would find it locked
                self._path.chmod(0o600)  # it will hold the pepper and the check key
                raw.execute("PRAGMA journal_mode = WAL")
        raw.execute("PRAGMA wal_autocheckpoint = 0")
        raw.execute(f"PRAGMA synchronous = {synchronous}")
        raw.execute("PRAGMA foreign_keys = ON")

    def _connect(self, timeout: float) -> sqlite3.Connection:
        """A connection for questions alone."""
        reader = sqlite3.connect(
            self._path, timeout=timeout, isolation_level=None, check_same_thread=False
        )
        reader.execute("PRAGMA wal_autocheckpoint = 0")
        reader.execute("PRAGMA query_only = ON")
        return reader

    def _checkpoint(self) -> None:
        log = self._path.with_name(self._path.name + "-wal")
        if not log.exists() or log.stat().st_size < _CHECKPOINT_AT_BYTES:
            return
        with (
            contextlib.suppress(BlockingIOError),
            self._owned(wait=False),
            self._places,
            self._errors_translated(),
            self._keys().connect() as connection,
        ):
            connection.execution_options(keylatch_begin="")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all()

    @contextlib.contextmanager
    def _owned(self, *, wait: bool) -> Iterator[None]:
        """Alone among all processes; BlockingIOError where another is at it and wait is False."""
        with self._path.with_name(self._path.name + "-owner").open("a") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield


def _spelled(question: Question, parameters: Mapping[str, Any]) -> tuple[str, list[Any]]:
    text, fixed, order = question.spelled(_DIALECT)
    named = {**fixed, **parameters}
    return text, [named[name] for name in order]


def _begin(connection: Connection) -> None:
    statement = connection.get_execution_options()["keylatch_begin"]
    if statement:
        connection.exec_driver_sql(statement)


def _refuse_network_file_system(path: Path) -> None:
    """SQLite's locks and its shared memory do not work across a network."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return
    best, kind = "", ""
    for line in mounts.read_text().splitlines():
        _, mount, file_system, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if (path.is_relative_to(mount)) and len(mount) >= len(best):
            best, kind = mount, file_system
    if kind in _NETWORK_FILE_SYSTEMS:
        raise ConfigurationError(
            [
                (
                    f"KEYLATCH_STORE: {path} lies on a network file system ({kind})",
                    "put the file on a local disk, or use postgresql:// for many hosts",
                )
            ]
        )
