"""Was what was let in still good? Looked at again, off the path, with eyes of its own.

Checks believe the feed, its witness and what they have remembered of both. Whether they are right
to, nobody on their path can say. So whenever uses are stored, the log of changes is read once more,
by a question of its own and into a book of its own: key or organisation, sequence number, and the
moment at which this process could know. A key that was let in later than that, by an entry that is
older than the change, was accepted after its revocation: that must never be, and is counted.

It cannot raise a false alarm: no clocks of two machines are compared, and whoever was late by a
thread's pause is within the grace. It can miss what is over before it looks (within seconds), and
keys that are no longer remembered: it finds what goes on being wrong, not what was wrong once.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Final

from keylatch.caches.local_cache import Entry
from keylatch.errors import StoreUnavailable
from keylatch.storage.store import InvalidationBatch, Store

GRACE_MS: Final = 1_000.0
"""A thread may be paused between looking at the clock and letting somebody in."""
_MAX_CHANGES: Final = 100_000

log = logging.getLogger("keylatch")


class RevocationMonitor:
    """At the keys that one process has let in.

    Args:
        store: whose log of changes counts.
        entry_of: what the process remembers of a key id.
        now_ms: the time that uses are noted in.
        bound_ms: how long after a commit a process may decide by what was before.
        on_violation: called for each key that was accepted too late.
    """

    def __init__(
        self,
        store: Store,
        entry_of: Callable[[str], Entry | None],
        now_ms: Callable[[], float],
        bound_ms: float,
        on_violation: Callable[[], None],
    ) -> None:
        self._store = store
        self._entry_of = entry_of
        self._now_ms = now_ms
        self._grace_ms = bound_ms + GRACE_MS
        self._on_violation = on_violation
        self.begin(0, "")

    def begin(self, seq: int, epoch: str) -> None:
        """Know of no change up to this one."""
        self._seq = seq
        self._epoch = epoch
        self._floor = (0, 0.0)
        self._changed: dict[str, tuple[int, float]] = {}

    async def check(self, last_used: Mapping[str, int]) -> None:
        """Judge uses (key id → milliseconds) by what was known before them, and learn what is new
        for the next ones."""
        for key_id, used_at in last_used.items():
            entry = self._entry_of(key_id)
            if entry is not None and self._is_violation(entry, used_at):
                self._on_violation()
                log.critical(
                    "accepted key %s after it was revoked or changed: please report this",
                    key_id,
                )
        try:
            batch = await self._store.invalidations.since(self._seq)
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
        if (
            batch.epoch != self._epoch or batch.seq < self._seq
        ):  # another store: `Invalidations` logs it
            self.begin(batch.seq, batch.epoch)
            return
        if not batch.is_complete or len(self._changed) > _MAX_CHANGES:
            self._floor, self._changed = (batch.seq, now_ms), {}
        for seq, key_id, organization_id in batch.invalidations:
            if key_id is None and organization_id is None:
                self._floor = (seq, now_ms)
            for object_id in (key_id, organization_id):
                if object_id is not None:
                    self._changed[object_id] = (seq, now_ms)
        self._seq = batch.seq
