"""The members, which hold leases: join, poll, leave; laggards and their removal.

Nothing here changes what a key may do. Lease polls and removals have a connection of their own
(`is_urgent`, `seconds`): they wait for no other transaction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Case,
    ColumnElement,
    Connection,
    Double,
    Select,
    and_,
    bindparam,
    case,
    cast,
    func,
    insert,
    select,
    update,
)

from keylatch.storage.database import Query
from keylatch.storage.invalidation_log import (
    Invalidation,
    InvalidationBatch,
    InvalidationLog,
    Position,
    row_id_at,
    select_invalidations,
    server_age_ms,
    server_now_ms,
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
    server: str = ""
    """See `Database.lease_server`."""


@dataclass(frozen=True, slots=True)
class Laggards:
    """The members that have not acknowledged a change.

    Args:
        grants: name of a laggard → grants so far.
        members: the number of all members.
        server_age_seconds: for how long this server has committed changes; members that joined on
            the server before it may be missing here.
        row_id: of the change in the log; 0: the log does not have it.
    """

    grants: Mapping[str, int]
    members: int
    server_age_seconds: float
    row_id: int


def _poll() -> Select[Any]:
    # The log is read in the snapshot of the statement; the grant is counted when the row is locked,
    # a little later. If the member is removed in between, the removal found fewer grants: no grant
    # is counted here, and no lease is granted.
    granted = (
        update(members)
        .where(members.c.id == bindparam("member"))
        .values(grants=_next_grant(), acked_seq=_acknowledged_seq())
        .returning(members.c.acked_seq)
        .cte("granted")
    )
    acknowledged_seq = select(granted.c.acked_seq).scalar_subquery()
    store_seconds = func.extract("epoch", func.clock_timestamp())
    return select_invalidations().add_columns(acknowledged_seq, cast(store_seconds, Double))


def _next_grant() -> ColumnElement[int]:
    # Not one more: a crash loses the last grants, and a number that comes again would hide a grant
    # from a change that waits.
    return func.greatest(members.c.grants + 1, server_now_ms(), type_=BigInteger)


def _acknowledged_seq() -> Case[int]:
    # A sequence number says nothing by itself: after a failover or a restore that lost rows, it is
    # given out again, and a notice may be from before that. Only a process that knows the very row
    # of this log knows all rows before it; the count finds a notice that was missed in between. Any
    # other process has acknowledged nothing: what its row says may be from before the failover.
    since, since_row_id, pending, pending_row_id, pending_count = (
        bindparam(name, type_=BigInteger)
        for name in ("since", "since_row_id", "pending", "pending_row_id", "pending_count")
    )
    between = and_(invalidations.c.seq > since, invalidations.c.seq <= pending)
    count = select(func.count()).select_from(invalidations).where(between).scalar_subquery()
    is_since_known = row_id_at(since) == since_row_id
    is_pending_known = and_(row_id_at(pending) == pending_row_id, count == pending_count)
    return case(
        (and_(is_since_known, is_pending_known), pending),
        (is_since_known, since),
        else_=0,
    )


def _laggards() -> Select[Any]:
    # One row at least, also without laggards; and few rows, because the query is frequent.
    totals = select(func.count().label("members")).select_from(members).subquery()
    lagging = members.c.acked_seq < bindparam("seq", type_=BigInteger)
    server_age = select(server_age_ms()).scalar_subquery()
    row_id = row_id_at(bindparam("seq", type_=BigInteger))
    return select(totals.c.members, server_age, row_id, members.c.id, members.c.grants).join_from(
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
        self, member: str, known: Position, seconds: float, pending: Sequence[Invalidation] = ()
    ) -> Poll:
        """Acknowledge what the process knows, count a grant, and read the log after it, in one
        statement (PostgreSQL). A process that knows the rows of another history acknowledges
        nothing.

        Args:
            member: the member that polls.
            known: up to where it has applied the log.
            seconds: see `Database.fetch`.
            pending: rows of the log after `known` that it has received and applied; they are
                acknowledged as well if the log has them, and no others between them.
        """
        last = pending[-1].position if pending else known
        rows = await self._database.unmonitored.fetch(
            POLL,
            seconds=seconds,
            is_grant=True,
            member=member,
            since=known.seq,
            since_row_id=known.row_id,
            pending=last.seq,
            pending_row_id=last.row_id,
            pending_count=len(pending),
        )
        *_, acknowledged_seq, store_seconds = rows[0]
        is_member = acknowledged_seq is not None
        batch = self._log.read_batch(rows, known.seq)
        server = self._database.unmonitored.lease_server
        return Poll(is_member, acknowledged_seq or 0, batch, store_seconds, server)

    @writes
    def leave(self, connection: Connection, member: str) -> None:
        """Remove a member that holds no lease any more."""
        connection.execute(members.delete().where(members.c.id == member))

    async def laggards(self, seq: int, seconds: float) -> Laggards:
        """The members that have not acknowledged `seq`."""
        rows = await self._database.unmonitored.fetch(LAGGARDS, seconds=seconds, seq=seq)
        grants = {member: grants for *_, member, grants in rows if member is not None}
        members, server_age_ms, row_id, *_ = rows[0]
        return Laggards(grants, members, server_age_ms / 1_000, row_id)

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
