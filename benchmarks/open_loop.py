"""A constant-rate load: requests are due at their moments, whatever became of those before.

    python benchmarks/open_loop.py http://127.0.0.1:8700/verify --rate 2000
        [--seconds 5] [--connections 64] [--field 'Authorization: Bearer …']

Open loop: a latency is counted from when its request was due, so a server that stalls is charged
for everybody who would have come meanwhile (coordinated omission). A generator of its own, because
wrk's loop is closed; it spins on one processor instead of sleeping, because timers of event loops
have milliseconds. How late it was itself is told beside what it measured: where that is of the same
size, it measured itself. It prints JSON on standard output.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Final, cast
from urllib.parse import urlsplit

import httptools
import uvloop
from hdrh.histogram import HdrHistogram

PERCENTILES: Final = (50, 90, 99, 99.9, 100)
_SLEEP_BEYOND_SECONDS: Final = 0.003
_LAST_ANSWERS_SECONDS: Final = 5.0


class Schedule:
    """When requests are due, and what came of them; it reads no clock.

    Args:
        rate: requests a second.
        count: of them.
        begin: when the first is due, in seconds.
    """

    def __init__(self, rate: float, count: int, begin: float) -> None:
        self._rate = rate
        self._count = count
        self._begin = begin
        self._taken = 0
        self.latencies: list[float] = []
        """From when a request was due until it was answered, in seconds."""
        self.services: list[float] = []
        """From when it was sent: what a closed loop would take for the latency."""
        self.lateness: list[float] = []
        """From when it was due until it was sent."""

    @property
    def next_due(self) -> float | None:
        """When the next request is due; None: there are no more."""
        return self._begin + self._taken / self._rate if self._taken < self._count else None

    @property
    def is_answered(self) -> bool:
        """Whether every request was."""
        return len(self.latencies) == self._count

    def take(self) -> float:
        """The next request is sent; when it was due."""
        due = self._begin + self._taken / self._rate
        self._taken += 1
        return due

    def note(self, due: float, sent: float, answered: float) -> None:
        """It was answered."""
        self.latencies.append(answered - due)
        self.services.append(answered - sent)
        self.lateness.append(sent - due)


def percentiles_us(seconds: list[float]) -> dict[str, float]:
    """The percentiles of an HDR histogram (three digits), in microseconds."""
    histogram = HdrHistogram(1, 60_000_000_000, 3)  # nanoseconds, up to a minute
    for value in seconds:
        histogram.record_value(max(1, int(value * 1e9)))
    names = ("p50", "p90", "p99", "p99.9", "max")
    return {
        name: histogram.get_value_at_percentile(percentile) / 1e3
        for name, percentile in zip(names, PERCENTILES, strict=True)
    }


@dataclass(frozen=True)
class Outcome:
    """What a constant rate did to a server: percentiles in microseconds.

    Args:
        rate: requests a second.
        answers: that were 200.
        latency: from due to answered.
        service: from sent to answered, which is what a closed loop sees.
        lateness: from due to sent: the generator's own, and waiting for a free connection.
    """

    rate: float
    answers: int
    latency: dict[str, float]
    service: dict[str, float]
    lateness: dict[str, float]


class NotAnswered(Exception):
    """An answer was no 200, or did not come."""


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, load: "_Load") -> None:
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._due = self._sent = 0.0
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's inherits from nothing

    def ask(self, due: float, request: bytes) -> None:
        self._due, self._sent = due, time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() != 200:
            self._load.fail(f"an answer was {self._parser.get_status_code()}")
        self._load.answered(self, self._due, self._sent, time.perf_counter())

    def connection_lost(self, error: Exception | None) -> None:
        self._load.fail(f"a connection was closed: {error}")


class _Load:
    """Asks what is due, over whichever connection is free."""

    def __init__(self, request: bytes, schedule: Schedule) -> None:
        self._request = request
        self._schedule = schedule
        self._loop = asyncio.get_running_loop()
        self._idle: deque[_Connection] = deque()
        self.ended: asyncio.Future[None] = self._loop.create_future()

    async def connect(self, host: str, port: int, uds: str, count: int) -> None:
        """Open connections, to a Unix socket if one is named."""
        for _ in range(count):
            if uds:
                _, made = await self._loop.create_unix_connection(lambda: _Connection(self), uds)
            else:
                _, made = await self._loop.create_connection(lambda: _Connection(self), host, port)
            self._idle.append(made)

    def tick(self) -> None:
        """Send what is due, and come back."""
        due = self._schedule.next_due
        if self.ended.done() or due is None:
            return
        now = time.perf_counter()
        while due is not None and due <= now and self._idle:
            self._idle.popleft().ask(self._schedule.take(), self._request)
            due = self._schedule.next_due
        if due is not None and due - now > _SLEEP_BEYOND_SECONDS:
            self._loop.call_later(due - now - _SLEEP_BEYOND_SECONDS / 2, self.tick)
        else:
            self._loop.call_soon(self.tick)

    def answered(self, free: _Connection, due: float, sent: float, now: float) -> None:
        self._schedule.note(due, sent, now)
        self._idle.append(free)
        if self._schedule.is_answered and not self.ended.done():
            self.ended.set_result(None)

    def fail(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(NotAnswered(why))

    def close(self) -> None:
        for connection in self._idle:
            connection.transport.abort()


async def call(url: str, field: str, rate: float, seconds: float, connections: int) -> Outcome:
    """Ask at a constant rate.

    Args:
        url: `http://host:port/target`, or `/path/of/a/socket:/target`.
        field: a header field, such as `Authorization: Bearer …`.
        rate: requests a second.
        seconds: how long.
        connections: so many may be under way at once.

    Raises:
        NotAnswered: not every answer was a 200.
    """
    uds, is_uds, rest = url.partition(":") if url.startswith("/") else ("", "", "")
    parts = urlsplit(f"http://localhost{rest}" if is_uds else url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    lines = [f"GET {target} HTTP/1.1", f"Host: {parts.netloc}", *([field] if field else []), "", ""]
    schedule = Schedule(rate, round(rate * seconds), time.perf_counter() + 0.2)
    load = _Load("\r\n".join(lines).encode(), schedule)
    await load.connect(parts.hostname or "", parts.port or 80, uds, connections)
    load.tick()
    try:
        await asyncio.wait_for(load.ended, seconds + _LAST_ANSWERS_SECONDS)
    except TimeoutError:
        raise NotAnswered(f"{len(schedule.latencies)} of {round(rate * seconds)} came") from None
    load.close()
    return Outcome(
        rate,
        len(schedule.latencies),
        percentiles_us(schedule.latencies),
        percentiles_us(schedule.services),
        percentiles_us(schedule.lateness),
    )


def in_a_process(
    url: str, field: str, rate: float, seconds: float, connections: int = 64
) -> Outcome:
    """`call` in a process of its own.

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
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            outcome = runner.run(
                call(given.url, given.field, given.rate, given.seconds, given.connections)
            )
    except NotAnswered as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
