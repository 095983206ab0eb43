"""The committed changes that this process knows, and which cached entries they leave valid.

An entry may be used if no change concerned its key or its organisation after the sequence number at
which the entry was read (`as_of`), and if this process knows every committed change. The first half
stops stale fills and is implemented here; the second half stops lost messages and is `Freshness`:
`sequence` on SQLite, `lease` on PostgreSQL. Each half alone has been shown to fail.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Final

from keylatch.revocation.notices import Notice
from keylatch.revocation.open_connections import OpenConnections
from keylatch.storage.schema import NO_ID
from keylatch.storage.store import Invalidation, InvalidationBatch

_MAX_TOMBSTONES: Final = 100_000
_REPLAYED_CHANGES: Final = 1_000
MAX_SEQ: Final = 2**62
"""No store reaches this sequence number: a query for later changes returns none, and the current
sequence number."""

log = logging.getLogger("keylatch")


class Invalidations:
    """The tombstones of one process.

    Floor and tombstones are one attribute, because threads read them while another thread applies
    changes: an old floor together with new tombstones would accept a stale entry.

    Args:
        on_restore: called when the store was restored from a backup, with the ids of keys and
            organisations that changed after that backup: all caches have to be cleared.
        open_connections: checked again when changes were applied or became pending.

    Attributes:
        pending: rows of the log after `seq` that a notice announced: their tombstones are in force,
            and the store has yet to confirm them.
    """

    def __init__(
        self,
        on_restore: Callable[[list[str]], None],
        open_connections: OpenConnections | None = None,
    ) -> None:
        self._on_restore = on_restore
        self._open_connections = open_connections
        self.clear()

    def clear(self) -> None:
        """Start over: no change is known."""
        self.seq = 0
        self.epoch = ""
        self.has_imported = False
        """Whether the store has imported keys."""
        self.history = object()
        """Replaced when the store was restored from a backup, which assigns sequence numbers again:
        an `as_of` is comparable only within the history in which the read of the store began."""
        self._set_floor(0)
        self.version = object()
        """Replaced after every change: an entry that was accepted under this version still is.
        Read it after `Freshness.now_if_fresh`, which may apply changes."""

    def _set_floor(self, floor: int) -> None:
        """Accept nothing that was read before `floor`, and drop all tombstones. Pending rows are
        dropped too: otherwise they would be acknowledged without their tombstones."""
        self.pending: tuple[Invalidation, ...] = ()
        self._floor_and_tombstones: tuple[int, dict[str, int]] = (floor, {})

    def begin(self, batch: InvalidationBatch) -> None:
        """Start at a recent sequence number, so that recent values in Redis are usable after a
        restart of this process."""
        self.epoch = batch.epoch
        self.has_imported = batch.has_imported_keys
        self.seq = max(0, batch.seq - _REPLAYED_CHANGES)
        self._set_floor(self.seq)
        self.version = object()

    def accepts(self, key_id: str, organization_id: str, as_of: int) -> bool:
        """Whether no known change invalidates an entry that was read at `as_of`."""
        floor, tombstones = self._floor_and_tombstones
        return (
            as_of >= floor
            and as_of >= tombstones.get(key_id, 0)
            and as_of >= tombstones.get(organization_id, 0)
        )

    @property
    def tombstone_count(self) -> int:
        return len(self._floor_and_tombstones[1])

    @property
    def pending_seq(self) -> int:
        """The last sequence number that is known, read from the store or announced by a notice."""
        return self.pending[-1][0] if self.pending else self.seq

    def add_pending(self, notice: Notice) -> bool:
        """Apply the tombstones of a notice, if it carries every change after `seq`.

        Tombstones only invalidate, so they may be applied before the store confirms them. `seq`
        does not advance: the next poll confirms the pending rows, and acknowledges them.

        Returns:
            False: the store has to be polled, because the notice carries no new row, leaves a gap,
            or has a row that invalidates everything.
        """
        batch = notice.batch
        if batch.epoch != self.epoch or not notice.since <= self.seq < batch.seq:
            return False
        invalidations = tuple(
            invalidation for invalidation in batch.invalidations if invalidation[0] > self.seq
        )
        if (
            not invalidations
            or invalidations[-1][0] != batch.seq
            or any(map(_requires_poll, invalidations))
        ):
            return False
        if batch.seq > self.pending_seq:
            self._add_tombstones(invalidations)
            self.pending = invalidations
            self._set_changed()
        return True

    def apply(self, batch: InvalidationBatch, min_seq: int = 0) -> None:
        """Apply what was committed after `seq`.

        Args:
            batch: the store's answer.
            min_seq: a sequence number that the store had assigned before the query was sent.
        """
        history = self.history
        has_changed = (batch.seq, batch.epoch) != (self.seq, self.epoch)
        if self.epoch and self._was_restored(batch, min_seq):
            self._handle_restore(batch)
        elif not batch.is_complete or len(self._floor_and_tombstones[1]) > _MAX_TOMBSTONES:
            self._set_floor(batch.seq)
        else:
            self._add_tombstones(batch.invalidations)
        self.seq = batch.seq
        self.epoch = batch.epoch
        self.has_imported = batch.has_imported_keys
        self.pending = tuple(
            invalidation for invalidation in self.pending if invalidation[0] > self.seq
        )
        if has_changed or self.history is not history:
            self._set_changed()

    def _set_changed(self) -> None:
        self.version = object()  # last: never a new version beside old tombstones
        if self._open_connections is not None:
            self._open_connections.on_change()

    def _add_tombstones(self, invalidations: Iterable[Invalidation]) -> None:
        for seq, key_id, organization_id in invalidations:
            if key_id is None and organization_id is None:
                self._set_floor(seq)
            tombstones = self._floor_and_tombstones[1]
            for object_id in (key_id, organization_id):
                if object_id is not None:  # a later change may be pending already
                    tombstones[object_id] = max(seq, tombstones.get(object_id, 0))

    def _was_restored(self, batch: InvalidationBatch, min_seq: int) -> bool:
        """Whether the store contradicts what it answered before, or a notice. Notices are signed
        and published after the commit, so such a store was restored from an older backup."""
        if batch.epoch != self.epoch or batch.seq < max(self.seq, min_seq):
            return True
        expected = {invalidation for invalidation in self.pending if invalidation[0] <= batch.seq}
        return batch.is_complete and not expected.issubset(batch.invalidations)

    def _handle_restore(self, batch: InvalidationBatch) -> None:
        self.seq = self.pending_seq  # the last number that was assigned
        log.critical(
            "the store went from %s/%d to %s/%d (epoch/seq): was it restored from a backup? "
            "Keys that were revoked in between may be active again",
            *(self.epoch, self.seq, batch.epoch, batch.seq),
        )
        unconfirmed = {key_id for _, key_id, _ in self.pending if key_id is not None}
        invalidated = [
            object_id
            for object_id, seq in self._floor_and_tombstones[1].items()
            if seq > batch.seq or object_id in unconfirmed
        ]
        self.history = object()
        self._set_floor(batch.seq)
        self._on_restore(invalidated)


def _requires_poll(invalidation: Invalidation) -> bool:
    """Whether a row does not suffice: it invalidates everything, or it announces many new keys,
    which may be the first imported ones."""
    _, key_id, organization_id = invalidation
    return key_id is None and organization_id in (None, NO_ID)
