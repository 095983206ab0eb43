"""Rows of keys as `KeyRecord`s, and the queries that a check runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import BigInteger, Connection, Select, bindparam, select

from keylatch.core.decisions import KeyRecord
from keylatch.core.imported_tokens import MAX_LOCATORS
from keylatch.storage.database import Query, Rows
from keylatch.storage.invalidation_log import LogState, Position, row_id_at
from keylatch.storage.schema import keys, meta, organizations

EMPTY_LOG: Final = LogState(Position(0, 0), Position(0, 0))
"""What is known of a log that nothing was asked about."""


@dataclass(frozen=True, slots=True)
class Found:
    """A key, its hash, and the sequence number at which both were read; and the hash of the secret
    before the last rotation, whose expiry is in the record."""

    record: KeyRecord
    hash: str = field(repr=False)
    as_of: int
    previous_hash: str | None = field(default=None, repr=False)
    log: LogState = field(default=EMPTY_LOG, compare=False)


@dataclass(frozen=True, slots=True)
class NotFound:
    """The store had no such key at that sequence number."""

    as_of: int
    log: LogState = field(default=EMPTY_LOG, compare=False)


_RECORD_COLUMNS: Final = [
    organizations.c.active if name == "organization_active" else keys.c[name]
    for name in KeyRecord.__slots__
]
SELECT_RECORDS: Final[Select[Any]] = select(*_RECORD_COLUMNS).join(
    organizations, organizations.c.id == keys.c.organization_id
)


def _find(condition: Any) -> Query:
    # One row at least, so that `meta.seq` is from the snapshot of the key.
    anchor = bindparam("anchor", type_=BigInteger)
    return Query(
        select(
            meta.c.seq,
            row_id_at(meta.c.seq),
            row_id_at(anchor),
            keys.c.hash,
            keys.c.previous_hash,
            *_RECORD_COLUMNS,
        )
        .join_from(meta, keys, condition, isouter=True)
        .join(organizations, organizations.c.id == keys.c.organization_id, isouter=True)
    )


LOCATOR_PARAMETERS: Final = tuple(f"locator_{number}" for number in range(MAX_LOCATORS))
FIND: Final = _find(keys.c.id == bindparam("key_id"))
FIND_BY_LOCATOR: Final = _find(keys.c.locator.in_([bindparam(name) for name in LOCATOR_PARAMETERS]))


def record_of(columns: Sequence[Any]) -> KeyRecord:
    return KeyRecord(*columns)


def find_record(
    connection: Connection, organization_id: str, key_id: str, environment: str | None = None
) -> KeyRecord | None:
    """A key of an organisation, and of an environment if one is given."""
    statement = SELECT_RECORDS.where(keys.c.id == key_id, keys.c.organization_id == organization_id)
    if environment is not None:
        statement = statement.where(keys.c.environment == environment)
    row = connection.execute(statement).first()
    return None if row is None else record_of(row)


def read_found(rows: Rows, anchor: int) -> Found | NotFound:
    seq, row_id, anchor_row_id, hashed, previous, *record = rows[0]
    log = LogState(Position(seq, row_id), Position(anchor, anchor_row_id))
    if hashed is None:
        return NotFound(seq, log)
    return Found(record_of(record), hashed, seq, previous, log)
