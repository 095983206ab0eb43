"""`/metrics` for Prometheus: the metrics of this process, or of all workers that share a port.

A request to a shared port reaches any one of the workers. So each worker listens on a Unix socket
in a directory that they share, and the worker that is scraped fetches the metrics of the others
there: every response has the metrics of all workers, distinguished by the label `worker`. The
metrics of a worker that does not answer in time are missing, which Prometheus reads as a gap; a sum
over workers would fall instead, which Prometheus would read as a restart. A worker that dies leaves
its number to its successor.
"""

import asyncio
import contextlib
import fcntl
import os
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Final

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.process_collector import ProcessCollector
from starlette.requests import Request
from starlette.responses import Response

from keylatch.engine import Engine
from keylatch.metrics import Collector
from keylatch_sidecar.api.monitoring_access import operators_only

_FETCH_SECONDS: Final = 0.5
_MAX_WORKERS: Final = 4_096
_SAMPLE: Final = re.compile(r"^(\w+)(\{)?", re.MULTILINE)


class MetricsPage:
    """The metrics of this process and of the other workers.

    Args:
        engine: of this process.
        directory: of the workers' sockets; None: there is one worker.
    """

    def __init__(self, engine: Engine, directory: Path | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Collector(engine))
        ProcessCollector(registry=self._registry)
        self._directory = directory
        self._worker = ""

    @contextlib.asynccontextmanager
    async def shared_with_workers(self) -> AsyncIterator[None]:
        """Serves this process' metrics to the other workers until the end of the block."""
        if self._directory is None:
            yield
            return
        with _worker_number(self._directory) as number:
            self._worker = str(number)
            path = self._directory / f"{number}.sock"
            path.unlink(missing_ok=True)  # of the worker that had the number before
            async with await asyncio.start_unix_server(self._serve, path):
                yield

    async def text(self) -> str:
        """The metrics of all workers, in Prometheus' text format."""
        if self._directory is None:
            return self._own()
        sockets = self._directory.glob("*.sock")
        others = [_fetch(path) for path in sockets if path.stem != self._worker]
        return merge([self._own(), *await asyncio.gather(*others)])

    def _own(self) -> str:
        page = generate_latest(self._registry).decode()
        return _with_label(page, self._worker) if self._worker else page

    async def _serve(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            writer.write(self._own().encode())
            with contextlib.suppress(ConnectionError):
                await writer.drain()


@operators_only
async def metrics(request: Request) -> Response:
    """Show counts and durations of decisions, and the health of each component."""
    page: MetricsPage = request.app.state.metrics
    text = await page.text()
    return Response(text, 200, {"Cache-Control": "no-store"}, CONTENT_TYPE_PLAIN_0_0_4)


def merge(pages: Iterable[str]) -> str:
    """One page from several: each metric family once, with the samples of all pages."""
    families: dict[str, list[str]] = {}
    for page in pages:
        for family in page.split("# HELP ")[1:]:
            help_line, type_line, samples = family.split("\n", 2)
            families.setdefault(f"# HELP {help_line}\n{type_line}\n", []).append(samples)
    return "".join(head + "".join(samples) for head, samples in families.items())


def _with_label(page: str, worker: str) -> str:
    label = f'worker="{worker}"'
    return _SAMPLE.sub(lambda m: f"{m[1]}{{{label}{',' if m[2] else '}'}", page)


async def _fetch(path: Path) -> str:
    try:
        async with asyncio.timeout(_FETCH_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path)
            with contextlib.closing(writer):
                return (await reader.read()).decode()
    except (OSError, TimeoutError):  # the worker stops, or is busy
        return ""


@contextlib.contextmanager
def _worker_number(directory: Path) -> Iterator[int]:
    """The lowest number that no running worker has; the kernel unlocks those of dead workers."""
    for number in range(_MAX_WORKERS):
        lock = os.open(directory / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        try:
            yield number
        finally:
            os.close(lock)
        return
    raise OSError(f"more than {_MAX_WORKERS} workers share {directory}")
