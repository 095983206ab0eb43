"""Where keylatch tokens stand in files. Whose they are is for `commands.scan` to ask.

A published regular expression has to lean on word boundaries, and leaks do not keep to them
(`KEY_kl_live_…`, `%20kl_live_…`, a JSON `\\nkl_live_…`). Here the CRC-32 decides where a token
begins, so whatever stands around it does not matter.

Files are read by the chunk, whatever their size. What `git` and `grep` take for binary is left out
unless it is asked for, and so is what git keeps compressed; the tally says so.
"""

import codecs
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from keylatch.tokens import (
    CHECK_LENGTH,
    CRC_LENGTH,
    ID_LENGTH,
    MAX_LENGTH,
    SECRET_LENGTH,
    Token,
    looks_minted,
)

MAX_BYTES: Final = 50_000_000
BINARY: Final = "binary"
HUGE: Final = "larger than 50 MB"
HISTORY: Final = "git history"

_CHUNK: Final = 1 << 20
_TAIL: Final = SECRET_LENGTH + CHECK_LENGTH + CRC_LENGTH
_CORE: Final = re.compile(rb"_[A-Za-z0-9]{%d}_[A-Za-z0-9]{%d}" % (ID_LENGTH, _TAIL))
_WORD: Final = 16  # of the longest prefix and the longest environment
_LEFT: Final = re.compile(rb"([a-z0-9]{2,%d})_([a-z][a-z0-9]{0,%d})\Z" % (_WORD, _WORD - 1))
_UTF_16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what PowerShell's > writes


@dataclass(frozen=True, slots=True)
class Sighting:
    """A token, and where it stands. Lines count from 1."""

    place: str
    line: int
    token: Token


class Search:
    """Looks into files, one after the other.

    Args:
        everything: also into what is binary, huge, or git's own.
    """

    def __init__(self, *, everything: bool = False) -> None:
        self._everything = everything
        self.sightings: list[Sighting] = []
        self.files = 0
        """How many were looked into."""
        self.left_out: Counter[str] = Counter()
        """What was not looked into, by why."""
        self.unread: list[tuple[str, str]] = []
        """What should have been and could not: place and why."""

    def files_of(self, path: Path) -> Iterator[Path]:
        """The file itself, or the regular files below a folder; symbolic links below are left."""
        if not path.is_dir():
            yield path
            return
        for folder, folders, names in os.walk(path, onerror=self._missed):
            if folder.endswith(".git") and "objects" in folders and not self._everything:
                folders.remove("objects")
                self.left_out[HISTORY] += 1
            folders.sort()
            for name in sorted(names):
                file = Path(folder, name)
                if stat.S_ISREG(file.lstat().st_mode):
                    yield file

    def look_into(self, path: Path) -> None:
        """Add what stands in a file."""
        try:
            with path.open("rb") as stream:
                about = os.fstat(stream.fileno())
                is_huge = stat.S_ISREG(about.st_mode) and about.st_size > MAX_BYTES
                if is_huge and not self._everything:
                    self.left_out[HUGE] += 1
                else:
                    self.read(stream, str(path))
        except OSError as error:
            self._missed(error, str(path))

    def read(self, stream: BinaryIO, place: str) -> None:
        """Add what stands in a stream of bytes."""
        first = stream.read(_CHUNK)
        encoding = "utf-16" if first.startswith(_UTF_16) else None
        if encoding is None and b"\0" in first and not self._everything:
            self.left_out[BINARY] += 1
            return
        self.files += 1
        for line, token in _in_chunks(_chunks(first, stream, encoding)):
            self.sightings.append(Sighting(place, line, token))

    def _missed(self, error: OSError, place: str = "") -> None:
        self.unread.append((place or str(error.filename), error.strerror or type(error).__name__))


def _chunks(first: bytes, stream: BinaryIO, encoding: str | None) -> Iterator[bytes]:
    decode = codecs.getincrementaldecoder(encoding)("replace").decode if encoding else None
    chunk = first
    while chunk:
        yield chunk if decode is None else decode(chunk).encode("ascii", "replace")
        chunk = stream.read(_CHUNK)


def _in_chunks(chunks: Iterator[bytes]) -> Iterator[tuple[int, Token]]:
    """Line and token; one that lies across two chunks is found in the second."""
    window, line = b"", 1
    for chunk in chunks:
        kept = window[-MAX_LENGTH:]
        line += window.count(b"\n", 0, len(window) - len(kept))
        window = kept + chunk
        at = 0
        here = line
        for start, end, token in tokens_in(window):
            if end > len(kept):
                here += window.count(b"\n", at, start)
                at = start
                yield here, token


def tokens_in(data: bytes) -> Iterator[tuple[int, int, Token]]:
    """Every token among the bytes, from where to where, whatever stands before and behind it."""
    match = _CORE.search(data)
    while match is not None:
        start = match.start()
        left = _LEFT.search(data, max(0, start - 2 * _WORD - 1), start)
        token = _ending(left, match[0]) if left is not None else None
        if token is not None:
            yield match.end() - len(token.reveal()), match.end(), token
        match = _CORE.search(data, start + 1 if token is None else match.end())


def _ending(left: "re.Match[bytes]", core: bytes) -> Token | None:
    """The token that begins where its CRC-32 says so."""
    word, environment = left[1].decode(), left[2].decode()
    for start in range(len(word) - 1):
        text = f"{word[start:]}_{environment}{core.decode()}"
        if looks_minted(text):
            return Token(text)
    return None
