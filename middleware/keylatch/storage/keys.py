"""The keys: find, list, create, change, delete.

The law of this file is that of `key_changes`. `by` is the actor of a change; each change may raise
`CallerRefused`, `NotPermitted` (see `authorization`) or `QuotaExceeded` (see `quotas`), and then
nothing was changed.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypedDict, Unpack

from sqlalchemy import Connection, func, or_, select, update

from keylatch.core.decisions import KeyRecord
from keylatch.core.keys import Key
from keylatch.storage.authorization import OPERATOR, Actor, authorize, visible_key
from keylatch.storage.invalidation_log import advance, sequence
from keylatch.storage.key_changes import (
    GRANT_COLUMNS,
    apply_change,
    change_details,
    check_limits,
    insert_keys,
    is_restriction,
    what_is_revoked,
)
from keylatch.storage.quotas import Quotas, check_quota
from keylatch.storage.records import (
    FIND,
    FIND_BY_LOCATOR,
    LOCATOR_PARAMETERS,
    SELECT_RECORDS,
    Found,
    NotFound,
    find_record,
    read_found,
    record_of,
)
from keylatch.storage.repository import (
    MANY_ROWS_SECONDS,
    Repository,
    batches,
    changes,
    lock_sequence,
    reads,
    writes,
)
from keylatch.storage.schema import NO_ID, audit, invalidations, keys, organizations

PAGE_SIZE: Final = 500
"""Keys that are read at once: they occupy an event loop for a few milliseconds."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some keys of a list, and the cursor of the next page; None: this is the last one."""

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


class PageOptions(TypedDict, total=False):
    """See `KeyRepository.page`."""

    newest_first: bool
    deleted: bool
    unused_since: int | None
    environment: str | None


class KeyRepository(Repository):
    async def find(self, key_id: str, anchor: int = 0) -> Found | NotFound:
        """The key with this id, deleted or not.

        Args:
            key_id: of the key.
            anchor: the sequence number of a row of the log that the caller knows.
        """
        return read_found(await self._database.fetch(FIND, key_id=key_id, anchor=anchor), anchor)

    async def find_on_standby(self, key_id: str) -> Found | None:
        """The key as a standby has it, which may be an old state, or the state of another history;
        None: there is no standby, or it has no such key."""
        rows = await self._database.unmonitored.fetch_from_standby(FIND, key_id=key_id, anchor=0)
        found = read_found(rows, 0) if rows else None
        return found if isinstance(found, Found) else None

    async def find_by_locator(self, locators: Sequence[str], anchor: int = 0) -> Found | NotFound:
        """The key with the first of these locators that the store has, deleted or not; `anchor` as
        in `find`."""
        parameters: dict[str, Any] = dict.fromkeys(LOCATOR_PARAMETERS, locators[0])
        parameters |= zip(LOCATOR_PARAMETERS, locators, strict=False)
        rows = await self._database.fetch(FIND_BY_LOCATOR, anchor=anchor, **parameters)
        found = [read_found([row], anchor) for row in rows]
        by_locator = {each.record.locator: each for each in found if isinstance(each, Found)}
        # Usually there is one; where a token fits several, the most specific locator counts.
        return next(
            (by_locator[name] for name in locators if name in by_locator),
            NotFound(found[0].as_of, found[0].log),
        )

    @reads
    def by_locator(
        self, connection: Connection, locators: Sequence[str]
    ) -> dict[str, tuple[str, bool]]:
        """Which locators the store has: locator → (id of its key, whether that is deleted)."""
        return _by_locator(connection, locators)

    @reads
    def get(
        self,
        connection: Connection,
        organization_id: str,
        key_id: str,
        environment: str | None = None,
    ) -> KeyRecord | None:
        """The key if it belongs to the organisation, and to the environment if one is given."""
        return find_record(connection, organization_id, key_id, environment)

    @reads
    def page(
        self,
        connection: Connection,
        organization_id: str,
        limit: int = PAGE_SIZE,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        after: int | None = None,
        unused_since: int | None = None,
        environment: str | None = None,
    ) -> Page:
        """A page of the organisation's keys in the order of their creation, which an index has.

        Args:
            connection: of the transaction.
            organization_id: whose keys.
            limit: at most so many.
            newest_first: the order.
            deleted: include deleted keys.
            after: `next_cursor` of the page before; None: the first page.
            unused_since: only keys that were neither used nor created since then, in milliseconds.
            environment: only keys of this environment.
        """
        created_seq = keys.c.created_seq
        statement = SELECT_RECORDS.add_columns(created_seq).where(
            keys.c.organization_id == organization_id
        )
        if not deleted:
            statement = statement.where(keys.c.deleted_at.is_(None))
        if environment is not None:
            statement = statement.where(keys.c.environment == environment)
        if after is not None:
            is_next = created_seq < after if newest_first else created_seq > after
            statement = statement.where(is_next)
        if unused_since is not None:
            last_used = func.coalesce(keys.c.last_used, keys.c.created_at)
            statement = statement.where(last_used < unused_since)
        order = created_seq.desc() if newest_first else created_seq
        rows = connection.execute(statement.order_by(order).limit(limit + 1)).all()
        records = [record_of(row[:-1]) for row in rows[:limit]]
        return Page(records, rows[limit - 1][-1] if len(rows) > limit else None)

    async def pages(
        self, organization_id: str, *, after: int | None = None, **options: Unpack[PageOptions]
    ) -> AsyncIterator[Page]:
        """All pages; `options` as in `page`. No transaction is held between two pages: keys that
        are created meanwhile may be missing, keys that are deleted meanwhile may be there; no key
        is there twice."""
        while True:
            page = await self.page(organization_id, after=after, **options)
            yield page
            if page.next_cursor is None:
                return
            after = page.next_cursor

    @reads
    def check_quota(
        self,
        connection: Connection,
        organization_id: str,
        now_ms: int,
        quotas: Quotas,
        *,
        new_keys: int = 0,
    ) -> None:
        """Raises `QuotaExceeded` if a change by a key, which may add keys, would be refused now."""
        check_quota(connection, organization_id, now_ms, quotas, new_keys=new_keys)

    @writes
    def add(
        self, connection: Connection, record: KeyRecord, hashed: str, *, by: Actor = OPERATOR
    ) -> tuple[KeyRecord, int]:
        """Insert a key, and its organisation if it is new; return it and the sequence number.

        A key without an expiry gets that of the key that creates it.
        """
        # An invalidation: a process may have cached that there is no such key.
        [added], seq = insert_keys(
            connection, [(record, hashed)], by, "key.create", key_id=record.id
        )
        return added, seq

    @writes
    def add_many(
        self,
        connection: Connection,
        new_keys: Sequence[tuple[KeyRecord, str]],
        *,
        by: Actor = OPERATOR,
    ) -> tuple[list[KeyRecord], int]:
        """Insert keys with their hashes, all or none, in this order; return them and the sequence
        number.

        Every other change waits meanwhile, and the time limit on PostgreSQL is five seconds: a
        thousand keys take about 0.1 s.
        """
        return insert_keys(connection, new_keys, by, "key.import", organization_id=NO_ID)

    @writes
    def import_many(
        self,
        connection: Connection,
        new_keys: Sequence[tuple[KeyRecord, str]],
        *,
        by: Actor = OPERATOR,
    ) -> tuple[int, dict[str, tuple[str, bool]]]:
        """Insert imported keys, all or none, except those whose locator the store has.

        Returns:
            the sequence number, and the locators that the store had: see `by_locator`. The
            caller's own ids among them were inserted by an earlier attempt whose answer was lost.
        """
        existing = _by_locator(connection, [str(record.locator) for record, _ in new_keys])
        missing = [each for each in new_keys if each[0].locator not in existing]
        if not missing:
            return sequence(connection), existing
        _, seq = insert_keys(connection, missing, by, "key.import", organization_id=NO_ID)
        return seq, existing

    async def analyze(self) -> None:
        """Update the database's statistics after many keys were added."""
        await self._database.write(analyze, seconds=MANY_ROWS_SECONDS)

    @changes("key_id")
    def change(
        self,
        connection: Connection,
        organization_id: str,
        key_id: str,
        now_ms: int,
        values: Mapping[str, Any],
        *,
        by: Actor = OPERATOR,
    ) -> tuple[KeyRecord, int] | None:
        """Change columns of a key. A deleted key, and one that has these values, stays as it is.

        Returns:
            the record and a sequence number at which it is true; None: no such key.
        """
        found = visible_key(connection, by, organization_id, key_id)
        if found is None:
            return None
        record = found.record
        is_unchanged = all(getattr(record, name) == value for name, value in values.items())
        if record.deleted_at is not None or is_unchanged:
            if values.get("active") is False:
                # The first attempt may have been cut off while it waited for a standby.
                lock_sequence(connection)
            authorize(connection, by)
            return record, sequence(connection)
        seq = advance(connection, now_ms, key_id=key_id, revokes=what_is_revoked(record, values))
        authority = authorize(connection, by)
        authority.check(organization_id, record.permission, record.environment)
        details = change_details(values)
        if values.get("deleted_at") is not None:
            return apply_change(connection, record, now_ms, values, by, "key.delete", details), seq
        if values.get("active") or any(name in values for name in GRANT_COLUMNS):
            authority.check_grant(replace(record, **values))
        if not is_restriction(record, values):
            check_limits(connection, by, organization_id, now_ms)
        return apply_change(connection, record, now_ms, values, by, "key.change", details), seq

    @writes
    def replace_hash(self, connection: Connection, key_id: str, old: str, new: str) -> None:
        """Replace a hash, if it is still the old one, by another one of the same token: no answer
        about the key changes."""
        is_same = keys.c.id == key_id, keys.c.hash == old
        connection.execute(update(keys).where(*is_same).values(hash=new))

    async def inactive(self) -> Sequence[InactiveKey]:
        """The revoked and the disabled keys of all organisations: a restore must not re-activate
        them."""
        return await self._database.read(_inactive_keys, seconds=MANY_ROWS_SECONDS)

    async def list(self, organization_id: str, **options: Unpack[PageOptions]) -> list[KeyRecord]:
        """The records of all pages; `options` as in `page`."""
        pages = self.pages(organization_id, **options)
        return [record async for page in pages for record in page.records]


def _by_locator(connection: Connection, locators: Sequence[str]) -> dict[str, tuple[str, bool]]:
    existing: dict[str, tuple[str, bool]] = {}
    columns = select(keys.c.locator, keys.c.id, keys.c.deleted_at)
    for batch in batches(locators):
        statement = columns.where(keys.c.locator.in_(batch))
        for locator, key_id, deleted_at in connection.execute(statement):
            existing[locator] = (key_id, deleted_at is not None)
    return existing


def _inactive_keys(connection: Connection) -> list[InactiveKey]:
    is_inactive = or_(keys.c.deleted_at.is_not(None), keys.c.active.is_(False))
    statement = select(keys.c.id, keys.c.deleted_at).where(is_inactive).order_by(keys.c.id)
    return [InactiveKey(*row) for row in connection.execute(statement)]


def analyze(connection: Connection) -> None:
    """Let PostgreSQL count its rows, which it does by itself only minutes after many were added.
    SQLite uses the indexes without statistics."""
    if connection.dialect.name == "postgresql":
        for table in (keys, organizations, invalidations, audit):
            connection.exec_driver_sql(f"ANALYZE {table.name}")
