"""Has anybody committed to the SQLite file? Told by 48 bytes, without a call into SQLite.

In WAL mode all processes share a memory-mapped index, the `-shm` file, whose header changes with
every commit and every reset of the log (sqlite.org/walformat.html section 2.2). SQLite's mapping is
mapped once more here, and the file is not opened: whoever opens it and closes it again drops the
locks that SQLite holds on it, because POSIX locks belong to the process.
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
    """The header of the index. It means something while a connection to the file is open.

    It may be read from any thread, also while another one closes that connection: the mapping is
    our own, and goes when the last reader has gone.

    Args:
        libc: the C library.
        address: where this process has the index mapped.

    Raises:
        OSError: it cannot be mapped once more.
    """

    def __init__(self, libc: ctypes.CDLL, address: int) -> None:
        self._libc = libc
        # An old size of 0 makes a second mapping of the same shared pages: mremap(2).
        self._address = libc.mremap(address, 0, mmap.PAGESIZE, _MREMAP_MAYMOVE)
        if self._address == _MAP_FAILED:
            raise OSError("the index cannot be mapped once more")
        self.header = (ctypes.c_char * _HEADER_BYTES).from_address(self._address)
        """Its `raw` bytes equal those seen before if and only if nothing was committed since.

        They may be caught in the middle of a change. So they are read before the data is, and then
        differ at the next look. Whoever reads them holds on to this object, whose pages they are.
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
            # Names of files may be any bytes, and U+2028 in one ends no line.
            for line in os.fsdecode(_MAPS.read_bytes()).rstrip("\n").split("\n"):
                address_range, permissions, offset, _, mapped, *name = line.split(maxsplit=5)
                if (mapped, permissions, name) == (inode, "rw-s", [str(shm)]) and not int(
                    offset, 16
                ):
                    return cls(_libc, int(address_range.partition("-")[0], 16))
        except OSError:
            return None
        return None
