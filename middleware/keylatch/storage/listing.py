"""What management reads: a key, a page of keys, which locators are taken, which keys have ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import (
    Connection,
    func,
    or_,
    select,
)

from keylatch.core.decisions import KeyRecord
from keylatch.core.keys import Key
from keylatch.storage.queries import SELECT_RECORDS, record_of
from keylatch.storage.schema import keys

_MAX_PARAMETERS: Final = 500  # parameters of one statement


@dataclass(frozen=True, slots=True)
class Page:
    """Some keys of a list, and the sequence number after which it goes on; None: that is all."""

    records: list[KeyRecord]
    next_cursor: int | None

    @property
    def keys(self) -> list[Key]:
        """The keys of this page."""
        return [Key(record) for record in self.records]


@dataclass(frozen=True, slots=True)
class InactiveKey:
    """A key that is refused: revoked at that time, or disabled (None)."""

    key_id: str
    deleted_at: int | None


def keys_by_locator(connection: Connection, locators: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Which locators are here: locator → (id of its key, whether that is deleted)."""
    existing: dict[str, tuple[str, bool]] = {}
    for start in range(0, len(locators), _MAX_PARAMETERS):
        statement = select(keys.c.locator, keys.c.id, keys.c.deleted_at).where(
            keys.c.locator.in_(locators[start : start + _MAX_PARAMETERS])
        )
        for locator, key_id, deleted_at in connection.execute(statement):
            existing[locator] = (key_id, deleted_at is not None)
    return existing


def get_key(
    connection: Connection, organization_id: str, key_id: str, environment: str | None = None
) -> KeyRecord | None:
    """A key of an organisation, and of an environment if one is given."""
    statement = SELECT_RECORDS.where(keys.c.id == key_id, keys.c.organization_id == organization_id)
    if environment is not None:
        statement = statement.where(keys.c.environment == environment)
    row = connection.execute(statement).first()
    return None if row is None else record_of(row)


def page_of_keys(
    connection: Connection,
    organization_id: str,
    limit: int,
    newest_first: bool,
    deleted: bool,
    after: int | None,
    unused_since: int | None = None,
    environment: str | None = None,
) -> Page:
    """Some keys of an organisation in the order of their creation, from an index and unsorted."""
    created_seq = keys.c.created_seq
    statement = SELECT_RECORDS.add_columns(created_seq).where(
        keys.c.organization_id == organization_id
    )
    if not deleted:
        statement = statement.where(keys.c.deleted_at.is_(None))
    if environment is not None:
        statement = statement.where(keys.c.environment == environment)
    if after is not None:
        statement = statement.where(created_seq < after if newest_first else created_seq > after)
    if unused_since is not None:
        statement = statement.where(
            func.coalesce(keys.c.last_used, keys.c.created_at) < unused_since
        )
    statement = statement.order_by(created_seq.desc() if newest_first else created_seq).limit(
        limit + 1
    )
    rows = connection.execute(statement).all()
    records = [record_of(row[:-1]) for row in rows[:limit]]
    return Page(records, rows[limit - 1][-1] if len(rows) > limit else None)


def inactive_keys(connection: Connection) -> list[InactiveKey]:
    """All keys that were revoked or disabled, of all organisations."""
    statement = select(keys.c.id, keys.c.deleted_at).where(
        or_(keys.c.deleted_at.is_not(None), keys.c.active.is_(False))
    )
    return [InactiveKey(*row) for row in connection.execute(statement.order_by(keys.c.id))]
