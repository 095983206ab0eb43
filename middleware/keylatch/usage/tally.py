"""How often keys were used: counts per key, day and outcome, and where each key was last seen.

The law of this file: it writes to its own two tables and nothing else, never advances `meta.seq`,
and adds a tally once, however often it is told to. An addition cannot be repeated like other work,
and whoever lost the answer of a commit does not know whether there was one; so each process numbers
its tallies and leaves the number of the newest one beside the counts, in the same transaction.

A day is one of UTC, as the number of days since the epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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

from keylatch.model import KeyRecord
from keylatch.sql.changes import touch
from keylatch.sql.lists import get_key
from keylatch.sql.schema import NOBODY, clients, usage

ALLOWED: Final = "allowed"
DAY_MS: Final = 86_400_000
KEPT_DAYS: Final = 400
"""How long counts are kept."""
_KEPT_MARKS_DAYS: Final = 7
_KEPT_CLIENTS_DAYS: Final = 90
_PRUNED_AT_ONCE: Final = 5_000

Count = tuple[str, int, str]
"""Of which key, on which day, with which outcome: `allowed`, or the name of a reason."""


@dataclass(frozen=True, slots=True)
class Client:
    """Where a key was seen: as little as tells one's own servers from somebody else's.

    Args:
        address: a network, such as `192.0.2.0/24` or `2001:db8:7::/48`; None: not known.
        agent: the product's name, such as `curl`; None: not known.
        seen_at: milliseconds since the epoch.
    """

    address: str | None
    agent: str | None
    seen_at: int


@dataclass(frozen=True, slots=True)
class Tally:
    """What one process has counted since its last one.

    Args:
        by: the process, 32 characters at most.
        number: greater than that of its last one.
        day: on which it was made.
        counts: what to add.
        seen: by key, the newest client.
    """

    by: str
    number: int
    day: int
    counts: Mapping[Count, int] = field(default_factory=dict)
    seen: Mapping[str, Client] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Day:
    """The uses of a key on one day; a reason that never came has no entry."""

    day: int
    allowed: int
    refused: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class KeyUsage:
    """A key, the days on which it was used (the newest first), and where it was seen last."""

    record: KeyRecord
    days: list[Day]
    client: Client | None


def add_tally(connection: Connection, uses: Mapping[str, int], tally: Tally) -> None:
    """Add a tally and record when keys were last used, unless that was done before.

    Each table in the order of its keys, so that two processes cannot deadlock; that of the keys
    comes last, because changes of keys wait for it.
    """
    if not _is_new(connection, tally):
        return
    counts = [
        {"key_id": key_id, "day": day, "outcome": outcome, "count": tally.counts[count]}
        for count in sorted(tally.counts)
        for key_id, day, outcome in [count]
    ]
    if counts:
        adding = _insert(connection, usage)
        total = usage.c.count + adding.excluded.count
        connection.execute(
            adding.on_conflict_do_update(index_elements=usage.primary_key, set_={"count": total}),
            counts,
        )
    seen = [
        {"key_id": key_id, "address": each.address, "agent": each.agent, "seen_at": each.seen_at}
        for key_id, each in sorted(tally.seen.items())
    ]
    if seen:
        noting = _insert(connection, clients)
        new = {name: noting.excluded[name] for name in ("address", "agent", "seen_at")}
        connection.execute(
            noting.on_conflict_do_update(
                index_elements=clients.primary_key,
                set_=new,
                where=clients.c.seen_at < noting.excluded.seen_at,
            ),
            seen,
        )
    if uses:
        touch(connection, uses)


def _is_new(connection: Connection, tally: Tally) -> bool:
    """Leave the tally's number, if it is not there yet; whoever else is about to is waited for."""
    marking = _insert(connection, usage).values(
        key_id=NOBODY, day=tally.day, outcome=tally.by, count=tally.number
    )
    marked = marking.on_conflict_do_update(
        index_elements=usage.primary_key,
        set_={"count": marking.excluded.count},
        where=usage.c.count < marking.excluded.count,
    ).returning(usage.c.count)
    return connection.execute(marked).first() is not None


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
    found = get_key(connection, organization_id, key_id, environment)
    if found is None:
        return None
    rows = connection.execute(
        select(usage.c.day, usage.c.outcome, usage.c.count)
        .where(usage.c.key_id == key_id, usage.c.day >= since_day)
        .order_by(usage.c.day.desc(), usage.c.outcome.desc())
    )
    days: dict[int, dict[str, int]] = {}
    for day, outcome, count in rows:
        days.setdefault(day, {})[outcome] = count
    seen = connection.execute(
        select(clients.c.address, clients.c.agent, clients.c.seen_at).where(
            clients.c.key_id == key_id
        )
    ).first()
    return KeyUsage(
        found,
        [Day(day, counts.pop(ALLOWED, 0), counts) for day, counts in days.items()],
        None if seen is None else Client(*seen),
    )


def prune_tallies(connection: Connection, today: int) -> None:
    """Let go of what is old, a few thousand rows at a time."""
    of_nobody = usage.c.key_id == NOBODY
    _let_go(connection, usage.c.day, today - KEPT_DAYS)
    _let_go(connection, usage.c.day, today - _KEPT_MARKS_DAYS, of_nobody)
    _let_go(connection, clients.c.seen_at, (today - _KEPT_CLIENTS_DAYS) * DAY_MS)


def _let_go(
    connection: Connection, time: Column[int], before: int, *conditions: ColumnElement[bool]
) -> None:
    # The oldest is at the end of an index: whether there is anything to do costs nothing.
    oldest = connection.execute(select(func.min(time)).where(*conditions)).scalar()
    if oldest is None or oldest >= before:
        return
    table, old = time.table, and_(time < before, *conditions)
    key = list(table.primary_key)
    rows = connection.execute(select(*key).where(old).order_by(time).limit(_PRUNED_AT_ONCE))
    here = [column == bindparam(f"old_{column.name}") for column in key]
    names = [f"old_{column.name}" for column in key]
    asked = [dict(zip(names, row, strict=True)) for row in sorted(rows)]
    if asked:  # or somebody else was faster
        connection.execute(delete(table).where(*here, old), asked)
