"""What checks and leases ask of the store, and how the rows that answer are read.

Whatever is read to be cached carries `as_of`, the `seq` of the very snapshot it was read in. The
same statements run on SQLite and PostgreSQL.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Connection,
    Select,
    bindparam,
    func,
    select,
    true,
)

from keylatch.core.decisions import KeyRecord
from keylatch.core.imported_tokens import MAX_LOCATORS
from keylatch.storage.database import Query, Rows
from keylatch.storage.schema import invalidations, keys, meta, organizations, secrets

_MAX_INVALIDATIONS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Found:
    """A key, its hash, and the sequence number at which both were true; and the hash of the secret
    before the last rotation, whose end is in the record."""

    record: KeyRecord
    hash: str = field(repr=False)
    as_of: int
    previous_hash: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class NotFound:
    """There was no such key at that sequence number."""

    as_of: int


Invalidation = tuple[int, str | None, str | None]
"""A line of the log: seq, key id or None, organisation id or None."""


@dataclass(frozen=True, slots=True)
class InvalidationBatch:
    """What happened after a sequence number; `complete` is False where not all of it is told."""

    seq: int
    epoch: str
    is_complete: bool
    invalidations: tuple[Invalidation, ...] = ()
    has_imported_keys: bool = False
    """Whether there is any key that was made elsewhere."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """The store's own secrets, so that they can rotate: the first of each makes, all are read."""

    mac_keys: tuple[bytes, ...] = field(repr=False)
    peppers: tuple[bytes, ...] = field(repr=False)
    as_of: int


_RECORD_COLUMNS: Final = [
    organizations.c.active if name == "organization_active" else keys.c[name]
    for name in KeyRecord.__slots__
]
_STORED: Final = tuple(name for name in KeyRecord.__slots__ if name in keys.c)
SELECT_RECORDS: Final[Select[Any]] = select(*_RECORD_COLUMNS).join(
    organizations, organizations.c.id == keys.c.organization_id
)


def select_invalidations() -> Select[Any]:
    # One statement, so one snapshot: the counter and the log cannot disagree.
    newer = (
        select(invalidations)
        .where(invalidations.c.seq > bindparam("since", type_=BigInteger))
        .order_by(invalidations.c.seq)
        .limit(_MAX_INVALIDATIONS + 1)
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


def _find() -> Select[Any]:
    return (
        select(meta.c.seq, keys.c.hash, keys.c.previous_hash, *_RECORD_COLUMNS)
        .join_from(meta, keys, keys.c.id == bindparam("key_id"), isouter=True)
        .join(organizations, organizations.c.id == keys.c.organization_id, isouter=True)
    )


def _find_by_locator() -> Select[Any]:
    locators: list[Any] = [bindparam(name) for name in LOCATOR_PARAMETERS]
    return (
        select(meta.c.seq, keys.c.hash, keys.c.previous_hash, *_RECORD_COLUMNS)
        .join_from(meta, keys, keys.c.locator.in_(locators), isouter=True)
        .join(organizations, organizations.c.id == keys.c.organization_id, isouter=True)
    )


LOCATOR_PARAMETERS: Final = tuple(f"locator_{number}" for number in range(MAX_LOCATORS))


def _secrets() -> Select[Any]:
    # Those that nothing is made with yet come last, so that the first one makes.
    return (
        select(meta.c.seq, secrets.c.kind, secrets.c.value)
        .join_from(meta, secrets, true())
        .order_by(secrets.c.enabled.desc(), secrets.c.id.desc())
    )


INVALIDATIONS_SINCE: Final = Query(select_invalidations())
FIND: Final = Query(_find())
FIND_BY_LOCATOR: Final = Query(_find_by_locator())
SECRETS: Final = Query(_secrets())
SEQUENCE: Final = Query(select(meta.c.seq))


def read_invalidations(rows: Rows, since: int) -> InvalidationBatch:
    seq, epoch, pruned_seq, *_ = rows[0]
    is_complete = since >= pruned_seq and len(rows) <= _MAX_INVALIDATIONS
    entries = tuple((row[3], row[4], row[5]) for row in rows if row[3] is not None)
    return InvalidationBatch(
        seq, epoch, is_complete, entries if is_complete else (), rows[0][6] is not None
    )


def read_found(rows: Rows) -> Found | NotFound:
    seq, hashed, previous, *record = rows[0]
    return NotFound(seq) if hashed is None else Found(record_of(record), hashed, seq, previous)


def read_found_by_locator(rows: Rows, locators: Sequence[str]) -> Found | NotFound:
    found = [read_found([row]) for row in rows]
    found_by_locator = {each.record.locator: each for each in found if isinstance(each, Found)}
    # As a rule there is one; where a token fits several, the locator that says most counts.
    return next(
        (found_by_locator[name] for name in locators if name in found_by_locator),
        NotFound(rows[0][0]),
    )


def record_of(columns: Sequence[Any]) -> KeyRecord:
    return KeyRecord(*columns)


def read_secrets(rows: Rows) -> Secrets:
    return Secrets(
        mac_keys=tuple(value for _, kind, value in rows if kind == "mac"),
        peppers=tuple(value for _, kind, value in rows if kind == "pepper"),
        as_of=rows[0][0],
    )


def load_secrets(connection: Connection) -> Secrets:
    """The store's secrets, in one snapshot."""
    return read_secrets([tuple(row) for row in connection.execute(SECRETS.statement)])


def sequence(connection: Connection) -> int:
    """The store's sequence number."""
    seq: int = connection.execute(SEQUENCE.statement).scalar_one()
    return seq
