"""What the store has changed since: tombstones, and the rule by which cached entries are judged.

An entry may be used if nothing touched its key or its organisation after the sequence number at
which the entry was read (`as_of`), and if this process knows of everything that was committed
before now. The first half stops stale fills, the second half lost messages; each alone has been
shown to fail.

On SQLite the second half is exact: `is_current` reads the store's counter at every check. On
PostgreSQL `is_current` is never true by itself and every check asks (`catch_up`). A lease, when
it comes, makes `is_current` true until the lease ends; the rule stays.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from keylatch.store import Changes, Store

_MAX_TOMBSTONES: Final = 100_000
_RECENT: Final = 1_000
_END: Final = 2**62

log = logging.getLogger("keylatch")


class Feed:
    """The tombstones of one process.

    Args:
        store: where the changes come from.
        on_reset: called when the store is not the one we knew (it was restored from a backup):
            whatever is cached must go.
    """

    def __init__(self, store: Store, on_reset: Callable[[], None]) -> None:
        self._store = store
        self._on_reset = on_reset
        self.forget()

    def forget(self) -> None:
        """Know nothing, trust nothing."""
        self.seq = 0
        self.epoch = ""
        self._floor = 0
        self._tombstones: dict[str, int] = {}
        self._asking: asyncio.Task[None] | None = None
        self._asking_next: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Start from the recent past, so that fresh entries in Redis are of use after a restart.

        Raises:
            StoreUnavailable: nothing was learned.
        """
        present = await self._store.changes(_END)
        self.epoch = present.epoch
        self.seq = self._floor = max(0, present.seq - _RECENT)
        self._apply(await self._store.changes(self.seq))

    def is_current(self) -> bool:
        """Whether everything committed before this call is known; never waits."""
        seq = self._store.sequence_now()
        if seq is None:
            return False
        if seq != self.seq:
            changes = self._store.changes_now(self.seq)
            if changes is None:
                return False
            self._apply(changes)
        return True

    def accepts(self, key_id: str, organization_id: str, as_of: int) -> bool:
        """Whether an entry read at `as_of` still says the truth, by all that is known."""
        tombstones = self._tombstones
        return (
            self._floor <= as_of <= self.seq
            and as_of >= tombstones.get(key_id, 0)
            and as_of >= tombstones.get(organization_id, 0)
        )

    async def catch_up(self) -> None:
        """Learn everything committed before this call.

        At most one question is under way and one waits; whoever comes while the first is under
        way shares the second, because the first may have read before they came.

        Raises:
            StoreUnavailable: nothing was learned.
        """
        if self.is_current():
            return
        if self._asking is None:
            self._asking = self._ask_after(None)
            question = self._asking
        else:
            if self._asking_next is None:
                self._asking_next = self._ask_after(self._asking)
            question = self._asking_next
        await asyncio.shield(question)

    def _ask_after(self, earlier: asyncio.Task[None] | None) -> asyncio.Task[None]:
        task = asyncio.create_task(self._ask(earlier), name="keylatch-feed")
        task.add_done_callback(self._asked)
        return task

    def _asked(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # its waiters have it; nobody may be left to wait
        if self._asking is task:
            self._asking, self._asking_next = self._asking_next, None

    async def _ask(self, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await asyncio.wait([earlier])
        self._apply(await self._store.changes(self.seq))

    def _apply(self, changes: Changes) -> None:
        if self.epoch and (changes.epoch != self.epoch or changes.seq < self.seq):
            log.critical(
                "the store went back from %d to %d: was it restored from a backup? "
                "Keys that were revoked since may be alive again",
                self.seq,
                changes.seq,
            )
            self._tombstones.clear()
            self._floor = changes.seq
            self._on_reset()
        elif not changes.complete or len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.clear()
            self._floor = changes.seq
        else:
            for seq, key_id, organization_id in changes.touched:
                for touched in (key_id, organization_id):
                    if touched is not None:
                        self._tombstones[touched] = seq
                if key_id is None and organization_id is None:
                    self._floor = seq
        self.seq = changes.seq
        self.epoch = changes.epoch
