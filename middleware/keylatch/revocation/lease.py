"""PostgreSQL's witness: the store grants leases, and a change waits for whoever holds one.

A process may believe its feed until X after it *asked* (`t0`, taken before the question leaves).
It asks every X/4. One question is one transaction on the primary: it acknowledges what was learned
last time, counts the grant on the process's own row in `members`, and reads what changed. A replica
cannot do that, so it grants nothing. When the bell rings with news that follow on what is known,
their tombstones are kept at once and the next question acknowledges them; any other bell makes it
read what changed at once, and acknowledge that with the question that follows.

A revoke commits, reads what changed, rings with that, and waits until every member has acknowledged
its sequence number, at most
X: by then every lease that was asked for before the commit is over, and every later one came
with the tombstone. Members that did not acknowledge and whose count of grants stood still for X
hold no lease; their rows are removed, so a process that died costs one revoke X, once. Whoever
finds its row gone holds no lease either and joins again under a new name.

Clocks: durations only, from CLOCK_BOOTTIME, which goes on while a machine is suspended. Rates may
differ by 1 %, so holders give up 2 % early. No wall clock is compared with another.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from keylatch.errors import StoreUnavailable
from keylatch.revocation.invalidations import MAX_SEQ, Invalidations, Receipt
from keylatch.revocation.notices import Notice
from keylatch.storage.store import Poll, Store
from keylatch.telemetry.counters import Counter
from keylatch.telemetry.health import ComponentHealth, Health

_EXPIRY_MARGIN: Final = 0.98
_RECENT_FRACTION: Final = 0.75  # of X are left: the next poll is still to come
_MAX_WAIT_FACTOR: Final = 1.1
_COALESCE_SECONDS: Final = 0.005
_MIN_POLL_SECONDS: Final = 0.001
_MAX_POLL_SECONDS: Final = 0.025
_NOTICE_REACH: Final = 8
"""Lines of the log that a bell tells at most: others may not know of what was committed before,
and whoever cannot follow on what is told has to read."""

log = logging.getLogger("keylatch")


def boottime() -> float:
    """Seconds since the machine booted, suspended time included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """See `keylatch.revocation.invalidations.Freshness`.

    Args:
        store: on PostgreSQL.
        invalidations: to keep current.
        lease_seconds: X.
        publish: rings the bell, with news where there are some.
        clock: seconds since the Unix epoch, until the store's own time is known.
        timer: seconds that never go back and never stand still.
    """

    def __init__(
        self,
        store: Store,
        invalidations: Invalidations,
        lease_seconds: float,
        publish: Callable[[Notice | None], Awaitable[None]],
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = boottime,
    ) -> None:
        self._store = store
        self._invalidations = invalidations
        self._lease_seconds = lease_seconds
        self._publish = publish
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
        self.health.clear()
        self.memberships_lost = Counter()
        """How often this process was taken for dead."""

    @property
    def age_seconds(self) -> float:
        """How long ago it was asked for the lease that it holds, or held last."""
        return self._timer() - self._requested_at if self._requested_at else 0.0

    @property
    def seconds_left(self) -> float:
        """How long the lease still runs; 0 without one."""
        return max(0.0, self._expires_at - self._timer())

    def component_health(self) -> ComponentHealth:
        """How it is about the lease."""
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
        """The bell rang."""
        if notice is None or not self._invalidations.add_pending(notice):
            self._must_poll = True
        self._notified.set()

    async def begin(self) -> None:
        self._invalidations.begin(
            await self._store.invalidations.since(MAX_SEQ, self._lease_seconds)
        )
        await self.renew()

    async def revalidate(self) -> None:
        if not self.is_fresh():
            await self.renew()
        if not self.is_fresh():
            # The answer took longer than the lease lasts: it is good for nobody.
            raise StoreUnavailable(
                "the store answers slower than one lease period", "is KEYLATCH_LEASE too short?"
            )

    async def run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._lease_seconds / 4):
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
            if was_notified:  # many may ring in a row
                await asyncio.sleep(_COALESCE_SECONDS)

    async def _handle_notice(self) -> None:
        must_poll, self._must_poll = self._must_poll, False
        if self._invalidations.pending:
            await self._renew_and_acknowledge()
        elif must_poll and await self.renew(changes_only=True):
            await self.renew()

    async def _renew_and_acknowledge(self) -> None:
        if await self.renew():
            await self.renew()  # acknowledges what was just learned

    async def end(self) -> None:
        while self._renewal is not None:  # a question under way would join again
            await asyncio.wait([self._renewal])
        self._expires_at = 0.0
        member, self._member = self._member, ""
        if member:
            try:
                await self._store.leases.leave(member)
            except StoreUnavailable:
                log.warning(
                    "could not remove this member on shutdown; "
                    "the next revocation will wait up to %g s for it",
                    self._lease_seconds,
                )

    # Asking

    async def renew(self, *, changes_only: bool = False) -> bool:
        """Ask the store, in a question that leaves after this call; True if there is something to
        acknowledge after it.

        At most one question is under way and one waits; whoever comes while the first is under
        way shares the second, because the first may have read before they came.

        Args:
            changes_only: no renewal while the lease is recent: all get notice at once, and to read
                is a fraction of what a grant costs the store.

        Raises:
            StoreUnavailable: nothing was learned.
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
            task.exception()  # its waiters have it; nobody may be left to wait
        if self._renewal is task:
            self._renewal, self._next_renewal = self._next_renewal, None

    async def _renew(self, previous: asyncio.Task[bool] | None, changes_only: bool) -> bool:
        if previous is not None:
            await asyncio.wait([previous])
        # Not while a lease grows old: bells without end shall not keep it from being renewed.
        seq, pending, min_seq = (
            self._invalidations.seq,
            self._invalidations.pending,
            self._invalidations.pending_seq,
        )
        if (
            changes_only
            and self._expires_at - self._timer() > self._lease_seconds * _RECENT_FRACTION
        ):
            batch = await self._store.invalidations.since(seq, self._lease_seconds)
            self._invalidations.apply(batch, min_seq)
            return batch.seq != seq
        for _ in range(2):
            if not self._member:
                member = secrets.token_hex(8)
                await self._store.leases.join(member, self.now_ms(), self._lease_seconds)
                self._member = member
            requested_at = self._timer()  # before the query is sent
            poll = await self._store.leases.poll(self._member, seq, self._lease_seconds, pending)
            if poll.is_member:
                self._apply_grant(poll, requested_at, min_seq)
                return poll.acknowledged_seq != poll.batch.seq
            self._expires_at, self._member = 0.0, ""
            self.memberships_lost.add()
            log.warning("lease membership was removed by another process; rejoining")
        raise StoreUnavailable(
            "lease membership was removed twice in a row", "is the machine overloaded?"
        )

    def _apply_grant(self, poll: Poll, requested_at: float, min_seq: int) -> None:
        """Tombstones and lease, in one step of the event loop."""
        self._invalidations.apply(poll.batch, min_seq)
        self._requested_at = requested_at
        self._expires_at = requested_at + self._lease_seconds * _EXPIRY_MARGIN
        self._store_clock_offset = poll.store_seconds - requested_at

    # Waiting for the others

    async def wait_until_acknowledged(self, seq: int, *, wait: bool = True) -> Receipt:
        committed_at = self._timer()
        await self._publish_notice(seq)
        if not wait:
            return Receipt(seq, acknowledged=0, members=0, bound_seconds=self._lease_seconds)
        laggards: dict[str, int] | None = None
        grants: dict[str, int] = {}  # of those who lagged at the first look
        counted_at = committed_at
        members = 0
        while True:
            try:
                laggards, members = await self._store.leases.laggards(seq, self._lease_seconds)
                if not laggards:
                    break
                if not grants:
                    # Read after the look: a grant that it has counted was made before this.
                    grants, counted_at = laggards, self._timer()
            except StoreUnavailable:
                pass  # the change is committed; time alone will do
            now = self._timer()
            if now >= counted_at + self._lease_seconds:
                await self._remove_laggards(grants, seq)
                break
            if now >= committed_at + self._lease_seconds * _MAX_WAIT_FACTOR:
                break  # the first look was late: enough for the answer, not for removing anybody
            await asyncio.sleep(_poll_interval(now - committed_at, len(laggards or ()), members))
        acknowledged = members - len(laggards or ())
        return Receipt(seq, acknowledged, members, bound_seconds=0.0)

    async def _publish_notice(self, seq: int) -> None:
        """Ring with what the log says, read once for all."""
        since = max(0, seq - _NOTICE_REACH)
        notice = None
        with suppress(StoreUnavailable):  # then all have to look
            notice = Notice(
                since, await self._store.invalidations.since(since, self._lease_seconds / 4)
            )
        self.on_notice(notice)  # this process is one of those who must know
        await self._publish(notice)

    async def _remove_laggards(self, laggards: dict[str, int], seq: int) -> None:
        """Remove members who acknowledged nothing and were granted nothing for X."""
        try:
            removed = await self._store.leases.remove_members(
                laggards, seq, self._lease_seconds / 4
            )
        except StoreUnavailable:
            return  # the next revoke tries again
        if removed:
            log.warning(
                "removed %d lease members that did not acknowledge for %g s",
                removed,
                self._lease_seconds,
            )


def _poll_interval(elapsed: float, lagging: int, members: int) -> float:
    """Seconds until the next look: half of what the others seem to need, if they go on as so far.
    Close to the end, and no hammering where somebody is dead."""
    needed = elapsed * lagging / (members - lagging) if lagging < members else elapsed
    return min(max(_MIN_POLL_SECONDS, elapsed / 20, min(needed, elapsed) / 2), _MAX_POLL_SECONDS)
