"""The audit log: who changed which key, and when.

The law of this file: an event is written in the transaction of its change, so neither exists
without the other. An event is never changed, and is deleted only by its age (`prune`). An event
holds no secret and nothing that may be long: of metadata, only the digest.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Update, delete, func, insert, select

from keylatch.core.decisions import AuditEvent
from keylatch.storage.repository import Repository, may_delete, reads, writes
from keylatch.storage.schema import audit, keys

OPERATOR: Final = "operator"
"""The actor of changes that name none."""
_PRUNE_BATCH: Final = 5_000


def digest_of(text: str) -> dict[str, Any]:
    """What an event holds of a text that may be long: enough to compare it with a given text."""
    encoded = text.encode()
    return {"sha256": hashlib.sha256(encoded).hexdigest(), "bytes": len(encoded)}


def record_event(
    connection: Connection,
    at: int,
    actor: str,
    action: str,
    organization_id: str | None,
    key_id: str | None = None,
    details: Mapping[str, Any] | None = None,
    environment: str | None = None,
    *,
    change: Update | None = None,
) -> None:
    """Add an event; see `AuditEvent`.

    Args:
        connection: of the transaction.
        at: the time of the change.
        actor: who made it.
        action: what it is called.
        organization_id: the organisation that it concerns.
        key_id: the key that it concerns.
        details: more about it.
        environment: of the key.
        change: the change, if it is not made yet.
    """
    values = _event(at, actor, action, organization_id, key_id, details, environment)
    event = insert(audit).values(values).inline()  # without RETURNING, which is a right to read
    if change is not None and connection.dialect.name == "postgresql":  # one round trip
        event = event.add_cte(change.cte("changed"))
    elif change is not None:
        connection.execute(change)
    connection.execute(event)


def record_events(
    connection: Connection,
    at: int,
    actor: str,
    action: str,
    targets: Sequence[tuple[str | None, str | None, Mapping[str, Any] | None, str | None]],
) -> None:
    """Add an event for each target: organisation, key, details, environment of the key."""
    connection.execute(insert(audit), [_event(at, actor, action, *target) for target in targets])


def _event(
    at: int,
    actor: str,
    action: str,
    organization_id: str | None,
    key_id: str | None,
    details: Mapping[str, Any] | None,
    environment: str | None,
) -> dict[str, Any]:
    return {
        "at": at,
        "actor": actor,
        "action": action,
        "organization_id": organization_id,
        "key_id": key_id,
        "details": json.dumps(details, separators=(",", ":")) if details else None,
        "environment": environment,
    }


class AuditRepository(Repository):
    """The audit log of a store."""

    @reads
    def events(
        self,
        connection: Connection,
        organization_id: str | None,
        limit: int,
        key_id: str | None = None,
        before: int | None = None,
        environment: str | None = None,
    ) -> Sequence[AuditEvent]:
        """At most `limit` events, the newest first; see `Keyring.events`.

        The events of a key are read by the index of keys alone: with both conditions, a database
        may choose to read the whole log of the organisation.
        """
        statement = select(audit).order_by(audit.c.id.desc()).limit(limit)
        if key_id is not None:
            if organization_id is not None and not _has_key(connection, organization_id, key_id):
                return []
            statement = statement.where(audit.c.key_id == key_id)
        elif organization_id is not None:
            statement = statement.where(audit.c.organization_id == organization_id)
        if environment is not None:
            statement = statement.where(audit.c.environment == environment)
        if before is not None:
            statement = statement.where(audit.c.id < before)
        return [
            AuditEvent(
                row.id,
                row.at,
                row.actor,
                row.action,
                row.organization_id,
                row.key_id,
                json.loads(row.details) if row.details else {},
            )
            for row in connection.execute(statement)
        ]

    @writes
    def prune(self, connection: Connection, before: int) -> int:
        """Delete events that were written before a time, among the oldest 5,000, if the role may;
        return how many.

        The newest of those 5,000 stays until the next call. So the newest event of all stays
        whatever its age, because SQLite would give its id to the next one.
        """
        if not may_delete(connection, audit):
            return 0
        oldest = select(audit.c.id).order_by(audit.c.id).limit(_PRUNE_BATCH).subquery()
        last = connection.execute(select(func.max(oldest.c.id))).scalar()
        old = audit.c.id < (last or 0), audit.c.at < before
        return connection.execute(delete(audit).where(*old)).rowcount


def _has_key(connection: Connection, organization_id: str, key_id: str) -> bool:
    owner = select(keys.c.organization_id).where(keys.c.id == key_id)
    return connection.execute(owner).scalar() == organization_id
