"""What the store has changed since: tombstones, and the rule by which cached entries are judged.

An entry may be used if nothing touched its key or its organisation after the sequence number at
which the entry was read (`as_of`), and if this process knows of what was committed. The first
half stops stale fills and is kept here; the second half stops lost messages and is a `Witness`:
`counter` on SQLite, `lease` on PostgreSQL. Each half alone has been shown to fail.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from keylatch.revocation.news import News
from keylatch.sql.schema import NOBODY
from keylatch.store import Changes, Touched
from keylatch.telemetry.condition import Part

_MAX_TOMBSTONES: Final = 100_000
_RECENT: Final = 1_000
END: Final = 2**62
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


class Witness(Protocol):
    """Says whether the feed may be believed, and sees to it that it may."""

    def moment(self) -> float | None:
        """The time to judge at, in milliseconds since the epoch; None while cached entries may not
        be used, whatever the feed accepts. Never waits, and reads one clock."""

    async def begin(self) -> None:
        """Learn where the store stands."""

    async def catch_up(self) -> None:
        """Make the feed current, or raise `StoreUnavailable`."""

    async def run(self) -> None:
        """Keep the feed current, until cancelled."""

    async def settle(self, seq: int, *, wait: bool = True) -> Receipt:
        """Return when no process decides against a committed change any more.

        Args:
            seq: of the change.
            wait: False: do not wait, and say how long it may take.
        """

    async def end(self) -> None:
        """Trust nothing any more, and say goodbye."""

    def is_current(self) -> bool:
        """Whether cached entries that the feed accepts may be used now."""

    def now_ms(self) -> int:
        """The same time, also while nothing may be used."""

    def part(self) -> Part:
        """How it is, if it has to ask for that."""

    def forget(self) -> None:
        """Know nothing, trust nothing."""


class Feed:
    """The tombstones of one process.

    Floor and tombstones are one attribute, because threads judge while another one learns: a
    floor from before and tombstones from after would let an old entry through.

    Args:
        on_restore: called when the store is not the one we knew (it went back to a backup), with
            the keys that had been touched since: whatever is cached must go.
        on_news: called when something was learned.

    Attributes:
        heard: lines of the log after `seq` that are known from others' news: their tombstones are
            kept, and the store has yet to confirm them.
    """

    def __init__(
        self,
        on_restore: Callable[[list[str]], None],
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_restore = on_restore
        self._on_news = on_news
        self.forget()

    def forget(self) -> None:
        """Know nothing."""
        self.seq = 0
        self.epoch = ""
        self.has_foreign = False
        """Whether the store has keys that were made elsewhere."""
        self._start_from(0)
        self.state = object()
        """Another one whenever something was learned: what was accepted by the present one still
        is. Whoever uses it reads it after asking whether the feed is current."""

    def _start_from(self, floor: int) -> None:
        """Nothing that was read before `floor` is believed; what comes after leaves tombstones.
        What was heard goes with them, or it would be acknowledged without."""
        self.heard: tuple[Touched, ...] = ()
        self._known: tuple[int, dict[str, int]] = (floor, {})

    def begin(self, present: Changes) -> None:
        """Start from the recent past, so that fresh entries in Redis are of use after a restart."""
        self.epoch = present.epoch
        self.has_foreign = present.has_foreign
        self.seq = max(0, present.seq - _RECENT)
        self._start_from(self.seq)
        self.state = object()

    def accepts(self, key_id: str, organization_id: str, as_of: int) -> bool:
        """Whether an entry read at `as_of` still says the truth, by all that is known."""
        floor, tombstones = self._known
        return (
            as_of >= floor
            and as_of >= tombstones.get(key_id, 0)
            and as_of >= tombstones.get(organization_id, 0)
        )

    @property
    def tombstones(self) -> int:
        """How many are known."""
        return len(self._known[1])

    @property
    def heard_seq(self) -> int:
        """Up to where the log is known, by reading it or by others' news."""
        return self.heard[-1][0] if self.heard else self.seq

    def hear(self, news: News) -> bool:
        """Believe what somebody else has read, where it tells all that happened after `seq`.

        Tombstones only take away, so it is safe to believe early. What is known for sure (`seq`)
        does not move: the store confirms, and acknowledges, what was heard when it is asked.

        Returns:
            False: the store has to be asked what happened, because this does not tell, or nothing
            that is not known, or of everything at once.
        """
        told = news.changes
        if told.epoch != self.epoch or not news.since <= self.seq < told.seq:
            return False
        lines = tuple(line for line in told.touched if line[0] > self.seq)
        if not lines or lines[-1][0] != told.seq or any(map(_needs_a_look, lines)):
            return False
        if told.seq > self.heard_seq:
            self._bury(lines)
            self.heard = lines
            self.state = object()
            self._on_news()
        return True

    def apply(self, changes: Changes, reached: int = 0) -> None:
        """Learn what was committed after `seq`.

        Args:
            changes: the store's answer.
            reached: a sequence number that the store had given out before it was asked.
        """
        is_news = (changes.seq, changes.epoch) != (self.seq, self.epoch)
        if self.epoch and self._went_back(changes, reached):
            self._restored(changes)
        elif not changes.complete or len(self._known[1]) > _MAX_TOMBSTONES:
            self._start_from(changes.seq)
        else:
            self._bury(changes.touched)
        self.seq = changes.seq
        self.epoch = changes.epoch
        self.has_foreign = changes.has_foreign
        self.heard = tuple(line for line in self.heard if line[0] > self.seq)
        if is_news:
            self.state = object()  # last: nobody finds the new one beside the old tombstones
            self._on_news()

    def _bury(self, lines: Iterable[Touched]) -> None:
        for seq, key_id, organization_id in lines:
            if key_id is None and organization_id is None:
                self._start_from(seq)
            tombstones = self._known[1]
            for touched in (key_id, organization_id):
                if touched is not None:  # a later one may have been heard of already
                    tombstones[touched] = max(seq, tombstones.get(touched, 0))

    def _went_back(self, changes: Changes, reached: int) -> bool:
        """Whether this store is not the one that we knew, or that others told of: news are sealed
        and told after the commit, so a store that contradicts them has gone back since."""
        if changes.epoch != self.epoch or changes.seq < max(self.seq, reached):
            return True
        due = {line for line in self.heard if line[0] <= changes.seq}
        return changes.complete and not due.issubset(changes.touched)

    def _restored(self, changes: Changes) -> None:
        self.seq = self.heard_seq  # the last number that is known to have been given out
        log.critical(
            "the store went from %s/%d to %s/%d: was it restored from a backup? "
            "Keys that were revoked in between may be alive again",
            *(self.epoch, self.seq, changes.epoch, changes.seq),
        )
        doubtful = {key_id for _, key_id, _ in self.heard if key_id is not None}
        touched = [
            name for name, seq in self._known[1].items() if seq > changes.seq or name in doubtful
        ]
        self._start_from(changes.seq)
        self._on_restore(touched)


def _needs_a_look(line: Touched) -> bool:
    """Whether a line says too little: of everything, or of many new keys, which may be the first
    that were made elsewhere."""
    _, key_id, organization_id = line
    return key_id is None and organization_id in (None, NOBODY)
