"""On which file systems a SQLite store may lie, according to the table of mounts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from keylatch.errors import ConfigurationError
from keylatch.storage.mounts import mounts, mounts_over
from keylatch.storage.store import database_of

ROOT = "overlay / overlay rw 0 0\n"
REFUSED = (
    *("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "afs", "lustre", "gfs2", "ocfs2"),
    *("virtiofs", "fakeowner", "osxfs", "vboxsf", "prl_fs", "vmhgfs", "drvfs"),
    *("fuse.grpcfuse", "fuse.osxfs", "fuse.vmhgfs-fuse", "fuse.prl_fsd", "fuse.sshfs"),
    *("fuse.gcsfuse", "fuse.blobfuse2", "fuse.rclone", "fuse.juicefs", "fuse.s3fs", "fuse.goofys"),
    *("fuse.glusterfs", "fuse.ceph-fuse", "fuse.davfs", "fuse.JuiceFS"),
)
UNKNOWN = ("fuse", "fuse.bindfs", "fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.of-tomorrow")
LOCAL = ("ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs", "fuseblk")


class Table:
    """A table of mounts that the test writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._file = folder / "mounts"
        self._file.write_text(ROOT)
        monkeypatch.setattr("keylatch.storage.mounts._MOUNT_TABLE", self._file)

    def say(self, *lines: str, first: str = ROOT) -> None:
        text = first + "".join(f"{line} rw,relatime 0 0\n" for line in lines)
        self._file.write_bytes(os.fsencode(text))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Table:
    return Table(monkeypatch, tmp_path)


def warnings_of(path: str) -> list[str]:
    """What is said of the file system at the start."""
    database = database_of(f"sqlite:///{path}")
    return [warning for warning in database.warnings if "file system" in warning]


@pytest.mark.parametrize("kind", REFUSED)
def test_file_systems_without_locks_or_shared_memory_are_refused(table: Table, kind: str) -> None:
    """Network file systems, buckets, and folders of the host inside of a virtual machine."""
    table.say(f"x /data {kind}")
    with pytest.raises(ConfigurationError, match=f"network file system .{kind.lower()}."):
        database_of("sqlite:////data/deep/keys.db")
    assert warnings_of("/elsewhere/keys.db") == []


@pytest.mark.parametrize("source", ["blobfuse2", "mountpoint-s3", "/usr/bin/goofys"])
def test_programs_that_give_their_name_as_the_source_are_known(table: Table, source: str) -> None:
    """They mount with the bare type `fuse`."""
    table.say(f"{source} /data fuse")
    with pytest.raises(ConfigurationError, match=source.rpartition("/")[2]):
        database_of("sqlite:////data/keys.db")


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_program_is_a_warning(table: Table, kind: str) -> None:
    """No list has them all; the start says that this one is not on it."""
    table.say(f"x /data {kind}")
    [warning] = warnings_of("/data/keys.db")
    assert kind in warning
    assert "local disk" in warning


@pytest.mark.parametrize("kind", LOCAL)
def test_local_file_systems_are_taken(table: Table, kind: str) -> None:
    """Without a word."""
    table.say(f"/dev/sdb1 /data {kind}")
    assert warnings_of("/data/keys.db") == []


@pytest.mark.parametrize(
    ("lines", "path", "kinds"),
    [
        (["x /data nfs4"], "/data/keys.db", ["nfs4"]),
        (["x /data nfs4"], "/database/keys.db", ["overlay"]),
        (["x /data nfs4", "y /data/local ext4"], "/data/local/keys.db", ["ext4"]),
        (["x /data ext4", "y /data nfs4"], "/data/keys.db", ["nfs4"]),
        (["x /data nfs4", "y /data ext4"], "/data/keys.db", ["ext4"]),
        (["x /data/local ext4", "y /data nfs4"], "/data/local/keys.db", ["nfs4", "ext4"]),
        (["x /data nfs4", "y / ext4"], "/data/keys.db", ["ext4", "nfs4"]),
        ([r"x /my\040data nfs4"], "/my data/keys.db", ["nfs4"]),
        ([r"x /a\011b\012c\134d\043e nfs4"], "/a\tb\nc\\d#e/keys.db", ["nfs4"]),
        (["x /line\u2028separator nfs4"], "/line\u2028separator/keys.db", ["nfs4"]),
        (["x /caf\udce9 nfs4"], "/caf\udce9/keys.db", ["nfs4"]),
    ],
)
def test_the_mount_that_counts(table: Table, lines: list[str], path: str, kinds: list[str]) -> None:
    """The deepest one, of several at one place the last; a later one hides what lies below it.
    Where a moved mount leaves that open, both count."""
    table.say(*lines)
    assert [mount.fs_type for mount in mounts_over(Path(path), mounts())] == kinds


def test_a_system_without_the_table_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only Linux has one."""
    monkeypatch.setattr("keylatch.storage.mounts._MOUNT_TABLE", tmp_path / "missing")
    assert warnings_of("/data/keys.db") == []


def test_a_link_to_a_network_is_followed_first(table: Table, tmp_path: Path) -> None:
    """What counts is where the file is."""
    (tmp_path / "remote").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "remote" / "keys.db")
    (tmp_path / "folder").symlink_to(tmp_path / "remote")
    table.say(f"x {tmp_path}/remote nfs4")
    for path in ("link.db", "folder/keys.db"):
        with pytest.raises(ConfigurationError, match="nfs4"):
            database_of(f"sqlite:///{tmp_path}/{path}")


@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-lock", "-journal"])
def test_a_mount_of_one_file_is_refused(table: Table, end: str) -> None:
    """The log would stay in a container that goes, and with it the last revocations."""
    table.say(f"/dev/sdb1 /data/keys.db{end} ext4")
    with pytest.raises(ConfigurationError, match=f"/data/keys.db{end} alone is a mount point"):
        database_of("sqlite:////data/keys.db")
    table.say("/dev/sdb1 /data ext4")
    assert warnings_of("/data/keys.db") == []


OPEN = """
import asyncio, sys
from keylatch.storage.store import Store
from keylatch.errors import ConfigurationError
async def opened(url):
    store = Store(url)
    await store.open(0)
    await store.close()
try:
    asyncio.run(opened(sys.argv[1]))
except ConfigurationError as error:
    print(error.mistakes[0][0])
else:
    print("opened")
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("mount", "link", "is_refused"),
    [
        ("keys.db", "", True),
        ("keys.db-wal", "", True),
        ("keys.db", "link.db", True),
        (".", "", False),
    ],
)
def test_a_real_mount_of_one_file_is_refused(
    tmp_path: Path, mount: str, link: str, is_refused: bool
) -> None:
    """As `docker run -v ./keys.db:/data/keys.db` makes one; one of the folder is taken."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting needs root and unshare: apt-get install util-linux")
    host, data = tmp_path / "host", tmp_path / "my data"
    for folder in (host, data):
        folder.mkdir()
        (folder / mount).touch()
    name = link or "keys.db"
    if link:
        (data / link).symlink_to(data / "keys.db")
    script = f'mount --bind "{host}/{mount}" "{data}/{mount}" || exit 77; exec "$@"'
    ended = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh"]
        + [sys.executable, "-c", OPEN, f"sqlite:///{data}/{name}"],
        capture_output=True,
        text=True,
    )
    if ended.returncode == 77:
        pytest.skip(f"mounting is not allowed here: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    expected = f"KEYLATCH_STORE: {data}/{mount} alone is a mount point, without its folder"
    assert ended.stdout.strip() == (expected if is_refused else "opened")
