"""Propagation: from the commit of a change until no process decides by the state before it.

On SQLite the commit itself is enough: every check reads the sequence number of the store. On
PostgreSQL a change publishes what the log says and waits until every lease member has acknowledged
its sequence number, at most one lease period: by then every lease that was requested before the
commit has expired, and every later one came with the tombstone. Members that did not acknowledge
and whose grants did not advance for one lease period hold no lease; their rows are removed, so a
process that died delays one revocation, once.

The entry in Redis is overwritten first: a member that acknowledges finds no older value there.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from keylatch.caches.shared_cache import SharedCache
from keylatch.core.decisions import KeyRecord
from keylatch.errors import StoreUnavailable
from keylatch.revocation.invalidations import Invalidations
from keylatch.revocation.lease import Lease, boottime
from keylatch.revocation.notices import Notice
from keylatch.revocation.notifier import Notifier
from keylatch.storage.database import Durability
from keylatch.storage.invalidation_log import ChangeSeq
from keylatch.storage.leases import Laggards
from keylatch.storage.store import Store
from keylatch.telemetry.counters import Histogram

_MAX_WAIT_FACTOR: Final = 1.1
_MIN_POLL_SECONDS: Final = 0.001
_MAX_POLL_SECONDS: Final = 0.025
_NOTICE_REACH: Final = 8
"""Rows of the log that a notice carries at most. Other members may not know the last commits yet,
and a member that misses one between its `seq` and the notice has to poll the store."""

log = logging.getLogger("keylatch")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is known about the propagation of a change when its call returns.

    Args:
        seq: the sequence number of the change.
        acknowledged: members that have acknowledged it.
        members: processes that hold leases; 0 where every check reads the store itself.
        bound_seconds: no check decides by the state before the change later than this many seconds
            from now.
        durability: where the change is stored.
    """

    seq: int
    acknowledged: int
    members: int
    bound_seconds: float
    durability: Durability = "local"


class Propagation:
    """Propagates the changes that one process commits.

    Args:
        store: opened.
        invalidations: name the epoch under which Redis holds values.
        seconds: observes how long each awaited propagation took.
        shared_cache: Redis, if it is configured.
        lease: of this process (PostgreSQL); None: publishing and waiting are not needed.
        notifier: publishes notices (PostgreSQL).
        timer: seconds that never go back and never stand still.
    """

    def __init__(
        self,
        store: Store,
        invalidations: Invalidations,
        seconds: Histogram,
        *,
        shared_cache: SharedCache | None = None,
        lease: Lease | None = None,
        notifier: Notifier | None = None,
        timer: Callable[[], float] = boottime,
    ) -> None:
        self._store = store
        self._invalidations = invalidations
        self._seconds = seconds
        self._shared_cache = shared_cache
        self._lease = lease
        self._notifier = notifier
        self._timer = timer

    async def publish(
        self, seq: int, record: KeyRecord | None = None, wait: bool = True
    ) -> Receipt:
        """Propagate a committed change.

        Args:
            seq: its sequence number.
            record: the changed key; None: the change concerns more than one key, or none.
            wait: return when no process decides by the state before the change; False: publish,
                do not wait, and say how long it may take.

        Raises:
            StoreUnavailable: the store lost it meanwhile, in a failover.
        """
        began = self._timer()
        if self._shared_cache is not None and record is not None:
            await self._shared_cache.invalidate(record.id, self._invalidations.epoch)
        receipt = self._receipt(seq, acknowledged=0, members=0, bound_seconds=0.0)
        if self._lease is not None:
            receipt = await self._publish_to_members(self._lease, seq, wait)
        if wait:
            self._seconds.observe(self._timer() - began)
        return receipt

    def _receipt(self, seq: int, acknowledged: int, members: int, bound_seconds: float) -> Receipt:
        return Receipt(seq, acknowledged, members, bound_seconds, self._store.durability())

    async def _publish_to_members(self, lease: Lease, seq: int, wait: bool) -> Receipt:
        committed_at = self._timer()
        await self._publish_notice(lease, seq)
        if not wait:
            return self._receipt(seq, acknowledged=0, members=0, bound_seconds=lease.seconds)
        return await self._wait_until_acknowledged(lease.seconds, seq, committed_at)

    async def _publish_notice(self, lease: Lease, seq: int) -> None:
        """Publish the last rows of the log, read once for all members."""
        since = max(0, seq - _NOTICE_REACH)
        notice = None
        with suppress(StoreUnavailable):  # without rows, the notice makes every member poll
            notice = Notice(since, await self._store.invalidations.since(since, lease.seconds / 4))
        lease.on_notice(notice)  # this process is a member as well
        if self._notifier is not None:
            await self._notifier.publish(notice)

    async def _wait_until_acknowledged(
        self, lease_seconds: float, seq: int, committed_at: float
    ) -> Receipt:
        row_id = seq.row_id if isinstance(seq, ChangeSeq) else 0
        found = Laggards({}, members=0, server_age_seconds=0.0, row_id=row_id)
        grants: Mapping[str, int] = {}  # of the laggards of the first poll that found any
        counted_at = committed_at
        while True:
            polled = await self._poll_laggards(seq, lease_seconds)
            if polled is not None:
                _require_row(found.row_id, polled)
                found = polled
                # A standby that took over may lack the rows of members whose leases still run.
                if not found.grants and found.server_age_seconds >= lease_seconds:
                    break
                if not grants and found.grants:
                    # Read after the poll: a grant that the poll counted was made before this time.
                    grants, counted_at = found.grants, self._timer()
            now = self._timer()
            if now >= counted_at + lease_seconds:
                await self._remove_laggards(grants, seq, lease_seconds)
                break
            if now >= committed_at + lease_seconds * _MAX_WAIT_FACTOR:
                break  # the first poll was late: enough to answer, not enough to remove a member
            lagging = len(found.grants)
            await asyncio.sleep(_poll_interval(now - committed_at, lagging, found.members))
        acknowledged = found.members - len(found.grants)
        return self._receipt(seq, acknowledged, found.members, bound_seconds=0.0)

    async def _poll_laggards(self, seq: int, lease_seconds: float) -> Laggards | None:
        try:
            return await self._store.leases.laggards(seq, lease_seconds)
        except StoreUnavailable:
            return None  # the change is committed; time alone suffices

    async def _remove_laggards(
        self, laggards: Mapping[str, int], seq: int, lease_seconds: float
    ) -> None:
        """Remove members that acknowledged nothing and were granted nothing for a lease period."""
        try:
            removed = await self._store.leases.remove_members(laggards, seq, lease_seconds / 4)
        except StoreUnavailable:
            return  # the next revocation tries again
        if removed:
            log.warning(
                "removed %d lease members: they did not acknowledge a change within %g s",
                *(removed, lease_seconds),
            )


def _require_row(row_id: int, found: Laggards) -> None:
    """Raises `StoreUnavailable` if the store has lost the row of a change; 0: it is not known."""
    if row_id not in (0, found.row_id):
        raise StoreUnavailable("the store lost the change in a failover", "repeat the request")


def _poll_interval(elapsed: float, lagging: int, members: int) -> float:
    """Seconds until the next poll: half of the time that the laggards need at the rate so far. It
    polls often towards the end, and rarely while a dead member is waited for."""
    needed = elapsed * lagging / (members - lagging) if lagging < members else elapsed
    return min(max(_MIN_POLL_SECONDS, elapsed / 20, min(needed, elapsed) / 2), _MAX_POLL_SECONDS)
