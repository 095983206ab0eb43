"""The invalidation log: which key or organisation changed, by sequence number.

The law of this file: a transaction that changes what a key may do advances `meta.seq` and writes
its row of the log; no other transaction writes one. `meta.seq` and the log are read in one
statement, so in one snapshot: they cannot disagree.
"""

import secrets as csprng
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Select,
    Text,
    bindparam,
    case,
    cast,
    func,
    insert,
    literal,
    select,
    true,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from keylatch.storage.database import Query, Rows
from keylatch.storage.repository import (
    Repository,
    batches,
    lock_sequence,
    may_delete,
    reads,
    writes,
)
from keylatch.storage.schema import invalidations, keys, meta

_MAX_ROWS: Final = 100_000
_MAX_ROWS_READ: Final = 1_000
_EPOCH_SEPARATOR: Final = "."
"""Between the epoch in the database and the hash of the database's identity."""
_NOTIFY_CHANNEL: Final = "keylatch_invalidations"

Revokes = Literal["delete", "disable"]
"""What a change took away: the key, or anything less."""


class Position(NamedTuple):
    """A row of the log, by its sequence number and its own random id; row id 0: there is none."""

    seq: int
    row_id: int


class LogState(NamedTuple):
    """The log in the snapshot of a query.

    Args:
        position: of the newest row.
        anchor: the row with the sequence number that the process asked about; row id 0: none.
    """

    position: Position
    anchor: Position


class ChangeSeq(int):
    """The sequence number of a change, with the id of its row: numbers are given out again."""

    row_id: int

    @classmethod
    def of(cls, position: Position) -> "ChangeSeq":
        number = cls(position.seq)
        number.row_id = position.row_id
        return number


class Invalidation(NamedTuple):
    """A row of the log. `at` is the time of the change in milliseconds since the epoch."""

    seq: int
    key_id: str | None
    organization_id: str | None
    row_id: int = 0
    revokes: Revokes | None = None
    at: int = 0

    @property
    def position(self) -> Position:
        return Position(self.seq, self.row_id)


@dataclass(frozen=True, slots=True)
class InvalidationBatch:
    """The rows after a sequence number.

    Args:
        seq: of the newest row.
        epoch: of the store.
        is_complete: False: rows are missing, because the log was pruned, or there are too many.
        invalidations: the rows.
        has_imported_keys: whether the store has imported keys.
        row_id: of the newest row.
        since_row_id: of the row at the sequence number that was asked about; 0: there is none.
    """

    seq: int
    epoch: str
    is_complete: bool
    invalidations: tuple[Invalidation, ...] = ()
    has_imported_keys: bool = False
    row_id: int = 0
    since_row_id: int = 0

    @property
    def position(self) -> Position:
        return Position(self.seq, self.row_id)


def row_id_at(seq: ColumnElement[int]) -> ColumnElement[int]:
    """The id of the row with this sequence number; 0: there is none."""
    row_id = select(invalidations.c.row_id).where(invalidations.c.seq == seq).scalar_subquery()
    return func.coalesce(row_id, 0, type_=BigInteger)


def select_invalidations() -> Select[Any]:
    since = bindparam("since", type_=BigInteger)
    newer = (
        select(invalidations)
        .where(invalidations.c.seq > since)
        .order_by(invalidations.c.seq)
        .limit(_MAX_ROWS_READ + 1)
        .subquery()
    )
    # Not `meta.c.seq` of the row itself: the planner, which expects many rows of tables that were
    # never analysed, would count one look-up for each of them and compile the statement for it.
    last = select(meta.alias().c.seq).scalar_subquery()
    return select(
        meta.c.seq,
        row_id_at(last),
        meta.c.epoch,
        meta.c.pruned_seq,
        row_id_at(since),
        # The greatest one, because that is one step into an index on both databases.
        select(func.max(keys.c.locator)).where(keys.c.locator.is_not(None)).scalar_subquery(),
        *(newer.c[name] for name in Invalidation._fields),
    ).join_from(meta, newer, true(), isouter=True)


_BATCH_COLUMNS: Final = 6
INVALIDATIONS_SINCE: Final = Query(select_invalidations())
POSITION: Final = Query(select(meta.c.seq, row_id_at(meta.c.seq)))
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

    def position_nowait(self) -> Position | None:
        """The newest row without waiting (SQLite); None where that is impossible."""
        rows = self._database.unmonitored.fetch_nowait(POSITION)
        return Position(*rows[0]) if rows else None

    def read_batch(self, rows: Rows, since: int) -> InvalidationBatch:
        """The rows of a statement that begins with the columns of `select_invalidations`."""
        seq, row_id, epoch, pruned_seq, since_row_id, locator, *_ = rows[0]
        is_complete = since >= pruned_seq and len(rows) <= _MAX_ROWS_READ
        end = _BATCH_COLUMNS + len(Invalidation._fields)
        entries = (
            Invalidation(*row[_BATCH_COLUMNS:end])
            for row in rows
            if row[_BATCH_COLUMNS] is not None
        )
        return InvalidationBatch(
            seq,
            f"{epoch}{_EPOCH_SEPARATOR}{self.database_hash}",
            is_complete,
            tuple(entries) if is_complete else (),
            locator is not None,
            row_id,
            since_row_id,
        )

    @reads
    def missing(
        self, connection: Connection, rows: Sequence[Invalidation], anchor: int
    ) -> tuple[Sequence[Invalidation], LogState]:
        """Those of these rows that the log does not have; `anchor` as in `KeyRepository.find`."""
        columns = meta.c.seq, row_id_at(meta.c.seq), row_id_at(literal(anchor, BigInteger))
        seq, row_id, anchor_row_id = connection.execute(select(*columns)).one()
        log = LogState(Position(seq, row_id), Position(anchor, anchor_row_id))
        present: set[tuple[int, int]] = set()
        for batch in batches([row.seq for row in rows]):
            pairs = select(invalidations.c.seq, invalidations.c.row_id)
            found = connection.execute(pairs.where(invalidations.c.seq.in_(batch)))
            present.update((seq, row_id) for seq, row_id in found)
        return [row for row in rows if row.position not in present], log

    async def notify(self, payload: str) -> None:
        """Send a NOTIFY (PostgreSQL) with less than 8,000 bytes."""
        await self._database.unmonitored.fetch(_NOTIFY, payload=payload)

    async def listen(self, on_notification: Callable[[str], None]) -> None:
        """Receive the payload of each NOTIFY (PostgreSQL) until the connection is lost."""
        await self._database.unmonitored.listen(_NOTIFY_CHANNEL, on_notification)

    @writes
    def start_new_epoch(self, connection: Connection, epoch: str, seq: int, now_ms: int) -> None:
        """Start a new epoch after a break of the history, with sequence numbers above `seq`, so
        that no value that was cached in the earlier epoch is used."""
        before = select(meta.c.seq, meta.c.epoch)
        for lock in (False, True):  # several processes notice it at once; some may only read
            if lock:
                lock_sequence(connection)
            row = connection.execute(before).one()
            if row.epoch != epoch.partition(_EPOCH_SEPARATOR)[0] and row.seq >= seq:
                return  # another process did it
        values: dict[str, Any] = {"seq": max(row.seq, seq), "epoch": csprng.token_hex(8)}
        if connection.dialect.name == "postgresql":
            # The table of members is as old as the rest: revocations wait for those it lacks.
            values["server_since"] = server_now_ms()
        connection.execute(update(meta).values(values))
        advance(connection, now_ms)  # without an id it invalidates every key

    @writes
    def prune(self, connection: Connection) -> None:
        """Delete all but the newest 100,000 rows, if the role may."""
        oldest = sequence(connection) - _MAX_ROWS
        if oldest > 0 and may_delete(connection, invalidations):
            connection.execute(update(meta).values(pruned_seq=oldest))
            # The row at `oldest` stays: a process that is there compares its id.
            connection.execute(invalidations.delete().where(invalidations.c.seq < oldest))


def sequence(connection: Connection) -> int:
    """The store's sequence number."""
    seq: int = connection.execute(select(meta.c.seq)).scalar_one()
    return seq


def advance(
    connection: Connection,
    now_ms: int,
    key_id: str | None = None,
    organization_id: str | None = None,
    steps: int = 1,
    *,
    revokes: Revokes | None = None,
) -> int:
    """Advance the sequence number and write one invalidation; without an id, of every key.

    Args:
        connection: of the transaction.
        now_ms: the time of the change.
        key_id: the key that it concerns.
        organization_id: the organisation that it concerns.
        steps: by how much.
        revokes: what the change takes away.
    """
    row = Invalidation(0, key_id, organization_id, _new_row_id(), revokes, now_ms)
    if connection.dialect.name == "postgresql":  # one round trip
        advanced = _advancing(connection, steps).cte("advanced")
        values = row._asdict() | {"seq": advanced.c.seq}
        columns = [
            cast(value, invalidations.c[name].type).label(name) for name, value in values.items()
        ]
        statement = insert(invalidations).from_select(list(values), select(*columns))
        number = connection.execute(statement.returning(invalidations.c.seq)).scalar_one()
        return ChangeSeq.of(Position(number, row.row_id))
    seq = _advance(connection, steps, row.row_id)
    connection.execute(insert(invalidations).values(row._replace(seq=seq)._asdict()))
    return seq


def advance_for_each(
    connection: Connection, now_ms: int, key_ids: Sequence[str], *, revokes: Revokes | None = None
) -> int:
    """A sequence number and an invalidation for each of several keys; returns the last number."""
    seq = _advance(connection, len(key_ids), _new_row_id())
    row_ids = [*(_new_row_id() for _ in key_ids[1:]), seq.row_id]
    first = seq - len(key_ids) + 1
    connection.execute(
        insert(invalidations),
        [
            Invalidation(number, key_id, None, each, revokes, now_ms)._asdict()
            for number, (key_id, each) in enumerate(zip(key_ids, row_ids, strict=True), first)
        ],
    )
    return seq


def _advance(connection: Connection, steps: int, row_id: int) -> ChangeSeq:
    number = connection.execute(_advancing(connection, steps)).scalar_one()
    return ChangeSeq.of(Position(number, row_id))


def _advancing(connection: Connection, steps: int) -> ReturningUpdate[int]:
    """The statement that advances the sequence number and returns it."""
    values: dict[str, Any] = {"seq": meta.c.seq + steps}
    if connection.dialect.name == "postgresql":
        started = server_started()
        is_same = meta.c.server_started == started
        values["server_started"] = started
        values["server_since"] = case((is_same, meta.c.server_since), else_=server_now_ms())
    return update(meta).values(values).returning(meta.c.seq)


def _new_row_id() -> int:
    return csprng.randbits(62) + 1


def server_started() -> ColumnElement[int]:
    """PostgreSQL: when the server started, in microseconds since the epoch. It tells servers
    apart: a standby that takes over was started at another time than the primary before it."""
    seconds = func.extract("epoch", func.pg_postmaster_start_time())
    return cast(seconds * 1_000_000, BigInteger)


def server_age_ms() -> ColumnElement[int]:
    """PostgreSQL: how long this server has committed changes, in milliseconds."""
    is_same = meta.c.server_started == server_started()
    return case((is_same, server_now_ms() - meta.c.server_since), else_=0)


def server_now_ms() -> ColumnElement[int]:
    """PostgreSQL: the server's time in milliseconds since the epoch."""
    return cast(func.extract("epoch", func.clock_timestamp()) * 1_000, BigInteger)
