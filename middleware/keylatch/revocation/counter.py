"""SQLite's witness: every check reads the store's counter, so the commit is the invalidation.

No process needs to be told and none needs to be waited for (X = 0).
"""

import threading
from collections.abc import Callable

from keylatch.errors import StoreUnavailable
from keylatch.revocation.feed import END, Feed, Receipt
from keylatch.store import Store
from keylatch.telemetry.condition import Part


class Counter:
    """See `keylatch.revocation.feed.Witness`.

    Args:
        store: on SQLite.
        feed: to keep current.
        clock: seconds since the Unix epoch.
    """

    def __init__(self, store: Store, feed: Feed, clock: Callable[[], float]) -> None:
        self._store = store
        self._feed = feed
        self._clock = clock
        self._mark_now = store.mark_now  # asked at every check
        self.forget()

    def forget(self) -> None:
        self._lock = threading.Lock()
        self._mark: bytes | None = None

    def moment(self) -> float | None:
        mark = self._mark_now()  # before the counter is read
        if (mark is not None and mark == self._mark) or self._has_caught_up():
            return self._clock() * 1000
        return None

    def part(self) -> Part:
        return Part("lease", "off")

    def is_current(self) -> bool:
        return self.moment() is not None

    def _has_caught_up(self) -> bool:
        # One thread at a time: whoever learned less, later, would take the feed back.
        with self._lock:
            mark = self._mark_now()
            seq = self._store.sequence_now()
            if seq is None:
                return False
            if seq != self._feed.seq:
                changes = self._store.changes_now(self._feed.seq)
                if changes is None:
                    return False
                self._feed.apply(changes)
            self._mark = mark
            return True

    async def begin(self) -> None:
        self._mark = None
        self._feed.begin(await self._store.changes(END))
        await self.catch_up()

    async def catch_up(self) -> None:
        if self.is_current():
            return
        await self._store.ping()  # on a thread, where there is time to wait for a lock
        if not self.is_current():
            raise StoreUnavailable("the store's counter cannot be read", "see the lines above")

    async def run(self) -> None:
        return None

    async def settle(self, seq: int, *, wait: bool = True) -> Receipt:
        return Receipt(seq, acknowledged=0, members=0, bound_seconds=0.0)

    async def end(self) -> None:
        return None

    def now_ms(self) -> int:
        return int(self._clock() * 1000)
