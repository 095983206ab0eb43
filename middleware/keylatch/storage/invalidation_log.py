"""The invalidation log: which key or organisation changed, by sequence number.

The law of this file: a transaction that changes what a key may do advances `meta.seq` and writes
its row of the log; no other transaction writes one. `meta.seq` and the log are read in one
statement, so in one snapshot: they cannot disagree.
"""

import secrets as csprng
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Connection,
    Select,
    Text,
    bindparam,
    func,
    insert,
    select,
    true,
    update,
)

from keylatch.storage.database import Query, Rows
from keylatch.storage.repository import Repository, may_delete, writes
from keylatch.storage.schema import invalidations, keys, meta

_MAX_ROWS: Final = 100_000
_MAX_ROWS_READ: Final = 1_000
_EPOCH_SEPARATOR: Final = "."
"""Between the epoch in the database and the hash of the database's identity."""
_NOTIFY_CHANNEL: Final = "keylatch_invalidations"

Invalidation = tuple[int, str | None, str | None]
"""A row of the log: seq, key id or None, organisation id or None."""


@dataclass(frozen=True, slots=True)
class InvalidationBatch:
    """The rows after a sequence number; `is_complete` is False where rows are missing: the log was
    pruned, or there are too many."""

    seq: int
    epoch: str
    is_complete: bool
    invalidations: tuple[Invalidation, ...] = ()
    has_imported_keys: bool = False
    """Whether the store has imported keys."""


def select_invalidations() -> Select[Any]:
    newer = (
        select(invalidations)
        .where(invalidations.c.seq > bindparam("since", type_=BigInteger))
        .order_by(invalidations.c.seq)
        .limit(_MAX_ROWS_READ + 1)
        .subquery()
    )
    return select(
        meta.c.seq,
        meta.c.epoch,
        meta.c.pruned_seq,
        newer.c.seq,
        newer.c.key_id,
        newer.c.organization_id,
        # The greatest one, because that is one step into an index on both databases.
        select(func.max(keys.c.locator)).where(keys.c.locator.is_not(None)).scalar_subquery(),
    ).join_from(meta, newer, true(), isouter=True)


INVALIDATIONS_SINCE: Final = Query(select_invalidations())
SEQUENCE: Final = Query(select(meta.c.seq))
_NOTIFY: Final = Query(select(func.pg_notify(_NOTIFY_CHANNEL, bindparam("payload", type_=Text))))


class InvalidationLog(Repository):
    """The log of the store, and the notifications that it has new rows.

    The epoch that it returns contains `database_hash`: copies of a store have the same tables, and
    values that Redis holds for one copy must not be used for another.
    """

    database_hash = ""

    async def since(self, since: int, seconds: float | None = None) -> InvalidationBatch:
        """The rows after the sequence number `since`; `seconds`: see `Database.fetch`."""
        rows = await self._database.fetch(INVALIDATIONS_SINCE, seconds=seconds, since=since)
        return self.read_batch(rows, since)

    def since_nowait(self, since: int) -> InvalidationBatch | None:
        """`since` without waiting (SQLite); None where that is impossible."""
        rows = self._database.unmonitored.fetch_nowait(INVALIDATIONS_SINCE, since=since)
        return self.read_batch(rows, since) if rows else None

    def sequence_nowait(self) -> int | None:
        """`meta.seq` without waiting (SQLite); None where that is impossible."""
        rows = self._database.unmonitored.fetch_nowait(SEQUENCE)
        return rows[0][0] if rows else None

    def read_batch(self, rows: Rows, since: int) -> InvalidationBatch:
        """The rows of a statement that begins with the columns of `select_invalidations`."""
        seq, epoch, pruned_seq, *_ = rows[0]
        is_complete = since >= pruned_seq and len(rows) <= _MAX_ROWS_READ
        entries = tuple((row[3], row[4], row[5]) for row in rows if row[3] is not None)
        return InvalidationBatch(
            seq,
            f"{epoch}{_EPOCH_SEPARATOR}{self.database_hash}",
            is_complete,
            entries if is_complete else (),
            rows[0][6] is not None,
        )

    async def notify(self, payload: str) -> None:
        """Send a NOTIFY (PostgreSQL) with less than 8,000 bytes."""
        await self._database.unmonitored.fetch(_NOTIFY, payload=payload)

    async def listen(self, on_notification: Callable[[str], None]) -> None:
        """Receive the payload of each NOTIFY (PostgreSQL) until the connection is lost."""
        await self._database.unmonitored.listen(_NOTIFY_CHANNEL, on_notification)

    @writes
    def start_new_epoch(self, connection: Connection, epoch: str, seq: int, now_ms: int) -> None:
        """Start a new epoch after a restore from a backup, with sequence numbers above `seq`, so
        that no cached value of the earlier epoch is used."""
        row = connection.execute(select(meta.c.seq, meta.c.epoch)).one()
        if row.epoch != epoch.partition(_EPOCH_SEPARATOR)[0] and row.seq >= seq:
            return  # another process did it
        connection.execute(update(meta).values(seq=max(row.seq, seq), epoch=csprng.token_hex(8)))
        advance(connection, now_ms)  # without an id it invalidates every key

    @writes
    def prune(self, connection: Connection) -> None:
        """Delete all but the newest 100,000 rows, if the role may."""
        oldest = sequence(connection) - _MAX_ROWS
        if oldest > 0 and may_delete(connection, invalidations):
            connection.execute(update(meta).values(pruned_seq=oldest))
            connection.execute(invalidations.delete().where(invalidations.c.seq <= oldest))


def sequence(connection: Connection) -> int:
    """The store's sequence number."""
    seq: int = connection.execute(SEQUENCE.statement).scalar_one()
    return seq


def advance(
    connection: Connection,
    now_ms: int,
    key_id: str | None = None,
    organization_id: str | None = None,
    steps: int = 1,
) -> int:
    """Advance the sequence number and write one invalidation; without an id, of every key."""
    seq = _advance(connection, steps)
    connection.execute(
        insert(invalidations).values(
            seq=seq, key_id=key_id, organization_id=organization_id, at=now_ms
        )
    )
    return seq


def advance_for_each(connection: Connection, now_ms: int, key_ids: Sequence[str]) -> int:
    """A sequence number and an invalidation for each of several keys; returns the last number."""
    seq = _advance(connection, len(key_ids))
    connection.execute(
        insert(invalidations),
        [
            {"seq": number, "key_id": key_id, "organization_id": None, "at": now_ms}
            for number, key_id in enumerate(key_ids, seq - len(key_ids) + 1)
        ],
    )
    return seq


def lock_sequence(connection: Connection) -> None:
    """Keep all other changes from committing until this transaction ends."""
    _advance(connection, 0)


def _advance(connection: Connection, steps: int) -> int:
    seq: int = connection.execute(
        update(meta).values(seq=meta.c.seq + steps).returning(meta.c.seq)
    ).scalar_one()
    return seq
