"""The addresses on which the sidecars of a store listen on this host, from proc(5).

Only processes whose files this account may read are found: its own, and all of them for root.
"""

import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from keylatch._variables import variable_name
from keylatch.settings import Settings
from keylatch_sidecar.http_server import loopback
from keylatch_sidecar.operations.doctor.finding import Finding, ok, warning

_PROC: Final = Path("/proc")
_LISTENING: Final = "0A"
_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")
_PROGRAM: Final = re.compile(r"keylatch(_sidecar)?(/__main__\.py)?$")


def examine(store: str) -> Iterator[Finding]:
    """Whether a sidecar of this store accepts tokens over plain HTTP from other hosts."""
    servers = [each for each in _servers() if each.store == _canonical_store(store, Path.cwd())]
    plaintext = [
        f"{server.pid} on {host}:{port}"
        for server in servers
        for host, port in server.listens_on()
        if not loopback.is_address(host)
    ]
    if plaintext:
        message = f"{loopback.PLAIN_HTTP}: process {', '.join(plaintext)}"
        yield warning("listeners", message, loopback.HINT)
    elif servers:
        yield ok("listeners", "loopback and Unix sockets only")


@dataclass(frozen=True, slots=True)
class Server:
    """A process that runs `keylatch serve`."""

    pid: int
    arguments: list[str]
    variables: Mapping[str, str]
    folder: Path

    @property
    def store(self) -> str:
        """Its store, in the form of `_canonical_store`."""
        given = self._option("--store") or self.variables.get(variable_name("store"), "")
        file = self.variables.get(variable_name("store_file"), "")
        if not given and file:
            with suppress(OSError, UnicodeDecodeError):
                given = (self.folder / file).read_text().strip()
        default = str(Settings.model_fields["store"].default)
        return _canonical_store(given or default, self.folder)

    def listens_on(self) -> Iterator[tuple[str, int]]:
        """Addresses and ports that accept tokens: all except that for metrics."""
        process = _PROC / str(self.pid)
        own = _sockets(process / "fd")
        for row in (*_rows(process / "net/tcp"), *_rows(process / "net/tcp6")):
            host, port = _address(row[1])
            is_own = row[3] == _LISTENING and row[9] in own
            if is_own and str(port) != self._option("--metrics-port"):
                yield host, port

    def _option(self, name: str) -> str:
        for word, value in zip(self.arguments, [*self.arguments[1:], ""], strict=True):
            if word == name:
                return value
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        return ""


def _servers() -> Iterator[Server]:
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another account
            arguments = _read_strings(process / "cmdline")
            if "serve" in arguments and any(map(_PROGRAM.search, arguments)):
                pairs = (text.partition("=") for text in _read_strings(process / "environ"))
                variables = {name: value for name, _, value in pairs}
                list((process / "fd").iterdir())  # raises if this account may not read it
                yield Server(int(process.name), arguments, variables, (process / "cwd").readlink())


def _canonical_store(url: str, folder: Path) -> str:
    """The same text for all URLs of the same SQLite file; other URLs unchanged."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return url
    if parsed.get_backend_name() != "sqlite":
        return url
    return os.path.realpath(folder / (parsed.database or ""))


def _read_strings(path: Path) -> list[str]:
    return path.read_text(errors="replace").rstrip("\0").split("\0")


def _sockets(descriptors: Path) -> set[str]:
    """The inodes of the open sockets of a process; none if it has ended."""
    links: list[str] = []
    with suppress(OSError):
        for each in descriptors.iterdir():
            with suppress(OSError):  # it was closed meanwhile
                links.append(str(each.readlink()))
    return {found[1] for link in links if (found := _SOCKET.fullmatch(link))}


def _rows(table: Path) -> list[list[str]]:
    with suppress(OSError):  # a kernel without IPv6, or a process that has ended
        return [line.split() for line in table.read_text().splitlines()[1:]]
    return []


def _address(text: str) -> tuple[str, int]:
    """An address as in /proc/net/tcp: words of 32 bits in the host's byte order."""
    words, _, port = text.partition(":")
    packed = b"".join(
        int(words[start : start + 8], 16).to_bytes(4, sys.byteorder)
        for start in range(0, len(words), 8)
    )
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, packed), int(port, 16)
