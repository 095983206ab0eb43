"""Programs that a benchmark starts: on free ports, ended by their ids; what they cost is counted.

Processor seconds and memory are those of a program and all its descendants, from `/proc`.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
TESTS: Final = FOLDER.parent / "tests"
sys.path.append(str(FOLDER.parent))

from tests.support.raw_http import send  # noqa: E402
from tests.support.servers import eventually, free_port  # noqa: E402

__all__ = [
    "AS_THE_SIDECAR",
    "FOLDER",
    "TESTS",
    "Program",
    "bare",
    "free_port",
    "running",
    "sidecar",
]

# What `keylatch serve` passes to uvicorn; see also `apps`.
AS_THE_SIDECAR: Final = (
    *("--ws", "none", "--no-proxy-headers", "--no-server-header", "--no-date-header"),
    *("--timeout-keep-alive", "75", "--no-access-log", "--log-level", "error"),
)


class Program:
    """A program that listens somewhere, until `close`.

    Args:
        command: what to run after this Python's `-m`, or a path of a script.
        place: where it listens: a base URL, or a Unix socket.
        environment: variables beside those that are there, which name no keylatch settings.
        path: answered with 200 once it is up.
    """

    def __init__(
        self,
        command: Sequence[str],
        place: str | Path,
        environment: Mapping[str, str] | None = None,
        path: str = "/healthz",
    ) -> None:
        self.place = place
        self._path = path
        outside = {k: v for k, v in os.environ.items() if not k.startswith("KEYLATCH_")}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env={**outside, **(environment or {})},
            cwd=FOLDER,  # apps are found by their module's name
            stdout=self._log,
            stderr=self._log,
        )
        try:
            eventually(self._is_up)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Its base URL."""
        assert isinstance(self.place, str)
        return self.place

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def _is_up(self) -> bool:
        if self._process.poll() is not None:
            self._log.seek(0)
            raise SystemExit(f"error: a server ended\n{self._log.read().decode()}")
        with contextlib.suppress(OSError, ValueError, IndexError):
            return send(self.place, f"GET {self._path}".encode()).status == 200
        return False

    def processor_seconds(self) -> float:
        """What it has cost so far."""
        return sum(self.costs().values())

    def costs(self) -> dict[int, float]:
        """The same for each of its processes."""
        return {pid: _processor_seconds(pid) for pid in self._family()}

    def memory_mib(self) -> float:
        """Proportional share of memory, of all its processes: pages shared by n count 1/n."""
        return sum(_pss_kib(pid) for pid in self._family()) / 1024

    def _family(self) -> list[int]:
        family = [self._process.pid]
        for pid in family:
            with contextlib.suppress(OSError):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    family += [int(word) for word in (thread / "children").read_text().split()]
        return family

    def terminate(self, seconds: float = 20) -> int:
        """Ask it to stop; its exit code."""
        self._process.terminate()
        return self._process.wait(timeout=seconds)

    def close(self) -> None:
        """Stop it, in good or in bad."""
        if self._process.poll() is None:
            try:
                self.terminate(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


def _processor_seconds(pid: int) -> float:
    """Of a process's threads that are there, to the nanosecond (`/proc/pid/stat` counts ticks)."""
    spent = 0
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            spent += int((thread / "schedstat").read_text().split()[0])
    return spent / 1e9


def _pss_kib(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


@contextlib.contextmanager
def running(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    path: str = "/healthz",
    uds: Path | None = None,
) -> Iterator[Program]:
    """A program until the end of the block.

    Args:
        command: `{port}` is where it shall listen, unless `uds` is given.
        environment: see `Program`.
        path: see `Program`.
        uds: where it listens instead.
    """
    port = free_port()
    place: str | Path = uds or f"http://127.0.0.1:{port}"
    program = Program([part.format(port=port) for part in command], place, environment, path)
    try:
        yield program
    finally:
        program.close()


def bare(
    workers: int = 1, grpc_port: int | None = None
) -> "contextlib.AbstractContextManager[Program]":
    """An app that allows whatever comes, served as the sidecar is."""
    command = [str(FOLDER / "apps.py"), "allow", "--port", "{port}", "--workers", str(workers)]
    return running(command + (["--grpc-port", str(grpc_port)] if grpc_port else []))


def sidecar(store: str, workers: int = 1) -> "contextlib.AbstractContextManager[Program]":
    """`keylatch serve` on a store."""
    command = ["-m", "keylatch_sidecar", "serve", "--port", "{port}", "--workers", str(workers)]
    return running(command, {"KEYLATCH_STORE": store, "KEYLATCH_REDIS": ""}, path="/readyz")
