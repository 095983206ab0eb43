"""Changes of a whole organisation.

The law of this file is that of `key_changes`; one invalidation is for all keys of the organisation.
"""

from typing import Any

from sqlalchemy import Connection, Select, func, select, update

from keylatch.core.decisions import FULL
from keylatch.core.validation import LIVE
from keylatch.storage.audit import record_event
from keylatch.storage.authorization import OPERATOR, Actor, authorize, in_byte_order
from keylatch.storage.database import Contended
from keylatch.storage.invalidation_log import Revokes, advance
from keylatch.storage.key_changes import deletion_details, deletion_values, next_updated_at
from keylatch.storage.repository import MANY_ROWS_SECONDS, Repository, changes, reads
from keylatch.storage.schema import keys, organizations


class OrganizationRepository(Repository):
    @reads
    def is_active(self, connection: Connection, organization_id: str) -> bool:
        """Whether there is such an organisation, and it is not disabled."""
        matches_id = organizations.c.id == organization_id
        return bool(connection.execute(select(organizations.c.active).where(matches_id)).scalar())

    @changes("organization_id")
    def set_active(
        self,
        connection: Connection,
        organization_id: str,
        now_ms: int,
        active: bool,
        *,
        by: Actor = OPERATOR,
    ) -> int | None:
        """Enable or disable an organisation; the sequence number, or None: no such organisation."""
        matches_id = organizations.c.id == organization_id
        if connection.execute(select(organizations.c.id).where(matches_id)).first() is None:
            return None
        revokes: Revokes | None = None if active else "disable"
        seq = advance(connection, now_ms, organization_id=organization_id, revokes=revokes)
        authorize(connection, by).check(organization_id, FULL, LIVE)
        connection.execute(update(organizations).where(matches_id).values(active=active))
        action = "organization.enable" if active else "organization.disable"
        record_event(connection, now_ms, by.name, action, organization_id)
        return seq

    @changes("organization_id", seconds=MANY_ROWS_SECONDS)
    def revoke_all(
        self,
        connection: Connection,
        organization_id: str,
        now_ms: int,
        reason: str | None,
        *,
        by: Actor = OPERATOR,
    ) -> tuple[int, int]:
        """Delete every key of an organisation; their number, and the sequence number."""
        live = keys.c.organization_id == organization_id, keys.c.deleted_at.is_(None)
        in_order = select(keys.c.id).where(*live).order_by(in_byte_order(connection, keys.c.id))
        _count(connection, in_order.with_for_update())
        seq = advance(connection, now_ms, organization_id=organization_id, revokes="delete")
        # Keys that were created meanwhile. The sequence is locked: no key creates another one.
        every = select(keys.c.id).where(*live)
        locked = _count(connection, every.with_for_update(skip_locked=True))
        if locked < _count(connection, every):
            raise Contended("another transaction holds one of the keys")
        authorize(connection, by).check(organization_id, FULL, LIVE)
        count = connection.execute(
            update(keys)
            .where(*live)
            .values(**deletion_values(now_ms, reason), updated_at=next_updated_at(now_ms))
        ).rowcount
        details = {"count": count} | deletion_details(reason)
        action = "organization.revoke"
        record_event(connection, now_ms, by.name, action, organization_id, None, details)
        return count, seq


def _count(connection: Connection, statement: Select[Any]) -> int:
    count: int = connection.execute(
        select(func.count()).select_from(statement.subquery())
    ).scalar_one()
    return count
