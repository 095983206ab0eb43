"""Open-loop load: requests are due at a constant rate, independent of the responses.

A latency counts from when its request was due. A closed loop, which sends a request after the
previous response, sends nothing while the server is slow, so its percentiles miss that time
("coordinated omission"). `OpenLoop` is the schedule, without a clock; `drive` executes it.
"""

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from keylatch_bench.plan import GRACE_SECONDS

Outcome = int | str
"""An HTTP status, or why there was none."""

UNANSWERED: Final = "unanswered"

# A timer is late by some 60 us. So `drive` wakes up early, yields for responses, and spins at the
# end.
_EARLY_NS: Final = 150_000
_SPIN_NS: Final = 20_000
_SOON_NS: Final = 500_000_000
_CHECKS_PER_YIELD: Final = 50


@dataclass(frozen=True, slots=True)
class Credential:
    """The value of an `Authorization` field (empty: no field) and the expected status."""

    value: bytes = field(repr=False)
    expected: int


class Client(Protocol):
    """Sends one check at a time."""

    def check(self, credential: Credential, on_outcome: Callable[[Outcome], None]) -> None:
        """Start a check; `on_outcome` may be called before this returns."""

    def cancel(self) -> None:
        """Abandon the check; its outcome is not reported."""


async def check(client: Client, credential: Credential) -> Outcome:
    """The outcome of one check."""
    answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    try:
        client.check(credential, answer.set_result)
        return await answer
    finally:
        if answer.cancelled():
            client.cancel()


class OpenLoop:
    """The schedule and the latencies of one measurement, in nanoseconds of a monotonic clock.

    Args:
        start: when the first request is due.
        interval: between two requests.
        count: number of requests.
    """

    def __init__(self, start: int, interval: float, count: int) -> None:
        self._start = start
        self._interval = interval
        self._count = count
        self._arrived = 0
        self._waiting: deque[int] = deque()
        self.latencies: list[int] = []
        self.outcomes: dict[Outcome, int] = {}
        self.unexpected = 0
        self.lateness: list[int] = []
        """For each request, how late this process noticed that it was due."""

    @property
    def next_due(self) -> int | None:
        """When the next request is due; None: there are no more."""
        if self._arrived == self._count:
            return None
        return self._start + int(self._arrived * self._interval)

    @property
    def last_due(self) -> int:
        """When the last request is due."""
        return self._start + int((self._count - 1) * self._interval)

    @property
    def is_over(self) -> bool:
        """Whether every request has an outcome."""
        return len(self.latencies) == self._count

    def enqueue_due(self, now: int) -> None:
        """Queue the requests that are due by now for a free client."""
        while (due := self.next_due) is not None and due <= now:
            self._waiting.append(due)
            self.lateness.append(now - due)
            self._arrived += 1

    def pop(self) -> int | None:
        """Take the request that has waited longest; return when it was due."""
        return self._waiting.popleft() if self._waiting else None

    def record(self, due: int, now: int, outcome: Outcome, expected: int) -> None:
        """Record the outcome of a request that was due at `due`."""
        self.latencies.append(now - due)
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.unexpected += outcome != expected

    def time_out(self, sent: Sequence[int], now: int) -> None:
        """Record all sent and queued requests as unanswered, with the latency until now."""
        for due in (*sent, *self._waiting):
            self.record(due, now, UNANSWERED, 0)
        self._waiting.clear()


class _Driver:
    def __init__(
        self,
        schedule: OpenLoop,
        clients: Sequence[Client],
        credentials: Iterator[Credential],
        clock: Callable[[], int],
    ) -> None:
        self._schedule = schedule
        self._free = deque(clients)
        self._credentials = credentials
        self._clock = clock
        self._busy: dict[Client, int] = {}
        self._is_sending = False
        self.ended_at = 0
        self.finished = asyncio.Event()

    def send(self) -> None:
        """Send queued requests on free clients."""
        if self._is_sending:  # called back by a client that answered at once
            return
        self._is_sending = True
        while self._free and (due := self._schedule.pop()) is not None:
            client = self._free.popleft()
            self._busy[client] = due
            credential = next(self._credentials)
            client.check(credential, functools.partial(self._on_outcome, client, credential))
        self._is_sending = False

    def _on_outcome(self, client: Client, credential: Credential, outcome: Outcome) -> None:
        now = self._clock()
        self._schedule.record(self._busy.pop(client), now, outcome, credential.expected)
        self._free.append(client)
        if self._schedule.is_over:
            self.ended_at = now
            self.finished.set()
        else:
            self.send()

    def time_out(self) -> None:
        self.ended_at = self._clock()
        self._schedule.time_out(list(self._busy.values()), self.ended_at)
        for client in self._busy:
            client.cancel()


@dataclass(frozen=True, slots=True)
class Measurement:
    """The result of one measurement; latencies and lateness in nanoseconds."""

    latencies: Sequence[int]
    lateness: Sequence[int]
    outcomes: dict[Outcome, int]
    unexpected: int
    seconds: float
    generator_busy: float
    """The share of one processor that this process used."""
    keeps_up: bool = True
    """Whether the last responses came soon after they were due, so no queue had built up."""


async def drive(
    clients: Sequence[Client],
    credentials: Iterator[Credential],
    rate: float,
    count: int,
    *,
    grace: float = GRACE_SECONDS,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Measurement:
    """Send `count` checks at `rate` per second, and wait for their outcomes.

    Args:
        clients: idle ones; a check waits if none is free, and its latency includes that.
        credentials: to send, in this order.
        rate: checks per second.
        count: number of checks.
        grace: seconds to wait for the last outcomes.
        clock: monotonic, in nanoseconds.
    """
    interval = 1e9 / rate
    start = clock() + 2 * _EARLY_NS
    schedule = OpenLoop(start, interval, count)
    driver = _Driver(schedule, clients, credentials, clock)
    busy_before = time.process_time()
    while (due := schedule.next_due) is not None:
        gap = due - clock()
        if gap > _EARLY_NS:
            await asyncio.sleep((gap - _EARLY_NS) / 1e9)
        elif gap > _SPIN_NS:
            await asyncio.sleep(0)
        else:
            while clock() < due:
                pass
            schedule.enqueue_due(clock())
            driver.send()
            await asyncio.sleep(0)
    try:
        async with asyncio.timeout(grace):
            await driver.finished.wait()
    except TimeoutError:
        driver.time_out()
    seconds = (driver.ended_at - start) / 1e9
    return Measurement(
        schedule.latencies,
        schedule.lateness,
        schedule.outcomes,
        schedule.unexpected,
        seconds,
        (time.process_time() - busy_before) / max(seconds, 1e-9),
        keeps_up=driver.ended_at - schedule.last_due < _SOON_NS + 0.05 * count * interval,
    )


async def saturate(
    clients: Sequence[Client],
    credentials: Iterator[Credential],
    seconds: float,
    max_checks: int,
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Measurement:
    """Send checks without a rate, each client after its previous outcome, to measure throughput.

    This is a closed loop, so latencies would be misleading, and there are none.

    Args:
        clients: idle ones.
        credentials: to send, in this order.
        seconds: duration.
        max_checks: maximum number of checks.
        clock: monotonic, in nanoseconds.
    """
    start = clock()
    end = start + int(seconds * 1e9)
    outcomes: dict[Outcome, int] = {}
    unexpected = 0
    budget = iter(range(max_checks))
    busy_before = time.process_time()

    async def send_checks(client: Client) -> None:
        nonlocal unexpected
        while clock() < end and (number := next(budget, None)) is not None:
            credential = next(credentials)
            outcome = await check(client, credential)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            unexpected += outcome != credential.expected
            if number % _CHECKS_PER_YIELD == 0:  # clients that answer at once never yield
                await asyncio.sleep(0)

    await asyncio.gather(*map(send_checks, clients))
    took = (clock() - start) / 1e9
    busy = (time.process_time() - busy_before) / took
    return Measurement((), (), outcomes, unexpected, took, busy)
