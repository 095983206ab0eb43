"""The members, which hold leases: join, poll, leave; laggards and their removal.

Nothing here changes what a key may do. Lease polls and removals have a connection of their own
(`is_urgent`, `seconds`): they wait for no other transaction.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Case,
    Connection,
    Double,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from keylatch.storage.database import Query
from keylatch.storage.invalidation_log import (
    Invalidation,
    InvalidationBatch,
    InvalidationLog,
    select_invalidations,
)
from keylatch.storage.repository import MonitoredDatabase, Repository, writes
from keylatch.storage.schema import invalidations, members


@dataclass(frozen=True, slots=True)
class Poll:
    """The answer to a process that polls for a lease."""

    is_member: bool
    acknowledged_seq: int
    batch: InvalidationBatch
    store_seconds: float
    """The store's own time, in seconds since the epoch."""


def _poll() -> Select[Any]:
    # The log is read in the snapshot of the statement; the grant is counted when the row is locked,
    # a little later. If the member is removed in between, the removal found fewer grants: no grant
    # is counted here, and no lease is granted.
    granted = (
        update(members)
        .where(members.c.id == bindparam("member"))
        .values(grants=members.c.grants + 1, acked_seq=_acknowledged_seq())
        .returning(members.c.acked_seq)
        .cte("granted")
    )
    acknowledged_seq = select(granted.c.acked_seq).scalar_subquery()
    store_seconds = func.extract("epoch", func.clock_timestamp())
    return select_invalidations().add_columns(acknowledged_seq, cast(store_seconds, Double))


def _acknowledged_seq() -> Case[int]:
    # Pending invalidations are acknowledged only if they equal the log row by row: a notice may be
    # an old one, from before this store was restored from a backup, with sequence numbers that have
    # been given out again since. Neither key nor epoch shows that; the log does.
    since = bindparam("since", type_=BigInteger)
    pending_seq = bindparam("pending_seq", type_=BigInteger)
    entry = func.jsonb_build_array(
        invalidations.c.seq, invalidations.c.key_id, invalidations.c.organization_id
    ).label("entry")
    entries = (
        select(entry)
        .where(invalidations.c.seq > since, invalidations.c.seq <= pending_seq)
        .order_by(invalidations.c.seq)
        .subquery()
    )
    logged = select(func.jsonb_agg(entries.c.entry, type_=JSONB)).scalar_subquery()
    pending = cast(bindparam("pending", type_=Text), JSONB)
    return case((logged == pending, pending_seq), else_=since)


def _laggards() -> Select[Any]:
    # One row at least, also without laggards; and few rows, because the query is frequent.
    totals = select(func.count().label("members")).select_from(members).subquery()
    lagging = members.c.acked_seq < bindparam("seq", type_=BigInteger)
    return select(totals.c.members, members.c.id, members.c.grants).join_from(
        totals, members, lagging, isouter=True
    )


POLL: Final = Query(_poll())
LAGGARDS: Final = Query(_laggards())


class LeaseRepository(Repository):
    def __init__(self, database: MonitoredDatabase, log: InvalidationLog) -> None:
        super().__init__(database)
        self._log = log

    async def join(self, member: str, now_ms: int, seconds: float) -> None:
        """Add a member, so that it can poll for leases."""

        def work(connection: Connection) -> None:
            if not connection.execute(select(members.c.id).where(members.c.id == member)).all():
                connection.execute(
                    insert(members).values(id=member, grants=0, acked_seq=0, joined_at=now_ms)
                )

        await self._database.unmonitored.write(work, seconds=seconds, is_urgent=True)

    async def poll(
        self, member: str, seq: int, seconds: float, pending: tuple[Invalidation, ...] = ()
    ) -> Poll:
        """Acknowledge `seq`, count a grant, and read the log after `seq`, in one statement
        (PostgreSQL).

        Args:
            member: the member that polls.
            seq: up to where it has applied the log.
            seconds: see `Database.fetch`.
            pending: rows of the log after `seq` that it has received and applied; they are
                acknowledged as well if the log has the same rows up to the last of them.
        """
        rows = await self._database.unmonitored.fetch(
            POLL,
            seconds=seconds,
            member=member,
            since=seq,
            pending_seq=pending[-1][0] if pending else seq,
            pending=json.dumps(pending),
        )
        *_, acknowledged_seq, store_seconds = rows[0]
        is_member = acknowledged_seq is not None
        batch = self._log.read_batch(rows, seq)
        return Poll(is_member, acknowledged_seq or 0, batch, store_seconds)

    @writes
    def leave(self, connection: Connection, member: str) -> None:
        """Remove a member that holds no lease any more."""
        connection.execute(members.delete().where(members.c.id == member))

    async def laggards(self, seq: int, seconds: float) -> tuple[dict[str, int], int]:
        """Members that have not acknowledged `seq` (name → grants so far), and the number of all
        members."""
        rows = await self._database.unmonitored.fetch(LAGGARDS, seconds=seconds, seq=seq)
        laggards = {member: grants for _, member, grants in rows if member is not None}
        return laggards, rows[0][0]

    async def remove_members(self, laggards: Mapping[str, int], seq: int, seconds: float) -> int:
        """Remove the laggards that still have not acknowledged `seq` and were granted nothing
        since; return how many.

        A locked row is skipped: its member is being granted a lease, or hangs in that transaction.
        """

        def work(connection: Connection) -> int:
            return sum(
                _remove_member(connection, member, laggards[member], seq)
                for member in sorted(laggards)
            )

        return await self._database.unmonitored.write(work, seconds=seconds, is_urgent=True)


def _remove_member(connection: Connection, member: str, grants: int, seq: int) -> int:
    is_lagging = and_(members.c.id == member, members.c.grants == grants, members.c.acked_seq < seq)
    locked = select(members.c.id).where(is_lagging).with_for_update(skip_locked=True)
    if connection.execute(locked).first() is None:
        return 0
    return connection.execute(members.delete().where(is_lagging)).rowcount
