"""A constant-rate load from a process of its own, by the generator of `keylatch bench`.

    python benchmarks/open_loop.py http://127.0.0.1:8700 --rate 2000
        [--seconds 5] [--connections 64] [--field 'Authorization: Bearer …']

wrk's loop is closed: it asks no more while it waits, and a server that stalls looks fine. Here a
latency counts from when its request was due. Its own lateness is reported beside what
it measured: where that is of the same size, it measured itself. It prints JSON on standard output.
"""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from keylatch_bench.benchmark import selector_loop
from keylatch_bench.connection import Address, Connection
from keylatch_bench.load_generator import Credential, drive
from keylatch_bench.results import histogram

PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "p99.9": 99.9, "max": 100}


class NotAnswered(Exception):
    """An answer was no 200, or did not come."""


@dataclass(frozen=True)
class Outcome:
    """What a constant rate did to a server: percentiles in microseconds.

    Args:
        rate: requests a second.
        answers: that were 200.
        latency: from due to answered.
        lateness: how late the generator noticed that a request was due.
    """

    rate: float
    answers: int
    latency: dict[str, float]
    lateness: dict[str, float]


def percentiles_us(seconds: Iterable[float]) -> dict[str, float]:
    """The percentiles of an HDR histogram, in microseconds."""
    made = histogram(int(value * 1e9) for value in seconds)
    return {name: made.get_value_at_percentile(each) / 1e3 for name, each in PERCENTILES.items()}


async def call(
    place: Address, field: str, rate: float, seconds: float, connections: int
) -> Outcome:
    """Ask `/verify` at a constant rate.

    Args:
        place: a server, which answers 200.
        field: `Authorization: Bearer …`.
        rate: requests a second.
        seconds: how long.
        connections: so many may be under way at once.

    Raises:
        NotAnswered: not every answer was a 200.
    """
    lines = [Connection(place) for _ in range(connections)]
    for line in lines:
        await line.open()
    credential = Credential(field.partition(": ")[2].encode(), 200)
    turn = await drive(lines, itertools.repeat(credential), rate, round(rate * seconds))
    for line in lines:
        line.cancel()
    if turn.unexpected:
        raise NotAnswered(f"not every answer was a 200: {turn.outcomes}")
    latency, lateness = (
        percentiles_us(value / 1e9 for value in values)
        for values in (turn.latencies, turn.lateness)
    )
    return Outcome(rate, len(turn.latencies), latency, lateness)


def in_a_process(
    url: str, field: str, rate: float, seconds: float, connections: int = 64
) -> Outcome:
    """`call` in a process of its own.

    Args:
        url: `http://host:port`, or the path of a Unix socket.

    Raises:
        NotAnswered: not every answer was a 200.
    """
    command = [sys.executable, __file__, url, "--rate", str(rate), "--seconds", str(seconds)]
    command += ["--connections", str(connections)]
    ended = subprocess.run(
        [*command, "--field", field], capture_output=True, text=True, timeout=seconds + 30
    )
    if ended.returncode:
        raise NotAnswered(ended.stderr.strip())
    return Outcome(**json.loads(ended.stdout))


def main() -> None:
    """Call, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("url")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--field", default="")
    given = parser.parse_args()
    is_path = given.url.startswith("/")
    place = Address(uds=Path(given.url)) if is_path else Address.from_url(given.url)
    try:
        with asyncio.Runner(loop_factory=selector_loop) as runner:
            outcome = runner.run(
                call(place, given.field, given.rate, given.seconds, given.connections)
            )
    except NotAnswered as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
