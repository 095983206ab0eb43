"""Has anybody committed to the SQLite file? Told by 48 bytes, without a call into SQLite.

In WAL mode all processes share a memory-mapped index, the `-shm` file, whose header changes with
every commit and every reset of the log (sqlite.org/walformat.html section 2.2). It is read where
SQLite has mapped it itself: whoever opens that file on his own and closes it again drops the
locks that SQLite holds on it, because POSIX locks belong to the process.
"""

import ctypes
from pathlib import Path
from typing import Final

_HEADER_BYTES: Final = 48
_MAPS: Final = Path("/proc/self/maps")


class WalIndex:
    """The header of the index, for as long as a connection to the file is open.

    Args:
        address: where the index begins in this process.
    """

    def __init__(self, address: int) -> None:
        self._header = (ctypes.c_char * _HEADER_BYTES).from_address(address)

    def header(self) -> bytes:
        """The bytes; equal to those seen before if and only if nothing was committed since.

        They may be caught in the middle of a change. So they are read before the data is, and then
        differ at the next look.
        """
        return self._header.raw

    @classmethod
    def of(cls, database: Path) -> "WalIndex | None":
        """The index of a database that this process has open and has read from; None where the
        system does not tell."""
        shm = database.with_name(database.name + "-shm")
        try:
            inode = str(shm.stat().st_ino)
            lines = _MAPS.read_text().splitlines()
        except OSError:
            return None
        for line in lines:
            span, access, offset, _, mapped, *name = line.split(maxsplit=5)
            if (mapped, access, name) == (inode, "rw-s", [str(shm)]) and not int(offset, 16):
                return cls(int(span.partition("-")[0], 16))
        return None
