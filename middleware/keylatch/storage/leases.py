"""The statements about leases: who holds one, who has acknowledged what, and how the bell rings.

`questions` has what a lease is about: the log of changes. Nothing here changes what a key may do.
"""

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
from sqlalchemy.types import UserDefinedType

from keylatch.storage.changes import now_ms
from keylatch.storage.database import Query, Rows
from keylatch.storage.queries import InvalidationBatch, read_invalidations, select_invalidations
from keylatch.storage.schema import invalidations, members

NOTIFY_CHANNEL: Final = "keylatch_invalidations"


@dataclass(frozen=True, slots=True)
class Poll:
    """The answer to a process that asks for a lease."""

    is_member: bool
    acknowledged_seq: int
    batch: InvalidationBatch
    store_seconds: float
    """The store's own time, in seconds since the epoch."""


class _Jsonb(UserDefinedType[Any]):
    """PostgreSQL's own, without the import of its dialect, which users of SQLite need not wait
    for."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "JSONB"


def _poll() -> Select[Any]:
    # The log is read as it was when the statement began, the grant is counted when the row is
    # locked: a little later. A removal in between finds fewer grants and takes the row away; then
    # none is counted here, and nothing was granted.
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
    # What a process heard is acknowledged only if it is, line by line, what the log says now: a
    # bell may be an old one, from before this store went back to a backup, with numbers that have
    # been given out again since. No key and no epoch can tell; the log can.
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
    logged = select(func.jsonb_agg(entries.c.entry, type_=_Jsonb)).scalar_subquery()
    pending = cast(bindparam("pending", type_=Text), _Jsonb)
    return case((logged == pending, pending_seq), else_=since)


def _laggards() -> Select[Any]:
    # One row at least, because nobody may be left who lags; and few, because it is asked often.
    totals = select(func.count().label("members")).select_from(members).subquery()
    lagging = members.c.acked_seq < bindparam("seq", type_=BigInteger)
    return select(totals.c.members, members.c.id, members.c.grants).join_from(
        totals, members, lagging, isouter=True
    )


LAGGARDS: Final = Query(_laggards())
POLL: Final = Query(_poll())
NOTIFY: Final = Query(select(func.pg_notify(NOTIFY_CHANNEL, bindparam("payload", type_=Text))))


def read_poll(rows: Rows, since: int) -> Poll:
    *_, acknowledged_seq, store_seconds = rows[0]
    is_member = acknowledged_seq is not None
    return Poll(is_member, acknowledged_seq or 0, read_invalidations(rows, since), store_seconds)


def join(connection: Connection, member: str) -> None:
    """A process will ask for leases under this name."""
    if not connection.execute(select(members.c.id).where(members.c.id == member)).all():
        connection.execute(
            insert(members).values(id=member, grants=0, acked_seq=0, joined_at=now_ms())
        )


def leave(connection: Connection, member: str) -> None:
    """A process holds no lease any more."""
    connection.execute(members.delete().where(members.c.id == member))


def remove_members(connection: Connection, laggards: Mapping[str, int], seq: int) -> int:
    """Remove members that were granted nothing since and still have not acknowledged `seq`.

    Whoever is locked is just being granted something, or hangs in the middle of it: next time.
    """
    removed = 0
    for member in sorted(laggards):
        condition = and_(
            members.c.id == member,
            members.c.grants == laggards[member],
            members.c.acked_seq < seq,
        )
        locked = select(members.c.id).where(condition).with_for_update(skip_locked=True)
        if connection.execute(locked).first() is not None:
            removed += connection.execute(members.delete().where(condition)).rowcount
    return removed
