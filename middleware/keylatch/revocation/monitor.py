"""Detects keys that were accepted after a revocation, independently of the checks.

Checks rely on `Invalidations`, `Freshness` and cached entries, and cannot tell whether those are
right. So whenever uses are stored, the monitor reads the log of changes with a query of its own and
into a table of its own: key or organisation, sequence number, and the time at which this process
could know. A key that was accepted later than that, by an entry older than the change, was accepted
after its revocation: this must never happen, and is counted.

It raises no false alarm: it compares no clocks of two machines, and a paused thread is within the
grace. It can miss a fault that ends before the monitor runs (within seconds), and keys that have
left the cache: it finds faults that last, not single ones.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Final

from keylatch.caches.local_cache import Entry, LocalCache
from keylatch.errors import StoreUnavailable
from keylatch.storage.invalidation_log import Position
from keylatch.storage.store import InvalidationBatch, Store
from keylatch.telemetry.counters import Counters

GRACE_MS: Final = 1_000.0
"""A thread may be paused between reading the clock and allowing a request."""
_MAX_CHANGES: Final = 100_000

log = logging.getLogger("keylatch")


class RevocationMonitor:
    """Monitors the keys that one process accepts.

    Args:
        store: its log of changes is compared.
        l1: the entries by which the process accepts keys.
        now_ms: the time by which uses are recorded.
        bound_ms: how long after a commit a process may decide by the state before it.
        counters: count the keys that were accepted too late.
    """

    def __init__(
        self,
        store: Store,
        l1: LocalCache,
        now_ms: Callable[[], float],
        bound_ms: float,
        counters: Counters,
    ) -> None:
        self._store = store
        self._l1 = l1
        self._now_ms = now_ms
        self._grace_ms = bound_ms + GRACE_MS
        self._counters = counters
        self.begin(Position(0, 0))

    def begin(self, position: Position) -> None:
        """Monitor the changes after this row of the log."""
        self._position = position
        self._floor = (0, 0.0)
        self._changed: dict[str, tuple[int, float]] = {}

    async def check(self, last_used: Mapping[str, int]) -> None:
        """Compare uses (key id → milliseconds) with the changes that were known before them, then
        read the new changes for the next call."""
        for key_id, used_at in last_used.items():
            entry = self._l1.by_secret_id(key_id)
            if entry is not None and self._is_violation(entry, used_at):
                self._counters.accepted_after_revocation.add()
                log.critical(
                    "this process accepted key %s after it was revoked or changed: "
                    "please report this bug",
                    key_id,
                )
        try:
            batch = await self._store.invalidations.since(self._position.seq)
        except StoreUnavailable:
            return
        self._record_changes(batch, self._now_ms())

    def _is_violation(self, entry: Entry, used_at: float) -> bool:
        no_change = (0, 0.0)
        changes = (
            self._floor,
            self._changed.get(entry.key_id, no_change),
            self._changed.get(entry.organization_id, no_change),
        )
        return any(
            entry.as_of < seq and used_at > known_at + self._grace_ms for seq, known_at in changes
        )

    def _record_changes(self, batch: InvalidationBatch, now_ms: float) -> None:
        # Another history is logged by `Invalidations`. Of too many changes it is not known which
        # keys they concern: entries of the others are rightly used on.
        is_other = batch.since_row_id != self._position.row_id or batch.seq < self._position.seq
        if is_other or not batch.is_complete or len(self._changed) > _MAX_CHANGES:
            self.begin(batch.position)
            return
        for row in batch.invalidations:
            if row.key_id is None and row.organization_id is None:
                self._floor = (row.seq, now_ms)
            for object_id in (row.key_id, row.organization_id):
                if object_id is not None:
                    self._changed[object_id] = (row.seq, now_ms)
        self._position = batch.position
