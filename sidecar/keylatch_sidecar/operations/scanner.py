"""Finds keylatch tokens in files; `keylatch_sidecar.cli.scan` looks up their keys.

A regular expression needs word boundaries, and leaked tokens do not always have them
(`KEY_kl_live_…`, `%20kl_live_…`, a JSON `\\nkl_live_…`). Here the CRC-32 decides where a token
begins, so the text around it does not matter.

Files of any size are read in chunks. Files that `git` and `grep` regard as binary and compressed
git objects are skipped, and counted as skipped, unless the operator includes them.
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

from keylatch.core.tokens import (
    CRC_LENGTH,
    ID_LENGTH,
    MAC_LENGTH,
    MAX_LENGTH,
    SECRET_LENGTH,
    Token,
    has_valid_checksum,
)

MAX_BYTES: Final = 50_000_000
BINARY: Final = "binary"
TOO_LARGE: Final = "larger than 50 MB"
HISTORY: Final = "git history"

_CHUNK: Final = 1 << 20
_TAIL: Final = SECRET_LENGTH + MAC_LENGTH + CRC_LENGTH
_CORE: Final = re.compile(rb"_[A-Za-z0-9]{%d}_[A-Za-z0-9]{%d}" % (ID_LENGTH, _TAIL))
_MAX_WORD_LENGTH: Final = 16  # of the longest prefix and the longest environment
_PREFIX_BEFORE: Final = re.compile(
    rb"([a-z0-9]{2,%d})_([a-z][a-z0-9]{0,%d})\Z" % (_MAX_WORD_LENGTH, _MAX_WORD_LENGTH - 1)
)
_UTF_16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what PowerShell's > writes


@dataclass(frozen=True, slots=True)
class FoundToken:
    """A token and its place. The first line is 1."""

    path: str
    line: int
    token: Token


class Scanner:
    """Collects the tokens of files.

    Args:
        include_all: also of binary and large files and of git objects.
    """

    def __init__(self, *, include_all: bool = False) -> None:
        self._include_all = include_all
        self.found: list[FoundToken] = []
        self.file_count = 0
        """Files that were scanned."""
        self.skipped: Counter[str] = Counter()
        """Reason → number of files or folders that were skipped."""
        self.unreadable: list[tuple[str, str]] = []
        """Path and error of each file or folder that could not be read."""

    def files_of(self, path: Path) -> Iterator[Path]:
        """The file itself, or the regular files below a folder; symbolic links are not followed."""
        if not path.is_dir():
            yield path
            return
        for folder, folders, names in os.walk(path, onerror=self._record_unreadable):
            if folder.endswith(".git") and "objects" in folders and not self._include_all:
                folders.remove("objects")
                self.skipped[HISTORY] += 1
            folders.sort()
            for name in sorted(names):
                file = Path(folder, name)
                if stat.S_ISREG(file.lstat().st_mode):
                    yield file

    def scan_file(self, path: Path) -> None:
        """Add the tokens of a file."""
        try:
            with path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                is_huge = stat.S_ISREG(status.st_mode) and status.st_size > MAX_BYTES
                if is_huge and not self._include_all:
                    self.skipped[TOO_LARGE] += 1
                else:
                    self.scan_stream(stream, str(path))
        except OSError as error:
            self._record_unreadable(error, str(path))

    def scan_stream(self, stream: BinaryIO, path: str) -> None:
        """Add the tokens of a stream of bytes."""
        first = stream.read(_CHUNK)
        encoding = "utf-16" if first.startswith(_UTF_16) else None
        if encoding is None and b"\0" in first and not self._include_all:
            self.skipped[BINARY] += 1
            return
        self.file_count += 1
        for line, token in _tokens_in_chunks(_chunks(first, stream, encoding)):
            self.found.append(FoundToken(path, line, token))

    def _record_unreadable(self, error: OSError, path: str = "") -> None:
        self.unreadable.append(
            (path or str(error.filename), error.strerror or type(error).__name__)
        )


def _chunks(first: bytes, stream: BinaryIO, encoding: str | None) -> Iterator[bytes]:
    decode = codecs.getincrementaldecoder(encoding)("replace").decode if encoding else None
    chunk = first
    while chunk:
        yield chunk if decode is None else decode(chunk).encode("ascii", "replace")
        chunk = stream.read(_CHUNK)


def _tokens_in_chunks(chunks: Iterator[bytes]) -> Iterator[tuple[int, Token]]:
    """Line and token; a token that spans two chunks is found in the second."""
    window, line = b"", 1
    for chunk in chunks:
        overlap = window[-MAX_LENGTH:]
        line += window.count(b"\n", 0, len(window) - len(overlap))
        window = overlap + chunk
        counted_to = 0
        token_line = line
        for start, end, token in tokens_in(window):
            if end > len(overlap):
                token_line += window.count(b"\n", counted_to, start)
                counted_to = start
                yield token_line, token


def tokens_in(data: bytes) -> Iterator[tuple[int, int, Token]]:
    """Start, end and token of every token, whatever surrounds it."""
    match = _CORE.search(data)
    while match is not None:
        start = match.start()
        left = _PREFIX_BEFORE.search(data, max(0, start - 2 * _MAX_WORD_LENGTH - 1), start)
        token = _token_ending_in(left, match[0]) if left is not None else None
        if token is not None:
            yield match.end() - len(token.reveal()), match.end(), token
        match = _CORE.search(data, start + 1 if token is None else match.end())


def _token_ending_in(left: "re.Match[bytes]", core: bytes) -> Token | None:
    """The token that ends with `core`; its CRC-32 decides where in `left` it begins."""
    word, environment = left[1].decode(), left[2].decode()
    for start in range(len(word) - 1):
        text = f"{word[start:]}_{environment}{core.decode()}"
        if has_valid_checksum(text):
            return Token(text)
    return None
