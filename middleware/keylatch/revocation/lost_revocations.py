"""Revokes again what the store has lost: each process remembers the revocations that it applied.

A failover to an asynchronous standby, or a restore from a backup, loses the last changes, also
revocations that were answered. So an answered revocation survives if one process that ran at the
time still runs. Every process does this by itself: repeating a revocation changes nothing.

The law of this file: until the store has a revocation again, this process refuses the key (503).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from keylatch.errors import StoreUnavailable
from keylatch.revocation.freshness import Freshness
from keylatch.revocation.invalidations import Break, Invalidations
from keylatch.storage.authorization import Actor
from keylatch.storage.invalidation_log import ChangeSeq, LogState, Position
from keylatch.storage.key_changes import deletion_values
from keylatch.storage.store import Found, Invalidation, Store
from keylatch.telemetry.health import Health

_RETRY_SECONDS: Final = 1.0
_ACTOR: Final = Actor("keylatch")
_REASON: Final = "The store lost this revocation; keylatch repeated it"

log = logging.getLogger("keylatch")


class LostRevocations:
    """Repeats revocations for one process.

    Args:
        store: that lost changes.
        invalidations: refuse what is not revoked again yet.
        freshness: reads the changes that are made here.
        now_ms: the store's time.
        publish: propagates a change, by its sequence number.
    """

    def __init__(
        self,
        store: Store,
        invalidations: Invalidations,
        freshness: Freshness,
        now_ms: Callable[[], int],
        publish: Callable[[int], Awaitable[object]],
    ) -> None:
        self._store = store
        self._invalidations = invalidations
        self._freshness = freshness
        self._now_ms = now_ms
        self._publish = publish
        self._health = Health(
            "lost revocations cannot be repeated: their keys are refused with 503",
            "all lost revocations are repeated",
        )
        self._breaks: list[Break] = []
        self._named: set[int] = set()  # row ids
        self._has_breaks = asyncio.Event()
        self._event_loop = asyncio.get_running_loop()

    @property
    def has_repeated_all(self) -> bool:
        """Whether the store has every revocation that this process remembers."""
        return not self._breaks

    def add(self, found: Break) -> None:
        """Repeat what this break lost; from any thread."""
        self._breaks.append(found)
        with suppress(RuntimeError):  # the event loop is closed: a start repeats nothing
            self._event_loop.call_soon_threadsafe(self._has_breaks.set)

    async def run(self) -> None:
        """Repeat lost revocations, until cancelled."""
        while True:
            await self._has_breaks.wait()
            self._has_breaks.clear()
            while self._breaks:
                try:
                    self._breaks[0] = await self._find_lost(self._breaks[0])
                    await self._repair(self._breaks[0])
                    self._health.record_success()
                    del self._breaks[0]
                except StoreUnavailable as error:
                    self._health.record_failure(error.message, error.hint)
                    await asyncio.sleep(_RETRY_SECONDS)

    async def _find_lost(self, found: Break) -> Break:
        """The break without the revocations that the store still has: it decides on their keys at
        once, also for a process whose role may change nothing."""
        history, anchor = self._invalidations.history, self._invalidations.known.seq
        lost, log_state = await self._store.invalidations.missing(found.revocations, anchor)
        self._require_history(log_state)
        ids = {row.row_id for row in lost}
        await self._release([row for row in found.revocations if row.row_id not in ids], history)
        return replace(found, revocations=tuple(lost))

    async def _repair(self, found: Break) -> None:
        history = self._invalidations.history
        self._name(found.revocations)
        for row in found.revocations:
            await self._repeat(row)
        # An epoch of its own ends what was signed in the lost part of the history.
        await self._store.invalidations.start_new_epoch(found.epoch, found.seq, self._now_ms())
        await self._release(found.revocations, history)

    async def _release(self, revocations: Sequence[Invalidation], history: object) -> None:
        # Another process may have revoked a key again: what was read here before is invalid once
        # its row is applied, and not earlier.
        await self._freshness.poll()
        if not self._invalidations.release(revocations, history):
            raise StoreUnavailable("the store lost changes once more, or another server answers")

    def _name(self, lost: Sequence[Invalidation]) -> None:
        """Log each of them once, also those that another process repeats."""
        for row in lost:
            if row.row_id not in self._named:
                self._named.add(row.row_id)
                what = f"key {row.key_id}" if row.key_id else f"organisation {row.organization_id}"
                again = "revoked" if row.revokes == "delete" else "disabled"
                log.critical("the store had lost a revocation of %s: it is %s again", what, again)

    async def _repeat(self, row: Invalidation) -> None:
        """Revoke what a row of the lost log revoked."""
        if row.key_id is not None:
            await self._revoke_key(row.key_id, row)
        elif row.organization_id is not None and row.revokes == "disable":
            await self._disable_organization(row.organization_id)
        elif row.organization_id is not None:
            async for page in self._store.keys.pages(row.organization_id):
                for record in page.records:
                    if record.created_at <= row.at:
                        await self._revoke_key(record.id, row)

    async def _revoke_key(self, key_id: str, row: Invalidation) -> None:
        found = await self._store.keys.find(key_id, self._invalidations.known.seq)
        self._require_history(found.log)
        if not isinstance(found, Found):  # its creation was lost, too
            return
        now_ms, record = self._now_ms(), found.record
        if record.deleted_at is not None or not (record.active or row.revokes == "delete"):
            return
        values: dict[str, Any] = {"active": False}
        if row.revokes == "delete":
            values = deletion_values(now_ms, _REASON)
        changed = await self._store.keys.change(
            record.organization_id, key_id, now_ms, values, by=_ACTOR
        )
        if changed is not None and isinstance(changed[1], ChangeSeq):  # else it was done meanwhile
            await self._propagate(changed[1])

    async def _disable_organization(self, organization_id: str) -> None:
        if not await self._store.organizations.is_active(organization_id):
            return
        seq = await self._store.organizations.set_active(
            organization_id, self._now_ms(), False, by=_ACTOR
        )
        if isinstance(seq, ChangeSeq):
            await self._propagate(seq)

    async def _propagate(self, seq: ChangeSeq) -> None:
        await self._publish(seq)
        await self._freshness.poll()
        if not self._invalidations.is_known(Position(seq, seq.row_id)):
            raise StoreUnavailable("another server made the change than the one that grants leases")

    def _require_history(self, log_state: LogState) -> None:
        if self._invalidations.as_of(log_state) is None:
            raise StoreUnavailable("another server answered than the one that grants leases")
