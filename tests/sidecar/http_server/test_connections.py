"""Which connections a process keeps where more come than it has file descriptors for.

uvicorn's own protocol, which keeps all, is the broken twin.
"""

import contextlib
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from keylatch_sidecar.http_server.connections import Connection, Connections
from keylatch_sidecar.http_server.file_descriptors import descriptor_limit, raise_descriptor_limit
from keylatch_sidecar.http_server.limits import MAX_DESCRIPTORS, Limits
from tests.support.command_line import SCRIPT, Operator
from tests.support.raw_connections import HOST, is_silent, rest_of
from tests.support.raw_http import exchange, parse_response
from tests.support.servers import eventually, free_port


@dataclass(eq=False)
class Silent:
    """A connection, as far as `Connections` needs it."""

    eviction_rank: tuple[int, float] | None
    ends: int = 0

    @property
    def transport(self) -> "Silent":
        return self

    def abort(self) -> None:
        self.ends += 1
        self.eviction_rank = None

    def close_if_timed_out(self, now: float) -> None:
        pass


def crowd(*silences: tuple[int, float] | None) -> tuple[Connections, set[Silent], list[Silent]]:
    """As many connections as there may be; their set, and they in order."""
    made = [Silent(silence) for silence in silences]
    everyone = set(made)
    return Connections(Limits(), cast("set[Connection]", everyone), len(made)), everyone, made


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("silences", "ended"),
    [
        ([(0, 3.0), (0, 1.0), (0, 2.0)], [1, 2, 0]),
        ([(1, 1.0), (0, 9.0), None], [1, 0]),
        ([(2, 1.0), (1, 2.0), (0, 3.0)], [2, 1, 0]),
        ([None, None], []),
    ],
    ids=["the oldest first", "one without a request first", "one amid a request last", "none"],
)
async def test_the_oldest_silent_connection_makes_room(
    silences: list[tuple[int, float] | None], ended: list[int]
) -> None:
    """One for each that comes; one whose request is being answered is never closed for another.
    Where all are, the new one goes."""
    connections, everyone, made = crowd(*silences)
    order = []
    for _ in range(len(silences)):
        new = Silent(None)
        everyone.add(new)
        connections.add(cast(Connection, new))
        gone = [each for each in made if each.ends] if not new.ends else [new]
        order += [made.index(each) for each in gone if each in made and each in everyone]
        everyone.difference_update(gone)
    assert order == ended


@pytest.mark.anyio
async def test_a_connection_that_was_silent_and_is_not_any_more_stays() -> None:
    """The silent ones are found once for many new ones, and each is checked before it is closed."""
    connections, everyone, made = crowd((0, 1.0), (0, 2.0), (0, 3.0))
    for expected in (made[0], made[2]):
        new = Silent((0, 9.0))
        everyone.add(new)
        connections.add(cast(Connection, new))
        assert [each for each in everyone if each.ends] == [expected]
        everyone.remove(expected)
        made[1].eviction_rank = None


def limited(most: int, command: list[str]) -> list[str]:
    """Runs a command with so many descriptors, of which its soft limit is half."""
    return [
        "bash",
        "-c",
        f'ulimit -Sn {most // 2} && ulimit -Hn {most} && exec "$@"',
        "-",
        *command,
    ]


@contextlib.contextmanager
def crowded(
    command: list[str], address: Any, connections: int, folder: Path
) -> Iterator[tuple["subprocess.Popen[bytes]", list[socket.socket]]]:
    """A server with few descriptors, and more connections than it has, on which nothing is said."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    process = subprocess.Popen(
        limited(200, command), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lines: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(process.send_signal, signal.SIGKILL)
        eventually(lambda: is_answered(address) or process.poll() is not None)
        assert process.poll() is None, "it could not start"
        for _ in range(connections):
            line = stack.enter_context(socket.socket(family))
            line.settimeout(5)
            with contextlib.suppress(OSError):
                line.connect(address)
            lines.append(line)
        yield process, lines


def is_answered(address: Any) -> bool:
    """Whether a request on a connection of its own is answered."""
    place = Path(address) if isinstance(address, str) else f"http://{address[0]}:{address[1]}"
    with contextlib.suppress(OSError, IndexError):
        request = b"GET /healthz" + HOST + b"Connection: close\r\n\r\n"
        return parse_response(exchange(place, request)).status == 200
    return False


def in_use(process: "subprocess.Popen[bytes]") -> int:
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


@pytest.mark.long
@pytest.mark.parametrize("way", ["port", "uds"])
def test_connections_without_requests_keep_no_others_out(operator: Operator, way: str) -> None:
    """Of 200 descriptors 160 are used at most, though 500 connections come; the soft limit, which
    is 100, is raised before. The first are closed, the last are open, and all requests are
    answered."""
    address: Any = ("127.0.0.1", free_port())
    words = ["--port", str(address[1])]
    if way == "uds":
        address = str(operator.folder / "keylatch.sock")
        words = ["--uds", address]
    command = [str(SCRIPT), "serve", *words]
    with crowded(command, address, 500, operator.folder) as (process, lines):
        raised = Path(f"/proc/{process.pid}/limits").read_text()
        assert raised.partition("Max open files")[2].split()[:2] == ["200", "200"]
        assert rest_of(lines[0]) == b""
        assert all(is_answered(address) for _ in range(20))
        eventually(lambda: in_use(process) <= 160)
        assert in_use(process) > 140
        assert is_silent(lines[-1], 0.1)


@pytest.mark.long
def test_uvicorns_own_protocol_lets_no_more_in(tmp_path: Path) -> None:
    """The broken twin: silent connections take all of its descriptors, and requests are reset."""
    (tmp_path / "app.py").write_text(
        "from starlette.applications import Starlette\nfrom starlette.routing import Route\n"
        "from starlette.responses import Response\n"
        "app = Starlette(routes=[Route('/healthz', lambda request: Response())])\n"
    )
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)]
    with crowded(command, ("127.0.0.1", port), 500, tmp_path):
        assert not is_answered(("127.0.0.1", port))


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    """And not beyond what is of use; a limit that is higher is left as it is."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert before[1] == resource.RLIM_INFINITY or before[1] >= 512
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        raise_descriptor_limit()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert (soft, hard) == (descriptor_limit(), before[1])
        assert soft == (MAX_DESCRIPTORS if hard < 0 else min(hard, MAX_DESCRIPTORS))
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
