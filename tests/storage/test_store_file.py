"""Who may open a store's files: from the first moment on, whatever was there before."""

import asyncio
import fcntl
import os
import select
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from keylatch.errors import ConfigurationError, StoreUnavailable
from keylatch.storage.migrations import upgrade
from keylatch.storage.sqlite import SQLite
from keylatch.storage.store import Store, database_of, file_of
from keylatch.storage.store_file import StoreFile, create_private
from tests.support import worker_other_account
from tests.support.servers import eventually

ENDS = ("", "-wal", "-shm", "-lock")
WORKER_SCRIPT = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="other accounts need root")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture(autouse=True)
def _generous_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@contextmanager
def opened(path: Path) -> Iterator[Store]:
    """A store in use, with all that lies beside it."""
    store = Store(f"sqlite:///{path}")
    with asyncio.Runner() as runner:
        try:
            runner.run(store.open(0))
            yield store
        finally:
            runner.run(store.close())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def beside(path: Path, end: str) -> Path:
    return Path(f"{path}{end}")


class OtherAccount:
    """A process of another account; see `worker_other_account`."""

    def __init__(self, what: str, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, worker_other_account.__file__, what, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.read_word() == "ready"

    def read_word(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def has_output(self) -> bool:
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def end(self) -> str:
        """What it says until it is killed."""
        self._process.kill()
        said, _ = self._process.communicate()
        return said.strip()


@pytest.fixture
def public(path: Path) -> Iterator[Path]:
    """The place of a store in a folder that every account may enter, and read and list."""
    folder = Path(tempfile.mkdtemp(prefix="keylatch-"))
    folder.chmod(0o755)
    yield folder / "keys.db"
    shutil.rmtree(folder)


# What is new


def test_all_files_are_for_their_owner_only(path: Path) -> None:
    """Whatever the umask is; SQLite gives what it creates the mode of the file."""
    with opened(path):
        assert {end: mode_of(beside(path, end)) for end in ENDS} == dict.fromkeys(ENDS, 0o600)


@pytest.mark.parametrize("mask", [0o777, 0o077, 0o022, 0])
def test_the_mode_does_not_depend_on_the_umask(path: Path, mask: int) -> None:
    """A umask can take away more than it should, too."""
    os.umask(mask)
    os.close(create_private(path))
    assert mode_of(path) == 0o600


def test_sqlite_creates_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was forgotten to be created fails, and is not created with the umask's mode."""
    monkeypatch.setattr(StoreFile, "create", lambda self: None)
    with pytest.raises(StoreUnavailable, match="unable to open"), opened(path):
        pass
    assert not path.exists()


def test_what_is_deleted_while_it_is_used_comes_back_closed(path: Path) -> None:
    """A connection that is opened later finds no file, and creates it as the first one did."""
    with opened(path):
        pass
    path.unlink()
    with opened(path):
        assert mode_of(path) == 0o600


@needs_root
@pytest.mark.long
def test_no_other_account_can_open_a_store_that_is_being_created(public: Path) -> None:
    """Not for a moment: a reader that tries all the while never succeeds."""
    reader = OtherAccount("read", public)
    for _ in range(20):
        with opened(public):
            pass
        for end in ENDS:
            beside(public, end).unlink(missing_ok=True)
    assert reader.end() == ""


@needs_root
@pytest.mark.long
def test_a_twin_that_closes_the_file_afterwards_is_caught(public: Path) -> None:
    """Created with the umask's mode and changed then: between the two there is a moment."""
    os.umask(0o022)
    reader = OtherAccount("read", public)

    def is_caught() -> bool:
        for _ in range(1000):
            public.touch()
            public.chmod(0o600)
            public.unlink()
        return reader.has_output()

    eventually(is_caught, seconds=60)
    assert reader.end() == "read"


# What was there before


def test_an_empty_file_that_others_may_have_open_is_replaced(path: Path) -> None:
    """Else they would read in it what was written later, whatever its mode is by then."""
    path.touch(mode=0o644)
    with path.open("rb") as before:
        with opened(path):
            assert mode_of(path) == 0o600
            assert path.stat().st_size > 0
        assert before.read() == b""


def test_an_empty_file_for_a_group_is_kept(path: Path) -> None:
    """It was made so on purpose: what SQLite creates beside it is for the group as well."""
    path.touch(mode=0o660)
    path.chmod(0o660)
    with opened(path) as store:
        assert {end: mode_of(beside(path, end)) for end in ENDS} == dict.fromkeys(ENDS, 0o660)
        assert any(f"{path} (0660)" in warning for warning in store.warnings)


def test_what_holds_something_keeps_its_mode_with_a_warning(path: Path) -> None:
    """A store that others can read is their accounts' affair, or a mistake: the start says so."""
    with opened(path) as store:
        assert [each for each in store.warnings if "accounts" in each] == []
    path.chmod(0o644)
    with opened(path) as store:
        assert mode_of(path) == 0o644
        [warning] = [each for each in store.warnings if f"{path} (" in each]
        assert f"chmod 600 {path}" in warning
        path.chmod(0o600)
        assert [each for each in store.warnings if f"{path} (" in each] == []
        beside(path, "-wal").chmod(0o640)
        assert any(f"{path}-wal (0640)" in each for each in store.warnings)


# Its names


@pytest.mark.anyio
async def test_a_link_is_resolved_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is beside the file that the link leads to; looked for beside the link, it would grow
    for ever. What is committed under one name is seen under the other."""
    monkeypatch.setattr("keylatch.storage.sqlite._CHECKPOINT_BYTES", 1)
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link.db"
    link.symlink_to(path)
    store, same = Store(f"sqlite:///{link}"), Store(f"sqlite:///{path}")
    await store.open(0)
    await same.open(0)
    assert store.data_version() is not None
    assert store.data_version() == same.data_version()
    assert beside(path, "-wal").stat().st_size > 0
    await store.run_maintenance(0)
    assert beside(path, "-wal").stat().st_size == 0
    assert [each.name for each in link.parent.iterdir()] == ["link.db"]
    assert file_of(f"sqlite:///{link}") == path
    await store.close()
    await same.close()


@pytest.mark.anyio
async def test_a_twin_that_does_not_resolve_links_is_caught(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for the log beside the link, finds none, and lets the log grow."""
    monkeypatch.setattr("keylatch.storage.sqlite._CHECKPOINT_BYTES", 1)
    link = tmp_path / "link.db"
    link.symlink_to(path)
    with monkeypatch.context() as patched:
        patched.setattr("keylatch.storage.store_file.os.path.realpath", os.path.abspath)
        store = Store(f"sqlite:///{link}")
    os.close(create_private(path))
    await store.open(0)
    await store.run_maintenance(0)
    assert beside(path, "-wal").stat().st_size > 0
    await store.close()


def test_a_second_name_stops_the_start(path: Path, tmp_path: Path) -> None:
    """Under each of two hard links SQLite keeps a log of its own: a revocation is in one only."""
    with opened(path):
        pass
    other = tmp_path / "other.db"
    other.hardlink_to(path)
    for name in (path, other):
        with pytest.raises(ConfigurationError, match=r"2 names .hard links."):
            database_of(f"sqlite:///{name}")
    other.unlink()
    with opened(path):
        pass


def test_what_is_no_file_is_no_store(tmp_path: Path) -> None:
    """A device, a pipe or a folder: nothing is created beside it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/null")):
        with pytest.raises(ConfigurationError, match="is not a regular file"):
            database_of(f"sqlite:///{path}")
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["a b", "50%?#x", "line\u2028end", "caf\udce9", " (deleted)"])
async def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    """What is opened is this file and no other, and the index is found under its name."""
    folder = tmp_path / name
    folder.mkdir()
    database = SQLite(folder / "keys.db")
    await database.write(lambda connection: upgrade(connection, 0))
    assert database.data_version() is not None
    assert (folder / "keys.db").stat().st_size > 0
    await database.close()


# The lock file


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Another process has the lock file open and locked."""
    with path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def test_two_exclude_each_other(path: Path) -> None:
    """A process that does not wait gets an error."""
    one, other = StoreFile(path), StoreFile(path)
    with (
        one.exclusive_lock(wait=False),
        pytest.raises(BlockingIOError),
        other.exclusive_lock(wait=False),
    ):
        pass
    with other.exclusive_lock(wait=False):
        assert mode_of(beside(path, "-lock")) == 0o600


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o640, 0o660, 0o666])
def test_a_lock_file_that_others_may_hold_is_replaced(path: Path, mode: int) -> None:
    """It needs no more than reading to hold it: one that an older keylatch made with the umask's
    mode may be held already."""
    with opened(path):
        lock = beside(path, "-lock")
        lock.chmod(mode)
        with held(lock):
            assert StoreFile(path).unsafe_lock() == lock
            with StoreFile(path).exclusive_lock(wait=False):
                assert mode_of(lock) == 0o600
            assert StoreFile(path).unsafe_lock() is None


def test_a_lock_file_of_an_account_that_may_write_is_waited_for(path: Path) -> None:
    """The counterpart: with the right mode, its holder may write to the store, and has its turn."""
    store = StoreFile(path)
    with opened(path), held(beside(path, "-lock")), pytest.raises(BlockingIOError):
        store.exclusive_lock(wait=False).__enter__()


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_what_is_no_file_is_replaced(path: Path, tmp_path: Path, kind: str) -> None:
    """A link would lead to a file that another account chose, and a pipe would be waited for."""
    lock, target = beside(path, "-lock"), tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(lock, 0o600)
    else:
        lock.symlink_to(target)
    if kind == "link":
        target.write_text("precious")
    with StoreFile(path).exclusive_lock(wait=False):
        assert stat.S_ISREG(lock.lstat().st_mode)
    assert not target.exists() or target.read_text() == "precious"


def test_after_a_replacement_it_is_the_new_file_that_counts(path: Path) -> None:
    """The old one has no name any more, and later processes find the other."""
    first, second, third = (StoreFile(path) for _ in range(3))
    with first.exclusive_lock(wait=False):
        beside(path, "-lock").unlink()
        with second.exclusive_lock(wait=False), pytest.raises(BlockingIOError):
            third.exclusive_lock(wait=False).__enter__()


@pytest.mark.parametrize(
    ("of_store", "of_lock"),
    [(0o600, 0o600), (0o640, 0o600), (0o644, 0o600), (0o660, 0o660), (0o664, 0o660)],
)
def test_the_lock_file_is_for_those_who_may_write_to_the_store(
    path: Path, of_store: int, of_lock: int
) -> None:
    """Accounts that share a store by its group share its lock; who may only read has no part."""
    path.write_bytes(b"something")
    path.chmod(of_store)
    with StoreFile(path).exclusive_lock(wait=False):
        assert mode_of(beside(path, "-lock")) == of_lock


@needs_root
def test_a_lock_file_of_another_account_is_replaced(path: Path) -> None:
    """An account that may create files in the folder could have made it before us."""
    with opened(path):
        lock = beside(path, "-lock")
        os.chown(lock, WORKER_SCRIPT, WORKER_SCRIPT)
        with held(lock), StoreFile(path).exclusive_lock(wait=False):
            assert lock.stat().st_uid == 0


@needs_root
def test_what_root_creates_beside_a_services_store_is_the_services(path: Path) -> None:
    """An operator's command must not lock the service out."""
    path.write_bytes(b"something")
    os.chown(path, 1234, 2345)
    with StoreFile(path).exclusive_lock(wait=False):
        lock = beside(path, "-lock").stat()
    assert (lock.st_uid, lock.st_gid) == (1234, 2345)


@needs_root
def test_two_accounts_share_a_store_by_its_group(path: Path) -> None:
    """Each may hold the lock file that the other one made."""
    path.write_bytes(b"something")
    os.chown(path, 1234, 2345)
    path.chmod(0o660)
    lock = beside(path, "-lock")
    os.close(create_private(lock))
    os.chown(lock, 1235, 2345)
    lock.chmod(0o660)
    with StoreFile(path).exclusive_lock(wait=False):
        assert lock.stat().st_uid == 1235
    os.chown(lock, 1235, 9999)
    with StoreFile(path).exclusive_lock(wait=False):
        assert lock.stat().st_uid == 1234


@needs_root
@pytest.mark.long
def test_a_lock_file_that_cannot_be_replaced_is_refused(public: Path) -> None:
    """In /tmp, say, where files may be removed by their owners only. It is said, not waited for."""
    public.parent.chmod(0o1777)
    beside(public, "-lock").touch(mode=0o600)
    stranger = OtherAccount("start", public)
    assert "belongs to another account and cannot be removed" in stranger.read_word()
    stranger.end()
    assert [each.name for each in public.parent.iterdir()] == ["keys.db-lock"]


@needs_root
@pytest.mark.long
def test_another_account_can_hold_nothing(public: Path) -> None:
    """It may not even open the lock file, and flock needs an open file. The twin, with the mode
    that a usual umask leaves, is held, and replaced by the next process that needs it."""
    store = StoreFile(public)
    with opened(public):
        stranger = OtherAccount("hold", public)
        assert stranger.read_word() == "refused"
        stranger.end()
        beside(public, "-lock").chmod(0o644)
        stranger = OtherAccount("hold", public)
        assert stranger.read_word() == "held"
        with store.exclusive_lock(wait=False):
            assert mode_of(beside(public, "-lock")) == 0o600
        stranger.end()
