"""What the store has changed since: tombstones, and the rule by which cached entries are judged.

An entry may be used if nothing touched its key or its organisation after the sequence number at
which the entry was read (`as_of`), and if this process knows of what was committed. The first
half stops stale fills and is kept here; the second half stops lost messages and is a `Freshness`:
`counter` on SQLite, `lease` on PostgreSQL. Each half alone has been shown to fail.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from keylatch.revocation.notices import Notice
from keylatch.storage.schema import NO_ID
from keylatch.storage.store import Invalidation, InvalidationBatch
from keylatch.telemetry.health import ComponentHealth

_MAX_TOMBSTONES: Final = 100_000
_REPLAYED_CHANGES: Final = 1_000
MAX_SEQ: Final = 2**62
"""A sequence number that no store reaches: asked for what came after it, a store tells its own."""

log = logging.getLogger("keylatch")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is known of a change when its call returns.

    Args:
        seq: the sequence number of the change.
        acknowledged: processes that have said that they know.
        members: processes that hold leases; 0 where every check reads the store itself.
        bound_seconds: no check is decided against the change later than so many seconds from now.
    """

    seq: int
    acknowledged: int
    members: int
    bound_seconds: float


class Freshness(Protocol):
    """Says whether the feed may be believed, and sees to it that it may."""

    def now_if_fresh(self) -> float | None:
        """The time to judge at, in milliseconds since the epoch; None while cached entries may not
        be used, whatever the feed accepts. Never waits, and reads one clock."""

    async def begin(self) -> None:
        """Learn where the store stands."""

    async def revalidate(self) -> None:
        """Make the feed current, or raise `StoreUnavailable`."""

    async def run(self) -> None:
        """Keep the feed current, until cancelled."""

    async def wait_until_acknowledged(self, seq: int, *, wait: bool = True) -> Receipt:
        """Return when no process decides against a committed change any more.

        Args:
            seq: of the change.
            wait: False: do not wait, and say how long it may take.
        """

    async def end(self) -> None:
        """Trust nothing any more, and say goodbye."""

    def is_fresh(self) -> bool:
        """Whether cached entries that the feed accepts may be used now."""

    def now_ms(self) -> int:
        """The same time, also while nothing may be used."""

    def component_health(self) -> ComponentHealth:
        """How it is, if it has to ask for that."""

    def clear(self) -> None:
        """Know nothing, trust nothing."""


class Invalidations:
    """The tombstones of one process.

    Floor and tombstones are one attribute, because threads judge while another one learns: a
    floor from before and tombstones from after would let an old entry through.

    Args:
        on_restore: called when the store is not the one we knew (it went back to a backup), with
            the keys that had been touched since: whatever is cached must go.
        on_change: called when something was learned.

    Attributes:
        pending: lines of the log after `seq` that are known from others' news: their tombstones are
            kept, and the store has yet to confirm them.
    """

    def __init__(
        self,
        on_restore: Callable[[list[str]], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_restore = on_restore
        self._on_change = on_change
        self.clear()

    def clear(self) -> None:
        """Know nothing."""
        self.seq = 0
        self.epoch = ""
        self.has_imported = False
        """Whether the store has keys that were made elsewhere."""
        self._set_floor(0)
        self.version = object()
        """Another one whenever something was learned: what was accepted by the present one still
        is. Whoever uses it reads it after asking whether the feed is current."""

    def _set_floor(self, floor: int) -> None:
        """Nothing that was read before `floor` is believed; what comes after leaves tombstones.
        What was heard goes with them, or it would be acknowledged without."""
        self.pending: tuple[Invalidation, ...] = ()
        self._floor_and_tombstones: tuple[int, dict[str, int]] = (floor, {})

    def begin(self, batch: InvalidationBatch) -> None:
        """Start from the recent past, so that fresh entries in Redis are of use after a restart."""
        self.epoch = batch.epoch
        self.has_imported = batch.has_imported_keys
        self.seq = max(0, batch.seq - _REPLAYED_CHANGES)
        self._set_floor(self.seq)
        self.version = object()

    def accepts(self, key_id: str, organization_id: str, as_of: int) -> bool:
        """Whether an entry read at `as_of` still says the truth, by all that is known."""
        floor, tombstones = self._floor_and_tombstones
        return (
            as_of >= floor
            and as_of >= tombstones.get(key_id, 0)
            and as_of >= tombstones.get(organization_id, 0)
        )

    @property
    def tombstone_count(self) -> int:
        """How many are known."""
        return len(self._floor_and_tombstones[1])

    @property
    def pending_seq(self) -> int:
        """Up to where the log is known, by reading it or by others' news."""
        return self.pending[-1][0] if self.pending else self.seq

    def add_pending(self, notice: Notice) -> bool:
        """Believe what somebody else has read, where it tells all that happened after `seq`.

        Tombstones only take away, so it is safe to believe early. What is known for sure (`seq`)
        does not move: the store confirms, and acknowledges, what was heard when it is asked.

        Returns:
            False: the store has to be asked what happened, because this does not tell, or nothing
            that is not known, or of everything at once.
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
            self.version = object()
            self._on_change()
        return True

    def apply(self, batch: InvalidationBatch, min_seq: int = 0) -> None:
        """Learn what was committed after `seq`.

        Args:
            batch: the store's answer.
            min_seq: a sequence number that the store had given out before it was asked.
        """
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
        if has_changed:
            self.version = object()  # last: nobody finds the new one beside the old tombstones
            self._on_change()

    def _add_tombstones(self, invalidations: Iterable[Invalidation]) -> None:
        for seq, key_id, organization_id in invalidations:
            if key_id is None and organization_id is None:
                self._set_floor(seq)
            tombstones = self._floor_and_tombstones[1]
            for object_id in (key_id, organization_id):
                if object_id is not None:  # a later one may have been heard of already
                    tombstones[object_id] = max(seq, tombstones.get(object_id, 0))

    def _was_restored(self, batch: InvalidationBatch, min_seq: int) -> bool:
        """Whether this store is not the one that we knew, or that others told of: news are sealed
        and told after the commit, so a store that contradicts them has gone back since."""
        if batch.epoch != self.epoch or batch.seq < max(self.seq, min_seq):
            return True
        expected = {invalidation for invalidation in self.pending if invalidation[0] <= batch.seq}
        return batch.is_complete and not expected.issubset(batch.invalidations)

    def _handle_restore(self, batch: InvalidationBatch) -> None:
        self.seq = self.pending_seq  # the last number that is known to have been given out
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
        self._set_floor(batch.seq)
        self._on_restore(invalidated)


def _requires_poll(invalidation: Invalidation) -> bool:
    """Whether a line says too little: of everything, or of many new keys, which may be the first
    that were made elsewhere."""
    _, key_id, organization_id = invalidation
    return key_id is None and organization_id in (None, NO_ID)
