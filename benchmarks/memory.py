"""What memory is spent on: bytes for each key in L1, for an idle sidecar, for each open connection.

    python benchmarks/memory.py [--entries 50000] [--connections 1000] [--json out.json]

L1 is filled by the engine itself, from a SQLite store with that many keys of a thousand
organisations, in a process of its own. Its resident size is read before and after (RSS, what the
operator pays), and what Python allocated for a fifth of them (tracemalloc, which says for what).
The sidecar is `keylatch serve` with one worker; its size is PSS, where shared pages count by share.
It takes about two minutes.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import linecache
import logging
import multiprocessing
import resource
import socket
import sys
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from keylatch.core.decisions import Allow
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.management.keyring import NewKey
from keylatch.settings import Settings

sys.path.append(str(Path(__file__).parent.parent))

from tests.support.proxies import SidecarProcess, auth_header

AIM_BYTES = 600
BATCH = 1_000
ORGANIZATIONS = 1_000


def size_of(process: int | str, what: str) -> int:
    """Bytes of a process, by a line of the kernel's `smaps_rollup`."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    [line] = [line for line in text.splitlines() if line.startswith(f"{what}:")]
    return int(line.split()[1]) * 1024


async def filled(folder: str, entries: int, traced: bool) -> dict[str, Any]:
    """Fill L1, and say what an entry takes."""
    url = f"sqlite:///{folder}/{entries}.db"
    engine = Engine(Settings.load(store=url, redis="", hasher="sha256"))
    keyring = await engine.keyring()
    tokens: list[Token] = []
    for start in range(0, entries, BATCH):
        numbers = range(start, min(start + BATCH, entries))
        new_keys = [NewKey(f"org{n % ORGANIZATIONS}", f"customer {n}") for n in numbers]
        tokens += [each.token for each in await keyring.create_many(new_keys)]
    await engine.authenticator.check_token(tokens[-1])  # whatever the first look-up needs
    await engine._usage.flush()
    gc.collect()
    if traced:
        tracemalloc.start()
    before = size_of("self", "Rss")
    for token in tokens[:-1]:
        if not isinstance(await engine.authenticator.check_token(token), Allow):
            raise SystemExit("error: a key was not accepted\nhint: see the lines above")
    await engine._usage.flush()
    gc.collect()
    result: dict[str, Any] = {"bytes": round((size_of("self", "Rss") - before) / entries)}
    if traced:
        snapshot = tracemalloc.take_snapshot()
        result = {"bytes": round(sum(each.size for each in snapshot.traces) / entries)}
        result["where"] = allocated(snapshot, entries)
    await engine.stop()
    return result


def allocated(snapshot: tracemalloc.Snapshot, entries: int) -> list[tuple[int, str]]:
    """Bytes an entry, by the line that allocated them; a line for less than one is left out."""
    sizes: Counter[str] = Counter()
    for statistic in snapshot.statistics("lineno"):
        frame = statistic.traceback[0]
        code = linecache.getline(frame.filename, frame.lineno).strip()
        sizes[f"{Path(frame.filename).name}:{frame.lineno}  {code[:60]}"] += statistic.size
    rounded = [(round(size / entries), place) for place, size in sizes.most_common(16)]
    return [(size, place) for size, place in rounded if size]


def _measured(folder: str, entries: int, traced: bool, answer: Any) -> None:
    logging.getLogger("keylatch").setLevel(logging.ERROR)
    answer.send(asyncio.run(filled(folder, entries, traced)))


def entry(folder: str, entries: int, *, traced: bool = False) -> dict[str, Any]:
    """`filled` in a process of its own, because memory that was freed is not given back."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=_measured, args=(folder, entries, traced, theirs))
    process.start()
    result: dict[str, Any] = ours.recv()
    process.join()
    return result


def sidecar(folder: str, connections: int) -> dict[str, float]:
    """PSS of an idle sidecar, and what each open connection adds to it."""
    running = SidecarProcess(Path(folder))
    try:
        field = auth_header(running.create(name="bench"))
        request = b"GET /verify HTTP/1.1\r\nHost: bench\r\n" + field + b"\r\n\r\n"
        pid = running._process.pid
        with contextlib.ExitStack() as stack:

            def connect() -> None:
                line = socket.create_connection(("127.0.0.1", running.port), timeout=10)
                stack.callback(line.close)
                line.sendall(request)
                if not line.recv(4_096).startswith(b"HTTP/1.1 200"):
                    raise SystemExit("error: the key was not accepted\nhint: see the lines above")

            for _ in range(20):
                connect()
            idle = size_of(pid, "Pss")
            for _ in range(connections):
                connect()
            return {
                "an idle sidecar, MB": round(idle / 1e6, 1),
                "a keep-alive connection, bytes": round((size_of(pid, "Pss") - idle) / connections),
            }
    finally:
        running.close()


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--entries", type=int, default=50_000)
    parser.add_argument("--connections", type=int, default=1_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    logging.getLogger("keylatch").setLevel(logging.ERROR)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the sidecar inherits it
    with (
        tempfile.TemporaryDirectory(prefix="keylatch-memory-") as folder,
        Console(stderr=True).status("filling L1, twice, and a sidecar"),
    ):
        traced = entry(folder, max(1, given.entries // 5), traced=True)
        results = {
            "an L1 entry, bytes (RSS)": entry(folder, given.entries)["bytes"],
            "an L1 entry, bytes (tracemalloc)": traced["bytes"],
            **sidecar(folder, given.connections),
        }
    table = Table(title=f"Memory; the aim for an L1 entry: {AIM_BYTES} bytes", show_header=False)
    for name, value in results.items():
        table.add_row(name, f"{value:,}")
    console = Console()
    console.print(table)
    console.print("Of an entry, by the line that allocated it:", highlight=False)
    for size, place in traced["where"]:
        console.print(f"  {size:>5}  {place}", highlight=False, markup=False)
    if given.json:
        given.json.write_text(json.dumps(results | {"where": traced["where"]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
