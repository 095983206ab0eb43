"""How often keys were used: counts per key, day and outcome, the last client and the last use.

The law of this file: it never advances `meta.seq`, writes to its own two tables and to the columns
`last_used` and `previous_last_used` of keys alone, and adds a batch once, however often it is given
it. An addition cannot be repeated like other work, and a process that lost the answer to a COMMIT
does not know whether it was committed; so each process numbers its batches, and the number of its
newest batch is written beside the counts, in the same transaction.

A day is a UTC day, as the number of days since the epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as calendar_date
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Table,
    and_,
    bindparam,
    delete,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from keylatch.core.decisions import PREVIOUS_SUFFIX, KeyRecord
from keylatch.core.keys import Key
from keylatch.core.timestamps import datetime_of
from keylatch.storage.authorization import in_byte_order
from keylatch.storage.records import find_record
from keylatch.storage.repository import Repository, batches, reads, writes
from keylatch.storage.schema import NO_ID, clients, keys, usage

ALLOWED: Final = "allowed"
DAY_MS: Final = 86_400_000
RETENTION_DAYS: Final = 400
"""How long counts are kept."""
_SEQUENCE_RETENTION_DAYS: Final = 7
_CLIENT_RETENTION_DAYS: Final = 90
_PRUNE_BATCH_SIZE: Final = 5_000

CountKey = tuple[str, int, str]
"""Key id, day, outcome: `allowed`, or the name of a reason."""


@dataclass(frozen=True, slots=True)
class Client:
    """Where a key was used from: just enough to recognise one's own servers.

    Args:
        address: a network, such as `192.0.2.0/24` or `2001:db8:7::/48`; None: not known.
        agent: the product's name, such as `curl`; None: not known.
        seen_at_ms: milliseconds since the epoch.
    """

    address: str | None
    agent: str | None
    seen_at_ms: int

    @property
    def seen_at(self) -> datetime:
        """When it was seen."""
        return datetime_of(self.seen_at_ms)


@dataclass(frozen=True, slots=True)
class UsageBatch:
    """What one process has counted since its last batch.

    Args:
        process_id: the process, 32 characters at most.
        sequence: greater than that of its last batch.
        day: on which the batch was made.
        counts: the uses to add.
        clients: the newest client of each key.
    """

    process_id: str
    sequence: int
    day: int
    counts: Mapping[CountKey, int] = field(default_factory=dict)
    clients: Mapping[str, Client] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DayUsage:
    """The uses of a key on one day; a reason without a use has no entry."""

    day: int
    """Days since the Unix epoch (UTC)."""
    allowed: int
    refused: Mapping[str, int]

    @property
    def date(self) -> calendar_date:
        """The day (UTC)."""
        return datetime_of(self.day * DAY_MS).date()


@dataclass(frozen=True, slots=True)
class KeyUsage:
    """A key, the days on which it was used (the newest first), and its last client."""

    record: KeyRecord
    days: list[DayUsage]
    client: Client | None

    @property
    def key(self) -> Key:
        """The key."""
        return Key(self.record)


class UsageRepository(Repository):
    """The usage of a store's keys."""

    async def record(self, last_used: Mapping[str, int], batch: UsageBatch | None = None) -> None:
        """Record when keys were last used (id → milliseconds), never backwards, and add a batch,
        once.

        It writes one column of a key and nothing else: writing a whole row back from a cache would
        re-activate a revoked key.
        """

        def work(connection: Connection) -> None:
            if batch is not None:
                add_batch(connection, last_used, batch)
            else:
                record_last_used(connection, last_used)

        if last_used or batch is not None:
            await self._database.unmonitored.write(work, durable=False)

    @reads
    def of_key(
        self,
        connection: Connection,
        organization_id: str,
        key_id: str,
        since_day: int,
        environment: str | None = None,
    ) -> KeyUsage | None:
        """How a key of an organisation was used since a day; None: the organisation, or the
        environment if one is given, has no such key."""
        record = find_record(connection, organization_id, key_id, environment)
        if record is None:
            return None
        rows = connection.execute(
            select(usage.c.day, usage.c.outcome, usage.c.count)
            .where(usage.c.key_id == key_id, usage.c.day >= since_day)
            .order_by(usage.c.day.desc(), usage.c.outcome.desc())
        )
        days: dict[int, dict[str, int]] = {}
        for day, outcome, count in rows:
            days.setdefault(day, {})[outcome] = count
        client = connection.execute(
            select(clients.c.network, clients.c.product, clients.c.seen_at).where(
                clients.c.key_id == key_id
            )
        ).first()
        return KeyUsage(
            record,
            [DayUsage(day, counts.pop(ALLOWED, 0), counts) for day, counts in days.items()],
            None if client is None else Client(*client),
        )

    @writes
    def prune(self, connection: Connection, today: int) -> None:
        """Delete old rows, 5,000 of each kind at a time."""
        is_sequence_row = usage.c.key_id == NO_ID
        _prune(connection, usage.c.day, today - RETENTION_DAYS)
        _prune(connection, usage.c.day, today - _SEQUENCE_RETENTION_DAYS, is_sequence_row)
        _prune(connection, clients.c.seen_at, (today - _CLIENT_RETENTION_DAYS) * DAY_MS)


def add_batch(connection: Connection, last_used: Mapping[str, int], batch: UsageBatch) -> None:
    """Add a batch and record when keys were last used, unless that was done before.

    Each table is written in the order of its primary key, so that two processes cannot deadlock;
    the keys come last, because changes of keys wait for them.
    """
    if not _advance_sequence(connection, batch):
        return
    counts = [
        {"key_id": key_id, "day": day, "outcome": outcome, "count": batch.counts[count]}
        for count in sorted(batch.counts)
        for key_id, day, outcome in [count]
    ]
    if counts:
        insertion = _insert(connection, usage)
        total = {"count": usage.c.count + insertion.excluded.count}
        connection.execute(
            insertion.on_conflict_do_update(index_elements=usage.primary_key, set_=total), counts
        )
    seen = [
        {
            "key_id": key_id,
            "network": each.address,
            "product": each.agent,
            "seen_at": each.seen_at_ms,
        }
        for key_id, each in sorted(batch.clients.items())
    ]
    if seen:
        insertion = _insert(connection, clients)
        new = insertion.excluded
        upsert = insertion.on_conflict_do_update(
            index_elements=clients.primary_key,
            set_={name: new[name] for name in ("network", "product", "seen_at")},
            where=clients.c.seen_at < new.seen_at,
        )
        connection.execute(upsert, seen)
    if last_used:
        record_last_used(connection, last_used)


def _advance_sequence(connection: Connection, batch: UsageBatch) -> bool:
    """Write the batch's number, unless it is there: the upsert waits for a concurrent one."""
    insertion = _insert(connection, usage).values(
        key_id=NO_ID, day=batch.day, outcome=batch.process_id, count=batch.sequence
    )
    upsert = insertion.on_conflict_do_update(
        index_elements=usage.primary_key,
        set_={"count": insertion.excluded.count},
        where=usage.c.count < insertion.excluded.count,
    ).returning(usage.c.count)
    return connection.execute(upsert).first() is not None


def _insert(connection: Connection, table: Table) -> Any:
    # Both databases have the same ON CONFLICT; SQLAlchemy has it only in their dialects.
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table)


_USED_AT: Final = bindparam("used_at", type_=BigInteger)
_RECORD_LAST_USED: Final = (
    update(keys)
    .where(
        keys.c.id == bindparam("used_id"),
        or_(keys.c.last_used.is_(None), keys.c.last_used < _USED_AT),
        or_(keys.c.deleted_at.is_(None), keys.c.deleted_at >= _USED_AT),
    )
    .values(last_used=_USED_AT)
)
_RECORD_PREVIOUS_LAST_USED: Final = (
    update(keys)
    .where(
        keys.c.id == bindparam("used_id"),
        keys.c.previous_hash.is_not(None),
        or_(keys.c.previous_last_used.is_(None), keys.c.previous_last_used < _USED_AT),
    )
    .values(previous_last_used=_USED_AT)
)


def record_last_used(connection: Connection, last_used: Mapping[str, int]) -> None:
    """Record uses, in the order of ids, so that two processes cannot deadlock."""
    newest: dict[str, int] = {}
    for secret, used_at in last_used.items():
        key_id = secret.removesuffix(PREVIOUS_SUFFIX)
        newest[key_id] = max(newest.get(key_id, 0), used_at)
    rows = [{"used_id": key_id, "used_at": newest[key_id]} for key_id in sorted(newest)]
    previous = sorted(secret for secret in last_used if secret.endswith(PREVIOUS_SUFFIX))
    if previous:  # both statements go through the keys from the smallest id
        _lock_in_order(connection, sorted(newest))
    connection.execute(_RECORD_LAST_USED, rows)
    if previous:
        rows = [
            {"used_id": secret.removesuffix(PREVIOUS_SUFFIX), "used_at": last_used[secret]}
            for secret in previous
        ]
        connection.execute(_RECORD_PREVIOUS_LAST_USED, rows)


def _lock_in_order(connection: Connection, key_ids: Sequence[str]) -> None:
    for batch in batches(key_ids):
        rows = select(keys.c.id).where(keys.c.id.in_(batch))
        ordered = rows.order_by(in_byte_order(connection, keys.c.id))
        connection.execute(ordered.with_for_update(key_share=True)).all()


def _prune(
    connection: Connection, time: Column[int], before: int, *conditions: ColumnElement[bool]
) -> None:
    # The oldest row is at the end of an index: a check that finds nothing to delete costs nothing.
    oldest = connection.execute(select(func.min(time)).where(*conditions)).scalar()
    if oldest is None or oldest >= before:
        return
    table, old = time.table, and_(time < before, *conditions)
    key = list(table.primary_key)
    rows = connection.execute(select(*key).where(old).order_by(time).limit(_PRUNE_BATCH_SIZE))
    is_same_row = [column == bindparam(f"old_{column.name}") for column in key]
    names = [f"old_{column.name}" for column in key]
    parameters = [dict(zip(names, row, strict=True)) for row in sorted(rows)]
    if parameters:  # else another process deleted them
        connection.execute(delete(table).where(*is_same_row, old), parameters)
