"""The committed changes that this process knows, and which cached entries they leave valid.

An entry may be used if no change concerned its key or its organisation after the sequence number at
which the entry was read (`as_of`), and if this process knows every committed change. The first half
stops stale fills and is implemented here; the second half stops lost messages and is `Freshness`:
`sequence` on SQLite, `lease` on PostgreSQL. Each half alone has been shown to fail.

A store can lose its last changes: by a failover to an asynchronous standby, or by a restore from a
backup. It gives their sequence numbers out again, so numbers alone do not show it. Each row of the
log has a random id, and the process keeps its *position*: the last row that it knows. A store whose
log has another row there, or none, has another history: nothing that was read before counts any
more. What the lost changes revoked is refused until it has been revoked again: `lost_revocations`.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from keylatch.revocation.notices import Notice
from keylatch.revocation.open_connections import OpenConnections
from keylatch.storage.invalidation_log import LogState, Position
from keylatch.storage.schema import NO_ID
from keylatch.storage.store import Invalidation, InvalidationBatch

_MAX_TOMBSTONES: Final = 100_000
_MAX_REMEMBERED: Final = 10_000
_MAX_POSITIONS: Final = 1_000
MAX_SEQ: Final = 2**62
"""No store reaches this sequence number: a query for later changes returns none, and the current
sequence number."""

log = logging.getLogger("keylatch")


@dataclass(frozen=True, slots=True)
class Break:
    """The store lost changes.

    Args:
        revocations: that this process had applied, whether the store lost them or not.
        epoch: of the store before.
        seq: the last sequence number that this process knows to have been given out.
    """

    revocations: Sequence[Invalidation]
    epoch: str
    seq: int


class Invalidations:
    """The tombstones of one process.

    Floor and tombstones are one attribute, because threads read them while another thread applies
    changes: an old floor together with new tombstones would accept a stale entry.

    Args:
        on_break: called when the store has another history than before: all caches have to be
            cleared, and what the store lacks has to be revoked again; see `release`.
        open_connections: checked again when changes were applied or became pending.

    Attributes:
        position: the last row of the log that was read from the store.
        pending: rows of the log after `position` that a notice announced: their tombstones are in
            force, and the store has yet to confirm them.
    """

    def __init__(
        self,
        on_break: Callable[[Break], None],
        open_connections: OpenConnections | None = None,
    ) -> None:
        self._on_break = on_break
        self._open_connections = open_connections
        self.clear()

    def clear(self) -> None:
        """Start over: no change is known."""
        self.position = Position(0, 0)
        self.epoch = ""
        self.has_imported = False
        """Whether the store has imported keys."""
        self.history = object()
        """Replaced when the store has another history: an `as_of` is comparable only within the
        history in which the read of the store began."""
        self._positions: OrderedDict[int, int] = OrderedDict()  # of known rows: seq -> row id
        self._revocations: OrderedDict[int, Invalidation] = OrderedDict()  # known rows, by row id
        self._withheld: Mapping[str, int] = {}  # id -> how many breaks withhold it
        self._lock = threading.Lock()  # on SQLite, a break may be noticed by any thread
        self._set_floor(0)
        self.version = object()
        """Replaced after every change: an entry that was accepted under this version still is.
        Read it after `Freshness.now_if_fresh`, which may apply changes."""

    def _set_floor(self, floor: int) -> None:
        """Accept nothing that was read before `floor`, and drop all tombstones. Pending rows are
        dropped too: otherwise they would be acknowledged without their tombstones."""
        self.pending: tuple[Invalidation, ...] = ()
        self._floor_and_tombstones: tuple[int, dict[str, int]] = (floor, {})

    @property
    def seq(self) -> int:
        """The sequence number of `position`."""
        return self.position.seq

    def begin(self, batch: InvalidationBatch) -> None:
        """Start at the newest row."""
        self.epoch = batch.epoch
        self.has_imported = batch.has_imported_keys
        self._set_position(batch.position)
        self._set_floor(batch.seq)
        self.version = object()

    def accepts(self, key_id: str, organization_id: str, as_of: int) -> bool:
        """Whether no known change invalidates an entry that was read at `as_of`."""
        floor, tombstones = self._floor_and_tombstones
        return (
            as_of >= floor
            and as_of >= tombstones.get(key_id, 0)
            and as_of >= tombstones.get(organization_id, 0)
            and key_id not in self._withheld
            and organization_id not in self._withheld
        )

    @property
    def tombstone_count(self) -> int:
        return len(self._floor_and_tombstones[1])

    @property
    def known(self) -> Position:
        """The last known row, read from the store or announced by a notice."""
        return self.pending[-1].position if self.pending else self.position

    def as_of(self, log: LogState) -> int | None:
        """The `as_of` of what a server answered that was asked about `known`.

        Returns:
            the last known row that the server had as well: its answer reflects every change up to
            there. What it had after that may be of another history. None: it has another history,
            or is too far behind.
        """
        if log.position.seq >= log.anchor.seq:
            is_known, at = self.is_known(log.anchor), log.anchor.seq
        else:
            is_known, at = self.is_known(log.position), log.position.seq
        return at if is_known else None

    def is_known(self, position: Position) -> bool:
        """Whether a row is one of the last thousand that this process knows."""
        return position == self.position or self._positions.get(position.seq) == position.row_id

    def add_pending(self, notice: Notice) -> bool:
        """Apply the tombstones of a notice, if it carries every change after `position`.

        Tombstones only invalidate, so they may be applied before the store confirms them.
        `position` does not advance: the next poll confirms the pending rows, and acknowledges them.

        Returns:
            False: the store has to be polled, because the notice carries no new row, leaves a gap,
            or has a row that invalidates everything.
        """
        batch = notice.batch
        if batch.epoch != self.epoch or not notice.since <= self.seq < batch.seq:
            return False
        if not self._has_same_history(notice):
            return False
        invalidations = tuple(row for row in batch.invalidations if row.seq > self.seq)
        if (
            not invalidations
            or invalidations[-1].seq != batch.seq
            or any(map(_requires_poll, invalidations))
        ):
            return False
        if batch.seq > self.known.seq:
            self._add_tombstones(invalidations)
            self.pending = invalidations
            self._set_changed()
        return True

    def _has_same_history(self, notice: Notice) -> bool:
        """Whether no row of a notice contradicts one that is known here: a notice may be of the
        history that the store has lost, or of that of an old primary."""
        rows = (row.position for row in notice.batch.invalidations)
        positions = (Position(notice.since, notice.batch.since_row_id), *rows)
        return all(self._positions.get(seq, row_id) == row_id for seq, row_id in positions)

    def apply(self, batch: InvalidationBatch, min_seq: int = 0) -> None:
        """Apply what was committed after `position`.

        Args:
            batch: the store's answer.
            min_seq: a sequence number that the store had assigned before the query was sent.
        """
        history = self.history
        has_changed = (batch.position, batch.epoch) != (self.position, self.epoch)
        if self.epoch and self._is_broken(batch, min_seq):
            self._handle_break(batch)
        elif not batch.is_complete or len(self._floor_and_tombstones[1]) > _MAX_TOMBSTONES:
            self._set_floor(batch.seq)
            if not batch.is_complete:
                self.history = object()  # the log is pruned: it does not tell the history
        else:
            self._add_tombstones(batch.invalidations)
        self._set_position(batch.position)
        self.epoch = batch.epoch
        self.has_imported = batch.has_imported_keys
        self.pending = tuple(row for row in self.pending if row.seq > self.seq)
        if has_changed or self.history is not history:
            self._set_changed()

    def _set_position(self, position: Position) -> None:
        self.position = position
        self._remember_position(position)

    def _remember_position(self, position: Position) -> None:
        self._positions[position.seq] = position.row_id
        while len(self._positions) > _MAX_POSITIONS:
            self._positions.popitem(last=False)

    def _set_changed(self) -> None:
        self.version = object()  # last: never a new version beside old tombstones
        if self._open_connections is not None:
            self._open_connections.on_change()

    def _add_tombstones(self, invalidations: Iterable[Invalidation]) -> None:
        for row in invalidations:
            if row.key_id is None and row.organization_id is None:
                self._set_floor(row.seq)
            tombstones = self._floor_and_tombstones[1]
            for object_id in (row.key_id, row.organization_id):
                if object_id is not None:  # a later change may be pending already
                    tombstones[object_id] = max(row.seq, tombstones.get(object_id, 0))
            self._remember_position(row.position)
            if row.revokes is not None:
                self._remember(row)

    def _remember(self, revocation: Invalidation) -> None:
        self._revocations[revocation.row_id] = revocation
        if len(self._revocations) > _MAX_REMEMBERED:
            self._revocations.popitem(last=False)

    # Another history

    def _is_broken(self, batch: InvalidationBatch, min_seq: int) -> bool:
        """Whether the store contradicts what it answered before, or a notice. Notices are signed
        and published after the commit, so such a store has lost changes."""
        if batch.seq < max(self.seq, min_seq):
            return True
        if not batch.is_complete:
            return batch.epoch != self.epoch
        expected = {row for row in self.pending if row.seq <= batch.seq}
        return batch.since_row_id != self.position.row_id or not expected.issubset(
            batch.invalidations
        )

    def _handle_break(self, batch: InvalidationBatch) -> None:
        log.critical(
            "the store went from %s/%d to %s/%d (epoch/seq) and lost changes: did a standby take "
            "over, or was it restored from a backup? What those changes revoked is refused, and "
            "revoked again",
            *(self.epoch, self.known.seq, batch.epoch, batch.seq),
        )
        last_seq = self.known.seq
        with self._lock:
            self.history = object()
            self._positions.clear()
            self._set_floor(batch.seq)
            revocations = tuple(self._revocations.values())
            self._revocations.clear()
            self._withhold(revocations, 1)
        self._on_break(Break(revocations, self.epoch, last_seq))

    def release(self, revocations: Iterable[Invalidation], history: object) -> bool:
        """Decide by the store again on what a break withheld: all rows of the log are applied here
        that have the revocations. They stay remembered, because the store may lose them again.

        Args:
            revocations: the rows.
            history: in which the store has them. False: it is not the present one any more, and
                nothing is released.
        """
        with self._lock:
            if self.history is not history:
                return False
            self._withhold(revocations, -1)
            for row in revocations:
                self._remember(row)
        self._set_changed()
        return True

    def forget_reads(self) -> None:
        """Accept nothing that was read before: another server answers now. What the one before it
        had committed last may be lost, also changes that gave access back; and those are in no log
        that this process could compare."""
        self.history = object()
        self._set_changed()

    def _withhold(self, revocations: Iterable[Invalidation], count: int) -> None:
        withheld = dict(self._withheld)
        for row in revocations:
            for object_id in _ids_of(row):
                withheld[object_id] = withheld.get(object_id, 0) + count
        self._withheld = {key: number for key, number in withheld.items() if number}


def _ids_of(row: Invalidation) -> list[str]:
    return [object_id for object_id in (row.key_id, row.organization_id) if object_id is not None]


def _requires_poll(row: Invalidation) -> bool:
    """Whether a row does not suffice: it invalidates everything, or it announces many new keys,
    which may be the first imported ones."""
    return row.key_id is None and row.organization_id in (None, NO_ID)
