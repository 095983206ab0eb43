"""The SQLite file of a store and the files beside it, before SQLite opens any of them.

The law of this file: a file is created private, before it has content, and a store has one name.
SQLite gives its log (`-wal`), the log's index (`-shm`) and its journal the permissions of the file
(`findCreateFileMode` in its os_unix.c). The permissions of a file with content are never changed:
accounts may share a store through its group on purpose.

Two accounts that share a store (0660, in a folder with the set-group-ID bit) share the lock file
as well: only accounts that may write to the store may open it. `flock` needs no more than an open
file, so an account that may only read the lock file could hold it for ever.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from keylatch.errors import ConfigurationError, StoreUnavailable
from keylatch.storage.mounts import mounts, mounts_over

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PRIVATE: Final = 0o600
_SQLITE_SUFFIXES: Final = ("-wal", "-shm", "-journal")
"""The suffixes of the files that SQLite keeps beside the file."""
_LOCK_SUFFIX: Final = "-lock"

_UNUSABLE_LOCK: Final = (errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EISDIR)
"""Errors of opening a lock file that another account, or another program, created."""
_ATTEMPTS: Final = 100
_NO_POSIX_LOCKS: Final = (
    "a SQLite store needs POSIX locks and permissions, which Windows does not have",
    "run the app in WSL or in a container; tests with keylatch.testing run here",
)


def create_private(path: Path) -> int:
    """The descriptor of a new, empty file that no other account can open, whatever the umask is.

    Raises:
        FileExistsError: the file exists, or a link, also a dangling one.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
    os.fchmod(descriptor, PRIVATE)
    return descriptor


class StoreFile:
    """The file of a store; to construct it opens and creates nothing.

    Args:
        path: of the file. Symbolic links are resolved here and never again: SQLite keeps its log
            beside the target of a link, and the lock file has to be there as well.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))
        self._lock_path = self.beside(_LOCK_SUFFIX)

    def beside(self, suffix: str) -> Path:
        """The file with this suffix."""
        return Path(f"{self.path}{suffix}")

    def refuse_aliases(self) -> None:
        """Raise ConfigurationError if the file has another name, which would have another log.

        A revocation is in the log before it is in the file: under the other name, the key is still
        active.
        """
        points = {mount.mount_point for mount in mounts()}
        names = [self.path, *map(self.beside, (*_SQLITE_SUFFIXES, _LOCK_SUFFIX))]
        mounted = [name for name in names if name in points and not name.is_dir()]
        hint = "mount the folder, so that the file and its log beside it stay together"
        mistakes = [
            (f"KEYLATCH_STORE: {each} alone is a mount point, without its folder", hint)
            for each in mounted
        ]
        store = self._stat()
        if store is not None and not stat.S_ISREG(store.st_mode):
            wrong = f"KEYLATCH_STORE: {self.path} is not a regular file"
            mistakes.append((wrong, "give the path of a regular file, or of one to create"))
        if store is not None and stat.S_ISREG(store.st_mode) and store.st_nlink > 1:
            wrong = f"KEYLATCH_STORE: {self.path} has {store.st_nlink} names (hard links)"
            mistakes.append(
                (wrong, "remove the other links: each name would have a WAL of its own")
            )
        if mistakes:
            raise ConfigurationError(mistakes)

    def create(self) -> None:
        """Create the file unless it exists, so that SQLite never does.

        Raises:
            OSError: it cannot be created.
            StoreUnavailable: the system has no POSIX locks. An app that is only tested there,
                with `keylatch.testing`, never comes here.
        """
        if fcntl is None:
            raise StoreUnavailable(*_NO_POSIX_LOCKS)
        if self._is_empty():
            with self.exclusive_lock(wait=True):  # no other process is creating it
                if self._is_empty():
                    self._create_empty()

    def exposed_files(self) -> list[tuple[Path, int]]:
        """The files with secrets that other accounts than the owner may access, and their modes."""
        exposed = []
        for each in (self.path, *map(self.beside, _SQLITE_SUFFIXES)):
            with contextlib.suppress(OSError):
                mode = stat.S_IMODE(each.stat().st_mode)
                if mode & 0o077:
                    exposed.append((each, mode))
        return exposed

    def unsafe_lock(self) -> Path | None:
        """The lock file, if another account may lock it; it is replaced before it is used."""
        with contextlib.suppress(FileNotFoundError):
            if not self._is_safe_lock(self._lock_path.lstat()):
                return self._lock_path
        return None

    def unknown_file_system(self) -> str | None:
        """The type of the file system, if this release does not know whether SQLite works there."""
        candidates = mounts_over(self.path, mounts())
        return next((mount.fs_type for mount in candidates if mount.is_unknown), None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should know."""
        warnings = []
        if exposed := self.exposed_files():
            named = ", ".join(f"{path} ({mode:04o})" for path, mode in exposed)
            warnings.append(
                f"other accounts than their owner may use {named}, which hold the store's secrets:"
                f" chmod 600 {' '.join(str(each) for each, _ in exposed)}, unless they share it"
            )
        if fs_type := self.unknown_file_system():
            warnings.append(
                f"{self.path} is on a file system that keylatch does not know ({fs_type}): without"
                " POSIX locks or shared memory, revoked keys may become active; use a local disk"
            )
        return tuple(warnings)

    @contextlib.contextmanager
    def exclusive_lock(self, *, wait: bool) -> Iterator[None]:
        """Hold the exclusive lock among all processes, until the end of the block.

        Raises:
            BlockingIOError: another process holds it, and `wait` is False.
            OSError: the lock file cannot be opened or created.
        """
        operation = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        while True:
            lock = self._open_lock()
            try:
                fcntl.flock(lock, operation)
                if self._is_current_lock(os.fstat(lock)):  # else it was replaced meanwhile
                    yield
                    return
            finally:
                os.close(lock)

    def _is_empty(self) -> bool:
        store = self._stat()
        return store is None or (stat.S_ISREG(store.st_mode) and store.st_size == 0)

    def _create_empty(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.close(create_private(self.path))
            return
        found = self.path.lstat()
        if stat.S_ISREG(found.st_mode) and found.st_mode & 0o007:
            self.path.unlink()  # another account may have it open
            file = create_private(self.path)
            _chown_like(file, found)
            os.close(file)

    def _open_lock(self) -> int:
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileExistsError):
                return self._create_lock()
            lock = self._open_existing_lock()
            if lock is not None:
                return lock
            self._remove_lock()
        raise OSError(errno.EBUSY, f"another account keeps replacing {self._lock_path}")

    def _create_lock(self) -> int:
        lock = create_private(self._lock_path)
        store = self._stat()
        if store is not None:
            _chown_like(lock, store)
            is_of_its_group = os.fstat(lock).st_gid == store.st_gid
            os.fchmod(lock, self._lock_mode(store) if is_of_its_group else PRIVATE)
        return lock

    def _open_existing_lock(self) -> int | None:
        """The lock file; None: it cannot be used as one, or was removed."""
        try:
            # O_NONBLOCK: opening a pipe would wait for its other end.
            lock = os.open(
                self._lock_path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in _UNUSABLE_LOCK:
                return None
            raise
        if self._is_safe_lock(os.fstat(lock)):
            return lock
        os.close(lock)
        return None

    def _is_safe_lock(self, lock: os.stat_result) -> bool:
        """Whether only accounts that may write to the store can lock the lock file."""
        store = self._stat()
        owners, mode = {0, os.geteuid()}, PRIVATE
        if store is not None:
            owners.add(store.st_uid)
            mode = self._lock_mode(store) if lock.st_gid == store.st_gid else PRIVATE
        is_owner_allowed = lock.st_uid in owners or mode & 0o060
        is_mode_allowed = not lock.st_mode & 0o777 & ~mode
        return bool(stat.S_ISREG(lock.st_mode) and is_owner_allowed and is_mode_allowed)

    def _remove_lock(self) -> None:
        try:
            self._lock_path.unlink(missing_ok=True)
        except OSError as error:
            why = f"{self._lock_path} belongs to another account and cannot be removed"
            raise OSError(error.errno, f"{why}: keep the store in a folder of its own") from None

    def _is_current_lock(self, lock: os.stat_result) -> bool:
        try:
            return os.path.samestat(lock, self._lock_path.lstat())
        except FileNotFoundError:
            return False

    def _stat(self) -> os.stat_result | None:
        try:
            return self.path.stat()
        except OSError:
            return None

    @staticmethod
    def _lock_mode(store: os.stat_result) -> int:
        shared = 0o060 if store.st_mode & 0o020 else 0
        return PRIVATE | shared | (0o006 if store.st_mode & 0o002 else 0)


def _chown_like(descriptor: int, reference: os.stat_result) -> None:
    """Set the owner and group of another file, as far as the system permits: a file that root
    creates beside a service's store must belong to the service, as SQLite's own files do."""
    current = os.fstat(descriptor)
    owner = reference.st_uid if os.geteuid() == 0 else current.st_uid
    if (owner, reference.st_gid) != (current.st_uid, current.st_gid):
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, owner, reference.st_gid)
