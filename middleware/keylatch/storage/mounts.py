"""The file system of a path, according to /proc/self/mounts (proc(5), fstab(5)).

The law of this file: it reads that one file and decides by the names of file systems. A store on a
file system without POSIX locks or shared memory loses changes, and with them revocations.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MOUNT_TABLE: Final = Path("/proc/self/mounts")
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")
"""The kernel writes space, tab, newline, backslash and # of a path as octal numbers."""

_NETWORK_TYPES: Final = (
    *("9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs", "gfs2"),
    *("glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs"),
    *("panfs", "pvfs2", "smb2", "smb3", "smbfs", "wekafs"),
)
_VIRTUAL_MACHINE_TYPES: Final = (
    *("virtiofs", "fakeowner", "osxfs", "drvfs"),  # Docker Desktop and WSL
    *("vboxsf", "prl_fs", "vmhgfs"),  # VirtualBox, Parallels, VMware
)
_FUSE_PROGRAMS: Final = (
    *("grpcfuse", "osxfs", "vmhgfs-fuse", "prl_fsd"),  # of virtual machines
    *("afp", "ceph", "ceph-fuse", "curlftpfs", "davfs", "davfs2", "fuse-nfs", "ftpfs"),
    *("glusterfs", "google-drive-ocamlfuse", "gvfsd-fuse", "hdfs", "fuse_dfs"),
    *("lizardfs", "mfs", "moosefs", "mfsmount", "nfs", "onedriver", "orangefs"),
    *("saunafs", "seaweedfs", "weed", "smbnetfs", "sshfs"),
    # buckets
    *("alluxio", "alluxio-fuse", "blobfuse", "blobfuse2", "cosfs", "gcsfuse", "geesefs"),
    *("goofys", "juicefs", "mountpoint-s3", "obsfs", "ossfs", "ossfs2", "rclone"),
    *("riofs", "s3fs", "s3ql", "tigrisfs", "yas3fs"),
)
_REFUSED_TYPES: Final = {
    *_NETWORK_TYPES,
    *_VIRTUAL_MACHINE_TYPES,
    *(f"fuse.{name}" for name in _FUSE_PROGRAMS),
}


@dataclass(frozen=True, slots=True)
class Mount:
    """An entry of the mount table.

    Args:
        mount_point: an absolute path.
        fs_type: the type of the file system; for FUSE with the name of its program, if that is
            known: `fuse.sshfs`.
    """

    mount_point: Path
    fs_type: str

    @property
    def is_network(self) -> bool:
        """Whether SQLite's locks or its shared memory do not work there."""
        return self.fs_type in _REFUSED_TYPES

    @property
    def is_unknown(self) -> bool:
        """Whether that depends on a FUSE program that this file does not list."""
        return self.fs_type.partition(".")[0] == "fuse" and not self.is_network


def mounts() -> list[Mount]:
    """All mounts, in the order of the table; empty: the system has no such table."""
    if not _MOUNT_TABLE.exists():
        return []
    try:
        table = _MOUNT_TABLE.read_text()
    except UnicodeDecodeError:  # a mount point may be any bytes
        table = os.fsdecode(_MOUNT_TABLE.read_bytes())
    lines = (line.split(" ") for line in table.split("\n"))  # U+2028 in a name must not end a line
    return [_mount(*fields[:3]) for fields in lines if len(fields) >= 3]


def mounts_over(path: Path, table: Iterable[Mount]) -> list[Mount]:
    """The mounts that may contain a path: one, or two where the table does not show which.

    A later mount hides earlier ones at and below its mount point, so the last mount over the path
    counts; but a mount that was moved keeps its place in the table. If the last one and the deepest
    one differ, both are returned.
    """
    over = [mount for mount in table if path.is_relative_to(mount.mount_point)]
    if not over:
        return []
    last = over[-1]
    deepest = max(reversed(over), key=lambda mount: len(mount.mount_point.parts))
    return [last] if deepest == last else [last, deepest]


def _mount(source: str, mount_point: str, fs_type: str) -> Mount:
    if fs_type == "fuse":  # without a subtype; some programs give their name as the source
        fs_type = f"fuse.{source.rpartition('/')[2]}"
    return Mount(Path(_unescape(mount_point)), fs_type.lower())


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)
