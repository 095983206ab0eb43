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
from keylatch.revocation.feed import END, Feed, Receipt
from keylatch.revocation.news import News
from keylatch.store import Poll, Store
from keylatch.telemetry.condition import Condition, Part
from keylatch.telemetry.meter import Count

_SAFETY: Final = 0.98
_YOUNG: Final = 0.75  # of X are left: the next poll is still to come
_PATIENCE: Final = 1.1
_COALESCE_SECONDS: Final = 0.005
_LOOK_SECONDS: Final = 0.001
_LOOK_LONGEST_SECONDS: Final = 0.025
_REACH: Final = 8
"""Lines of the log that a bell tells at most: others may not know of what was committed before,
and whoever cannot follow on what is told has to read."""

log = logging.getLogger("keylatch")


def boottime() -> float:
    """Seconds since the machine booted, suspended time included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """See `keylatch.revocation.feed.Witness`.

    Args:
        store: on PostgreSQL.
        feed: to keep current.
        seconds: X.
        ring: rings the bell, with news where there are some.
        clock: seconds since the Unix epoch, until the store's own time is known.
        timer: seconds that never go back and never stand still.
    """

    def __init__(
        self,
        store: Store,
        feed: Feed,
        seconds: float,
        ring: Callable[[News | None], Awaitable[None]],
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = boottime,
    ) -> None:
        self._store = store
        self._feed = feed
        self._seconds = seconds
        self._ring = ring
        self._clock = clock
        self._timer = timer
        self.condition = Condition("no lease", "leases are granted again", clock=clock)
        self.forget()

    def forget(self) -> None:
        self._member = ""
        self._until = 0.0
        self._store_ahead = 0.0  # seconds that the store's clock is ahead of the timer
        self._rung = asyncio.Event()
        self._must_look = False
        self._asking: asyncio.Task[bool] | None = None
        self._asking_next: asyncio.Task[bool] | None = None
        self._asked_at = 0.0
        self.condition.forget()
        self.deaths = Count()
        """How often this process was taken for dead."""

    @property
    def age_seconds(self) -> float:
        """How long ago it was asked for the lease that it holds, or held last."""
        return self._timer() - self._asked_at if self._asked_at else 0.0

    @property
    def seconds_left(self) -> float:
        """How long the lease still runs; 0 without one."""
        return max(0.0, self._until - self._timer())

    def part(self) -> Part:
        """How it is about the lease."""
        if self.is_current():
            return self.condition.part("lease", "degraded", "the store grants no new lease")
        since = self.condition.since
        if self._until:
            since = self._clock() - (self._timer() - self._until)
        return Part("lease", "unavailable", since, "no lease: the store grants none, or is late")

    def moment(self) -> float | None:
        now = self._timer()
        return (now + self._store_ahead) * 1000 if now < self._until else None

    def is_current(self) -> bool:
        return self.moment() is not None

    def now_ms(self) -> int:
        if not self._store_ahead:
            return int(self._clock() * 1000)
        return int((self._timer() + self._store_ahead) * 1000)

    def hear(self, news: News | None = None) -> None:
        """The bell rang."""
        if news is None or not self._feed.hear(news):
            self._must_look = True
        self._rung.set()

    async def begin(self) -> None:
        self._feed.begin(await self._store.changes(END, self._seconds))
        await self.ask()

    async def catch_up(self) -> None:
        if not self.is_current():
            await self.ask()
        if not self.is_current():
            # The answer took longer than the lease lasts: it is good for nobody.
            raise StoreUnavailable(
                "the store answers slower than a lease lasts", "is KEYLATCH_LEASE too short?"
            )

    async def run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._seconds / 4):
                    await self._rung.wait()
            except TimeoutError:
                pass
            was_rung = self._rung.is_set()
            self._rung.clear()
            try:
                await (self._answer_the_bell() if was_rung else self._ask_until_acknowledged())
                self.condition.succeeded()
            except StoreUnavailable as error:
                self.condition.failed(error.message, error.hint)
            if was_rung:  # many may ring in a row
                await asyncio.sleep(_COALESCE_SECONDS)

    async def _answer_the_bell(self) -> None:
        must_look, self._must_look = self._must_look, False
        if self._feed.heard:
            await self._ask_until_acknowledged()
        elif must_look and await self.ask(only_news=True):
            await self.ask()

    async def _ask_until_acknowledged(self) -> None:
        if await self.ask():
            await self.ask()  # acknowledges what was just learned

    async def end(self) -> None:
        while self._asking is not None:  # a question under way would join again
            await asyncio.wait([self._asking])
        self._until = 0.0
        member, self._member = self._member, ""
        if member:
            try:
                await self._store.leave(member)
            except StoreUnavailable:
                log.warning("could not say goodbye: the next revoke waits for this process once")

    # Asking

    async def ask(self, *, only_news: bool = False) -> bool:
        """Ask the store, in a question that leaves after this call; True if there is something to
        acknowledge after it.

        At most one question is under way and one waits; whoever comes while the first is under
        way shares the second, because the first may have read before they came.

        Args:
            only_news: for no lease while that is young: a bell is heard by all at once, and to read
                is a fraction of what a grant costs the store.

        Raises:
            StoreUnavailable: nothing was learned.
        """
        if self._asking is None:
            self._asking = self._question(None, only_news)
            question = self._asking
        else:
            if self._asking_next is None:
                self._asking_next = self._question(self._asking, only_news)
            question = self._asking_next
        return await asyncio.shield(question)

    def _question(self, earlier: asyncio.Task[bool] | None, only_news: bool) -> asyncio.Task[bool]:
        task = asyncio.create_task(self._ask(earlier, only_news), name="keylatch-lease")
        task.add_done_callback(self._answered)
        return task

    def _answered(self, task: asyncio.Task[bool]) -> None:
        if not task.cancelled():
            task.exception()  # its waiters have it; nobody may be left to wait
        if self._asking is task:
            self._asking, self._asking_next = self._asking_next, None

    async def _ask(self, earlier: asyncio.Task[bool] | None, only_news: bool) -> bool:
        if earlier is not None:
            await asyncio.wait([earlier])
        # Not while a lease grows old: bells without end shall not keep it from being renewed.
        seq, heard, reached = self._feed.seq, self._feed.heard, self._feed.heard_seq
        if only_news and self._until - self._timer() > self._seconds * _YOUNG:
            changes = await self._store.changes(seq, self._seconds)
            self._feed.apply(changes, reached)
            return changes.seq != seq
        for _ in range(2):
            if not self._member:
                member = secrets.token_hex(8)
                await self._store.join(member, self._seconds)
                self._member = member
            asked_at = self._timer()  # before it leaves; an answer later than X is good for nobody
            poll = await self._store.poll(self._member, seq, self._seconds, heard)
            if poll.is_member:
                self._granted(poll, asked_at, reached)
                return poll.acknowledged != poll.changes.seq
            self._until, self._member = 0.0, ""
            self.deaths.add()
            log.warning("this process was taken for dead and joins again")
        raise StoreUnavailable("the store forgot this process twice", "is the machine overloaded?")

    def _granted(self, poll: Poll, asked_at: float, reached: int) -> None:
        """Tombstones and lease, in one step of the event loop."""
        self._feed.apply(poll.changes, reached)
        self._asked_at = asked_at
        self._until = asked_at + self._seconds * _SAFETY
        self._store_ahead = poll.store_seconds - asked_at

    # Waiting for the others

    async def settle(self, seq: int, *, wait: bool = True) -> Receipt:
        committed_at = self._timer()
        await self._tell(seq)
        if not wait:
            return Receipt(seq, acknowledged=0, members=0, bound_seconds=self._seconds)
        laggards: dict[str, int] | None = None
        grants: dict[str, int] = {}  # of those who lagged at the first look
        looked_at = committed_at
        members = 0
        while True:
            try:
                laggards, members = await self._store.laggards(seq, self._seconds)
                if not laggards:
                    break
                if not grants:
                    # Read after the look: a grant that it has counted was made before this.
                    grants, looked_at = laggards, self._timer()
            except StoreUnavailable:
                pass  # the change is committed; time alone will do
            now = self._timer()
            if now >= looked_at + self._seconds:
                await self._remove(grants, seq)
                break
            if now >= committed_at + self._seconds * _PATIENCE:
                break  # the first look was late: enough for the answer, not for removing anybody
            await asyncio.sleep(_pause(now - committed_at, len(laggards or ()), members))
        acknowledged = members - len(laggards or ())
        return Receipt(seq, acknowledged, members, bound_seconds=0.0)

    async def _tell(self, seq: int) -> None:
        """Ring with what the log says, read once for all."""
        since = max(0, seq - _REACH)
        news = None
        with suppress(StoreUnavailable):  # then all have to look
            news = News(since, await self._store.changes(since, self._seconds / 4))
        self.hear(news)  # this process is one of those who must know
        await self._ring(news)

    async def _remove(self, silent: dict[str, int], seq: int) -> None:
        """Remove members who acknowledged nothing and were granted nothing for X."""
        try:
            removed = await self._store.remove_members(silent, seq, self._seconds / 4)
        except StoreUnavailable:
            return  # the next revoke tries again
        if removed:
            log.warning("%d processes did not answer for %g s: removed", removed, self._seconds)


def _pause(elapsed: float, late: int, members: int) -> float:
    """Seconds until the next look: half of what the others seem to need, if they go on as so far.
    Close to the end, and no hammering where somebody is dead."""
    needed = elapsed * late / (members - late) if late < members else elapsed
    return min(max(_LOOK_SECONDS, elapsed / 20, min(needed, elapsed) / 2), _LOOK_LONGEST_SECONDS)
