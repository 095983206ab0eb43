"""Whether a look-up that no cache answers takes longer when there are a million keys.

    python benchmarks/scale.py [--large 1000000] [--only sqlite] [--rounds 31] [--json out.json]
    python benchmarks/scale.py --store postgresql://…/small --store postgresql://…/large

Two stores of the same kind are filled (a million keys take two to four minutes), then asked in
turn for keys chosen at random: L1 is emptied before each round, there is no Redis, and hashes are
SHA-256, so what is measured is the store's part. Ratios are taken round by round. Without `--store`
it uses files in a temporary folder, and a PostgreSQL of its own where one is installed.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from keylatch.core.decisions import Allow
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.management.keyring import NewKey
from keylatch.settings import Settings

sys.path.append(str(Path(__file__).parent.parent))

from tests.support.servers import PostgresServer

BATCH = 1_000
ORGANIZATIONS = 1_000
REMEMBERED = 100_000
HEADINGS = ("small us", "large us", "ratio", "quartiles", "keys per second, made")
COLUMNS = TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()


@dataclass
class Filled:
    """A store with keys in it."""

    engine: Engine
    tokens: list[Token]
    keys_per_second: float


async def filled(url: str, keys: int, progress: Progress) -> Filled:
    """Fill a store, and keep some of its tokens."""
    engine = Engine(Settings.load(store=url, redis="", hasher="sha256"))
    keyring = await engine.keyring()
    task = progress.add_task(f"{url.partition(':')[0]}, {keys:,} keys", total=keys)
    tokens: list[Token] = []
    began = time.perf_counter()
    for start in range(0, keys, BATCH):
        numbers = range(start, min(start + BATCH, keys))
        new_keys = [NewKey(f"org{n % ORGANIZATIONS}", f"customer {n}") for n in numbers]
        made = await keyring.create_many(new_keys)
        tokens += [each.token for each in made if random.random() < REMEMBERED / keys]
        progress.advance(task, len(made))
    spent = time.perf_counter() - began
    await keyring.analyze()
    await engine.store.run_maintenance(int(time.time() * 1000))
    return Filled(engine, tokens, keys / spent)


async def cold(store: Filled, lookups: int) -> float:
    """Microseconds for a look-up, averaged over many, each of another key."""
    tokens = random.sample(store.tokens, min(lookups, len(store.tokens)))
    store.engine._l1.clear()
    began = time.perf_counter()
    decisions = [await store.engine.authenticator.check_token(token) for token in tokens]
    spent = time.perf_counter() - began
    if not all(isinstance(decision, Allow) for decision in decisions):
        raise SystemExit("error: not every key was accepted\nhint: see the lines above")
    return spent / len(tokens) * 1e6


async def measure(urls: tuple[str, str], given: argparse.Namespace) -> dict[str, Any]:
    """Fill two stores and ask them in turn."""
    with Progress(*COLUMNS, console=Console(stderr=True), transient=True) as progress:
        stores = [
            await filled(url, keys, progress)
            for url, keys in zip(urls, (given.small, given.large), strict=True)
        ]
        task = progress.add_task("asking them in turn", total=given.rounds)
        rounds: list[tuple[float, float]] = []
        for turn in range(given.rounds + 1):
            order = stores if turn % 2 else stores[::-1]
            spent = {id(store): await cold(store, given.lookups) for store in order}
            rounds.append((spent[id(stores[0])], spent[id(stores[1])]))
            progress.advance(task)
    for store in stores:
        await store.engine.stop()
    ratios = sorted(large / small for small, large in rounds[1:])  # the first one warms up
    return {
        "keys": [given.small, given.large],
        "keys per second, made": round(stores[1].keys_per_second),
        "small us": round(statistics.median(small for small, _ in rounds[1:]), 1),
        "large us": round(statistics.median(large for _, large in rounds[1:]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-len(ratios) // 4], 3)],
    }


@contextlib.contextmanager
def pairs(given: argparse.Namespace) -> Iterator[dict[str, tuple[str, str]]]:
    """Store URLs to fill, by kind."""
    if given.store:
        small, large = given.store
        yield {small.partition(":")[0]: (small, large)}
        return
    found: dict[str, tuple[str, str]] = {}
    with contextlib.ExitStack() as stack:
        if given.only != "postgresql":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="keylatch-scale-"))
            found["sqlite"] = (f"sqlite:///{folder}/small.db", f"sqlite:///{folder}/large.db")
        if given.only != "sqlite" and any(Path("/usr/lib/postgresql").glob("*/bin/postgres")):
            server = PostgresServer()
            stack.callback(server.remove)
            found["postgresql"] = (server.new_database(), server.new_database())
        yield found


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--small", type=int, default=1_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    parser.add_argument("--store", action="append", help="two empty ones, instead of our own")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--lookups", type=int, default=500)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.store and len(given.store) != 2:
        parser.error("--store is given twice, for the small and the large one, or not at all")
    logging.getLogger("keylatch").setLevel(logging.ERROR)
    with pairs(given) as found:
        results = {kind: asyncio.run(measure(urls, given)) for kind, urls in found.items()}
    table = Table(title=f"A cold look-up, {given.large:,} keys ÷ {given.small:,}; the aim: 1.15")
    table.add_column("")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for kind, result in results.items():
        table.add_row(kind, *(str(result[heading]) for heading in HEADINGS))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
