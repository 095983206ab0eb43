"""SQLite's WAL index: 48 bytes that change with every commit, read without a call into SQLite.

In WAL mode all processes share a memory-mapped index, the `-shm` file, whose header changes with
every commit and every reset of the log (sqlite.org/walformat.html section 2.2). This module
duplicates SQLite's mapping and does not open the file: to open and close it would release the locks
that SQLite holds on it, because POSIX locks belong to the process.
"""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Final

_HEADER_BYTES: Final = 48
_MAPS: Final = Path("/proc/self/maps")
_MREMAP_MAYMOVE: Final = 1
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def _load_libc() -> ctypes.CDLL | None:
    """The C library if it has mremap(2): only Linux's has."""
    try:
        libc = ctypes.CDLL(None)
        libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
        libc.mremap.restype = ctypes.c_void_p
        libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    except (AttributeError, TypeError):  # macOS has no mremap; Windows needs a library's name
        return None
    return libc


_libc: Final = _load_libc()


class WalIndex:
    """The header of the index, valid while SQLite has a connection to the file.

    Any thread may read it, also while another one closes that connection: the object owns its
    mapping and unmaps it when the last reference is dropped.

    Args:
        libc: the C library.
        address: where this process has the index mapped.

    Raises:
        OSError: the mapping cannot be duplicated.
    """

    def __init__(self, libc: ctypes.CDLL, address: int) -> None:
        self._libc = libc
        # An old size of 0 makes a second mapping of the same shared pages: mremap(2).
        self._address = libc.mremap(address, 0, mmap.PAGESIZE, _MREMAP_MAYMOVE)
        if self._address == _MAP_FAILED:
            raise OSError("the mapping of the WAL index cannot be duplicated")
        self.header = (ctypes.c_char * _HEADER_BYTES).from_address(self._address)
        """Its `raw` bytes equal those read before if and only if nothing was committed since.

        A read may see a half-written header. So read the header before the data: the next read of
        the header then differs. Keep a reference to this object while reading: it owns the pages.
        """

    def __del__(self) -> None:
        if self._address != _MAP_FAILED:
            self._libc.munmap(self._address, mmap.PAGESIZE)

    @classmethod
    def of(cls, database: Path) -> "WalIndex | None":
        """The index of a database that this process has open and has read from; None where the
        system does not tell, or has no mremap(2)."""
        if _libc is None:
            return None
        shm = database.with_name(database.name + "-shm")
        try:
            inode = str(shm.stat().st_ino)
            # A file name may be any bytes; U+2028 in it must not end a line.
            for line in os.fsdecode(_MAPS.read_bytes()).rstrip("\n").split("\n"):
                address_range, permissions, offset, _, mapped, *name = line.split(maxsplit=5)
                if (mapped, permissions, name) == (inode, "rw-s", [str(shm)]) and not int(
                    offset, 16
                ):
                    return cls(_libc, int(address_range.partition("-")[0], 16))
        except OSError:
            return None
        return None
