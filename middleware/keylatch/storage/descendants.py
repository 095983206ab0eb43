"""The descendants of a key: the keys that it created, those that they created, and so on.

The law of this file is that of `key_changes`, and its order of locks that of `authorization`.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, literal, select, update

from keylatch.core.decisions import KeyRecord
from keylatch.storage.audit import record_events
from keylatch.storage.authorization import OPERATOR, Actor, authorize, lock_keys, visible_key
from keylatch.storage.invalidation_log import advance_for_each, sequence
from keylatch.storage.key_changes import deletion_details, deletion_values, next_updated_at
from keylatch.storage.records import SELECT_RECORDS, record_of
from keylatch.storage.repository import (
    MANY_ROWS_SECONDS,
    Repository,
    batches,
    changes,
    lock_sequence,
)
from keylatch.storage.schema import keys


class DescendantRepository(Repository):
    @changes(seconds=MANY_ROWS_SECONDS)
    def delete(
        self,
        connection: Connection,
        organization_id: str,
        key_id: str,
        now_ms: int,
        reason: str | None,
        *,
        by: Actor = OPERATOR,
    ) -> tuple[KeyRecord, int, int] | None:
        """Delete a key and its descendants.

        Returns:
            the key, how many were deleted, and the sequence number; None: no such key.
        """
        if visible_key(connection, by, organization_id, key_id, lock=False) is None:
            return None
        family = descendants_of(connection, organization_id, key_id)
        found = dict(lock_keys(connection, organization_id, family))
        lock_sequence(connection)
        # Keys that they created meanwhile; none creates another one while the sequence is locked.
        more = descendants_of(connection, organization_id, key_id) - found.keys()
        found |= lock_keys(connection, organization_id, more, wait=False)
        authority = authorize(connection, by)
        root = found[key_id]
        authority.check(organization_id, root.record.permission, root.record.environment)
        records = [found[each].record for each in sorted(found)]
        live = [each for each in records if each.deleted_at is None]
        if not live:
            return root.record, 0, sequence(connection)
        _delete_all(connection, [each.id for each in live], now_ms, reason)
        details = deletion_details(reason)
        targets = [
            (
                organization_id,
                each.id,
                details if each.id == key_id else details | {"createdBy": each.created_by},
                each.environment,
            )
            for each in live
        ]
        record_events(connection, now_ms, by.name, "key.delete", targets)
        seq = advance_for_each(connection, now_ms, [each.id for each in live], revokes="delete")
        row = connection.execute(SELECT_RECORDS.where(keys.c.id == key_id)).one()
        return record_of(row), len(live), seq


def descendants_of(connection: Connection, organization_id: str, key_id: str) -> set[str]:
    """The ids of a key and of its descendants."""
    family = select(literal(key_id).label("id")).cte("family", recursive=True)
    created = select(keys.c.id).where(
        keys.c.created_by == family.c.id, keys.c.organization_id == organization_id
    )
    family = family.union(created)
    return set(connection.execute(select(family.c.id)).scalars())


def _delete_all(
    connection: Connection, key_ids: Sequence[str], now_ms: int, reason: str | None
) -> None:
    for batch in batches(key_ids):
        connection.execute(
            update(keys)
            .where(keys.c.id.in_(batch))
            .values(**deletion_values(now_ms, reason), updated_at=next_updated_at(now_ms))
        )
