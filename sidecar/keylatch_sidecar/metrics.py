"""`/metrics`, for Prometheus: this process and, where several workers share a port, all of them.

Whoever scrapes a shared port reaches any one of the workers. So each has a Unix socket in a folder
of theirs, and the one that is asked asks the others there: counters of all of them, told apart by
the label `worker`, in every answer. A worker that does not answer in time is missing in it, which
Prometheus takes for a gap; a sum would have fallen, and it would have taken that for a restart.
A worker that dies leaves its number to its successor.
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

_PATIENCE_SECONDS: Final = 0.5
_MAX_WORKERS: Final = 4_096
_SAMPLE: Final = re.compile(r"^(\w+)(\{)?", re.MULTILINE)


class Page:
    """The numbers of this process and of its siblings.

    Args:
        engine: whose numbers they are.
        folder: where the workers find each other; None: there is one.
    """

    def __init__(self, engine: Engine, folder: Path | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Collector(engine))
        ProcessCollector(registry=self._registry)
        self._folder = folder
        self._number = ""

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Siblings may ask until the end of the block."""
        if self._folder is None:
            yield
            return
        with _numbered(self._folder) as number:
            self._number = str(number)
            place = self._folder / f"{number}.sock"
            place.unlink(missing_ok=True)  # of the worker that had the number before
            async with await asyncio.start_unix_server(self._tell, place):
                yield

    async def text(self) -> str:
        """All of it, in Prometheus' text format."""
        if self._folder is None:
            return self._own()
        others = [
            _asked(place) for place in self._folder.glob("*.sock") if place.stem != self._number
        ]
        return merged([self._own(), *await asyncio.gather(*others)])

    def _own(self) -> str:
        page = generate_latest(self._registry).decode()
        return _labelled(page, self._number) if self._number else page

    async def _tell(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            writer.write(self._own().encode())
            with contextlib.suppress(ConnectionError):
                await writer.drain()


@operators_only
async def metrics(request: Request) -> Response:
    """What it has decided, how long that took, and how its parts are."""
    page: Page = request.app.state.metrics
    text = await page.text()
    return Response(text, 200, {"Cache-Control": "no-store"}, CONTENT_TYPE_PLAIN_0_0_4)


def merged(pages: Iterable[str]) -> str:
    """One page of several: each family once, with the samples of all."""
    families: dict[str, list[str]] = {}
    for page in pages:
        for family in page.split("# HELP ")[1:]:
            says, kind, samples = family.split("\n", 2)
            families.setdefault(f"# HELP {says}\n{kind}\n", []).append(samples)
    return "".join(head + "".join(samples) for head, samples in families.items())


def _labelled(page: str, worker: str) -> str:
    label = f'worker="{worker}"'
    return _SAMPLE.sub(lambda m: f"{m[1]}{{{label}{',' if m[2] else '}'}", page)


async def _asked(place: Path) -> str:
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            reader, writer = await asyncio.open_unix_connection(place)
            with contextlib.closing(writer):
                return (await reader.read()).decode()
    except (OSError, TimeoutError):  # it ends, or is held up
        return ""


@contextlib.contextmanager
def _numbered(folder: Path) -> Iterator[int]:
    """The lowest number that no living worker has; the kernel takes it back from the dead."""
    for number in range(_MAX_WORKERS):
        lock = os.open(folder / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
    raise OSError(f"more than {_MAX_WORKERS} workers share {folder}")
