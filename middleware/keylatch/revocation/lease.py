"""Freshness on PostgreSQL: the store grants leases, and a change waits for every lease member.

A process may use its caches until one lease period after it *requested* the lease (the time is
taken before the query is sent). It polls the store four times in a lease period. One poll is one
transaction on the primary: it acknowledges what the previous poll returned, counts the grant on the
process's own row in `keylatch_members`, and reads what changed. A replica cannot write, so it
grants nothing. A notice whose rows follow on the known ones adds their tombstones at once, and the
next poll acknowledges them; any other notice makes the process read the changes at once and
acknowledge them with the poll that follows.

`propagation` waits for acknowledgements and removes the rows of members that hold no lease. A
process that finds its row removed holds no lease either, and joins again under a new name.

Clocks: durations only, from CLOCK_BOOTTIME, which goes on while a machine is suspended. Rates may
differ by 1 %, so a holder stops 2 % early. No wall clock is compared with another.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from keylatch.errors import StoreUnavailable
from keylatch.revocation.invalidations import MAX_SEQ, Invalidations
from keylatch.revocation.notices import Notice
from keylatch.storage.database import OtherServer
from keylatch.storage.store import Poll, Store
from keylatch.telemetry.counters import Counter
from keylatch.telemetry.health import ComponentHealth, Health

_CLOCK: Final[int | None] = getattr(
    time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC_RAW", None)
)
_EXPIRY_MARGIN: Final = 0.98
_RECENT_FRACTION: Final = 0.75  # of the lease period is left: the next poll is still to come
_COALESCE_SECONDS: Final = 0.005
_BEGIN_SECONDS: Final = 10.0

log = logging.getLogger("keylatch")


boottime: Final[Callable[[], float]] = (
    time.monotonic if _CLOCK is None else partial(time.clock_gettime, _CLOCK)
)
"""Seconds since the machine booted, suspended time included.

macOS: CLOCK_MONOTONIC_RAW goes on while the machine sleeps (clock_gettime(3)); Python's
`time.monotonic` does not. Windows: `time.monotonic` does (GetTickCount64, from Python 3.13 on
QueryPerformanceCounter). On every other system, no machine that holds leases may be suspended.
"""


class Lease:
    """The lease of one process; see `keylatch.revocation.freshness.Freshness`.

    Args:
        store: on PostgreSQL.
        invalidations: kept complete while the lease lasts.
        seconds: the lease period.
        clock: seconds since the Unix epoch, until the store's own time is known.
        timer: seconds that never go back and never stand still.
    """

    def __init__(
        self,
        store: Store,
        invalidations: Invalidations,
        seconds: float,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = boottime,
    ) -> None:
        self._store = store
        self._invalidations = invalidations
        self.seconds = seconds
        store.set_lease_poll(self.renew)
        self._clock = clock
        self._timer = timer
        self.health = Health("lease not renewed", "lease renewed again", clock=clock)
        self.clear()

    def clear(self) -> None:
        self._member = ""
        self._expires_at = 0.0
        self._store_clock_offset = 0.0  # seconds that the store's clock is ahead of the timer
        self._notified = asyncio.Event()
        self._must_poll = False
        self._renewal: asyncio.Task[bool] | None = None
        self._next_renewal: asyncio.Task[bool] | None = None
        self._requested_at = 0.0
        self._server = ""
        self.health.clear()
        self.memberships_lost = Counter()
        """How often another process removed this process's membership."""

    @property
    def age_seconds(self) -> float:
        """Seconds since the process requested the lease that it holds, or held last."""
        return self._timer() - self._requested_at if self._requested_at else 0.0

    @property
    def seconds_left(self) -> float:
        """Seconds until the lease expires; 0 without a lease."""
        return max(0.0, self._expires_at - self._timer())

    def component_health(self) -> ComponentHealth:
        if self.is_fresh():
            return self.health.component_health("lease", "degraded", "the lease cannot be renewed")
        since = self.health.since
        if self._expires_at:
            since = self._clock() - (self._timer() - self._expires_at)
        return ComponentHealth(
            "lease", "unavailable", since, "no lease: the store grants none, or answers too late"
        )

    def now_if_fresh(self) -> float | None:
        now = self._timer()
        return (now + self._store_clock_offset) * 1000 if now < self._expires_at else None

    def is_fresh(self) -> bool:
        return self.now_if_fresh() is not None

    def now_ms(self) -> int:
        if not self._store_clock_offset:
            return int(self._clock() * 1000)
        return int((self._timer() + self._store_clock_offset) * 1000)

    def on_notice(self, notice: Notice | None = None) -> None:
        """A notice was received; None: one without rows, or without a valid MAC."""
        if notice is None or not self._invalidations.add_pending(notice):
            self._must_poll = True
        self._notified.set()

    async def begin(self) -> None:
        # With more time than a lease lasts: the first query of each kind opens its connection.
        newest = await self._store.invalidations.since(MAX_SEQ, _BEGIN_SECONDS)
        self._invalidations.begin(newest)
        if not self._member:
            await self._join(_BEGIN_SECONDS)
        await self.renew()

    async def revalidate(self) -> None:
        if not self.is_fresh():
            await self.renew()
        if not self.is_fresh():
            # The answer took longer than one lease period, so its grant has expired already.
            raise StoreUnavailable(
                "the store answers slower than one lease period", "is KEYLATCH_LEASE too short?"
            )

    async def poll(self) -> None:
        await self.renew()

    async def run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self.seconds / 4):
                    await self._notified.wait()
            except TimeoutError:
                pass
            was_notified = self._notified.is_set()
            self._notified.clear()
            try:
                await (self._handle_notice() if was_notified else self._renew_and_acknowledge())
                self.health.record_success()
            except StoreUnavailable as error:
                self.health.record_failure(error.message, error.hint)
            if was_notified:  # notices come in bursts
                await asyncio.sleep(_COALESCE_SECONDS)

    async def _handle_notice(self) -> None:
        must_poll, self._must_poll = self._must_poll, False
        if self._invalidations.pending:
            await self._renew_and_acknowledge()
        elif must_poll and await self.renew(changes_only=True):
            await self.renew()

    async def _renew_and_acknowledge(self) -> None:
        if await self.renew():
            await self.renew()  # acknowledges the changes that were just read

    async def end(self) -> None:
        while self._renewal is not None:  # a poll in flight would join again
            await asyncio.wait([self._renewal])
        self._expires_at = 0.0
        member, self._member = self._member, ""
        if member:
            try:
                await self._store.leases.leave(member)
            except StoreUnavailable:
                log.warning(
                    "this process could not end its lease membership on shutdown; "
                    "the next revocation will wait up to %g s for it",
                    self.seconds,
                )

    # Polling the store

    async def renew(self, *, changes_only: bool = False) -> bool:
        """Poll the store with a query that is sent after this call; True if the poll returned
        changes that the next one has to acknowledge.

        At most one poll is in flight and one is queued. A call that comes while the first is in
        flight shares the second, because the first may have read before that call.

        Args:
            changes_only: read the changes without a grant while the lease is recent: all members
                get a notice at once, and reading costs the store a fraction of a grant.

        Raises:
            StoreUnavailable: the store did not answer.
        """
        if self._renewal is None:
            self._renewal = self._start_renewal(None, changes_only)
            renewal = self._renewal
        else:
            if self._next_renewal is None:
                self._next_renewal = self._start_renewal(self._renewal, changes_only)
            renewal = self._next_renewal
        return await asyncio.shield(renewal)

    def _start_renewal(
        self, previous: asyncio.Task[bool] | None, changes_only: bool
    ) -> asyncio.Task[bool]:
        task = asyncio.create_task(self._renew(previous, changes_only), name="keylatch-lease")
        task.add_done_callback(self._on_renewal_done)
        return task

    def _on_renewal_done(self, task: asyncio.Task[bool]) -> None:
        if not task.cancelled():
            task.exception()  # retrieved: all callers may have been cancelled
        if self._renewal is task:
            self._renewal, self._next_renewal = self._next_renewal, None

    async def _renew(self, previous: asyncio.Task[bool] | None, changes_only: bool) -> bool:
        if previous is not None:
            await asyncio.wait([previous])
        position, pending, known = (
            self._invalidations.position,
            self._invalidations.pending,
            self._invalidations.known,
        )
        # Only while the lease is recent: endless notices must not keep it from being renewed.
        if changes_only and self._expires_at - self._timer() > self.seconds * _RECENT_FRACTION:
            with suppress(OtherServer):  # a poll shows whether it grants leases now
                batch = await self._store.invalidations.since(position.seq, self.seconds)
                self._invalidations.apply(batch, known.seq)
                return batch.position != position
        for _ in range(2):
            if not self._member:
                await self._join(self.seconds)
            requested_at = self._timer()  # before the query is sent
            poll = await self._store.leases.poll(self._member, position, self.seconds, pending)
            if poll.is_member:
                self._apply_grant(poll, requested_at, known.seq)
                return poll.acknowledged_seq != poll.batch.seq
            self._expires_at, self._member = 0.0, ""
            self.memberships_lost.add()
            log.warning("another process removed this process's lease membership; rejoining")
        raise StoreUnavailable(
            "lease membership was removed twice in a row", "is the machine overloaded?"
        )

    async def _join(self, seconds: float) -> None:
        member = secrets.token_hex(8)
        await self._store.leases.join(member, self.now_ms(), seconds)
        self._member = member

    def _apply_grant(self, poll: Poll, requested_at: float, min_seq: int) -> None:
        """Apply tombstones and lease in one step of the event loop."""
        if poll.server != self._server:
            if self._server:
                self._invalidations.forget_reads()
            self._server = poll.server
        self._invalidations.apply(poll.batch, min_seq)
        self._requested_at = requested_at
        self._expires_at = requested_at + self.seconds * _EXPIRY_MARGIN
        self._store_clock_offset = poll.store_seconds - requested_at
