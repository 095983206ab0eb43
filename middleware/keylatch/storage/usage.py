"""How often keys were used: counts per key, day and outcome, and where each key was last seen.

The law of this file: it writes to its own two tables and nothing else, never advances `meta.seq`,
and adds a tally once, however often it is told to. An addition cannot be repeated like other work,
and whoever lost the answer of a commit does not know whether there was one; so each process numbers
its tallies and leaves the number of the newest one beside the counts, in the same transaction.

A day is one of UTC, as the number of days since the epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date as calendar_date
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Table,
    and_,
    bindparam,
    delete,
    func,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

from keylatch.core.decisions import KeyRecord
from keylatch.core.keys import Key
from keylatch.core.timestamps import datetime_of
from keylatch.storage.changes import record_last_used
from keylatch.storage.listing import get_key
from keylatch.storage.schema import NO_ID, clients, usage

ALLOWED: Final = "allowed"
DAY_MS: Final = 86_400_000
RETENTION_DAYS: Final = 400
"""How long counts are kept."""
_SEQUENCE_RETENTION_DAYS: Final = 7
_CLIENT_RETENTION_DAYS: Final = 90
_PRUNE_BATCH_SIZE: Final = 5_000

CountKey = tuple[str, int, str]
"""Of which key, on which day, with which outcome: `allowed`, or the name of a reason."""


@dataclass(frozen=True, slots=True)
class Client:
    """Where a key was seen: as little as tells one's own servers from somebody else's.

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
    """What one process has counted since its last one.

    Args:
        process_id: the process, 32 characters at most.
        sequence: greater than that of its last one.
        day: on which it was made.
        counts: what to add.
        clients: by key, the newest client.
    """

    process_id: str
    sequence: int
    day: int
    counts: Mapping[CountKey, int] = field(default_factory=dict)
    clients: Mapping[str, Client] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DayUsage:
    """The uses of a key on one day; a reason that never came has no entry."""

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
    """A key, the days on which it was used (the newest first), and where it was seen last."""

    record: KeyRecord
    days: list[DayUsage]
    client: Client | None

    @property
    def key(self) -> Key:
        """The key."""
        return Key(self.record)


def add_batch(connection: Connection, last_used: Mapping[str, int], batch: UsageBatch) -> None:
    """Add a tally and record when keys were last used, unless that was done before.

    Each table in the order of its keys, so that two processes cannot deadlock; that of the keys
    comes last, because changes of keys wait for it.
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
        total = usage.c.count + insertion.excluded.count
        connection.execute(
            insertion.on_conflict_do_update(
                index_elements=usage.primary_key, set_={"count": total}
            ),
            counts,
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
        insertion_of_clients = _insert(connection, clients)
        new = {
            name: insertion_of_clients.excluded[name] for name in ("network", "product", "seen_at")
        }
        connection.execute(
            insertion_of_clients.on_conflict_do_update(
                index_elements=clients.primary_key,
                set_=new,
                where=clients.c.seen_at < insertion_of_clients.excluded.seen_at,
            ),
            seen,
        )
    if last_used:
        record_last_used(connection, last_used)


def _advance_sequence(connection: Connection, batch: UsageBatch) -> bool:
    """Leave the tally's number, if it is not there yet; whoever else is about to is waited for."""
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
    # ON CONFLICT is spelled alike in both, and SQLAlchemy has it in their dialects only.
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table)


def usage_of(
    connection: Connection,
    organization_id: str,
    key_id: str,
    since_day: int,
    environment: str | None = None,
) -> KeyUsage | None:
    """How a key of an organisation was used since a day; None: it has no such key, or none in
    that environment."""
    record = get_key(connection, organization_id, key_id, environment)
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


def prune_usage(connection: Connection, today: int) -> None:
    """Let go of what is old, a few thousand rows at a time."""
    is_sequence_row = usage.c.key_id == NO_ID
    _prune(connection, usage.c.day, today - RETENTION_DAYS)
    _prune(connection, usage.c.day, today - _SEQUENCE_RETENTION_DAYS, is_sequence_row)
    _prune(connection, clients.c.seen_at, (today - _CLIENT_RETENTION_DAYS) * DAY_MS)


def _prune(
    connection: Connection, time: Column[int], before: int, *conditions: ColumnElement[bool]
) -> None:
    # The oldest is at the end of an index: whether there is anything to do costs nothing.
    oldest = connection.execute(select(func.min(time)).where(*conditions)).scalar()
    if oldest is None or oldest >= before:
        return
    table, old = time.table, and_(time < before, *conditions)
    key = list(table.primary_key)
    rows = connection.execute(select(*key).where(old).order_by(time).limit(_PRUNE_BATCH_SIZE))
    is_same_row = [column == bindparam(f"old_{column.name}") for column in key]
    names = [f"old_{column.name}" for column in key]
    parameters = [dict(zip(names, row, strict=True)) for row in sorted(rows)]
    if parameters:  # or somebody else was faster
        connection.execute(delete(table).where(*is_same_row, old), parameters)
