"""The audit log: who did what to which key, and when.

The law of this file: a line is written in the transaction that does the deed, so neither is ever
there without the other. A line is never changed, and deleted only by its age (`prune_events`).
Nothing secret is in one, and nothing that may be long: of metadata, only the digest.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, delete, func, insert, select

from keylatch.core.decisions import AuditEvent
from keylatch.storage.schema import audit, keys

OPERATOR: Final = "operator"
"""Who acts where nobody says who."""
_PRUNE_BATCH: Final = 5_000


def digest_of(text: str) -> dict[str, Any]:
    """What a line holds of a text that may be long: enough to tell whether a given text was it."""
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
) -> None:
    """Add an entry; see `AuditEvent`. `environment`: of the key."""
    targets = [(organization_id, key_id, details, environment)]
    record_events(connection, at, actor, action, targets)


def record_events(
    connection: Connection,
    at: int,
    actor: str,
    action: str,
    targets: Sequence[tuple[str | None, str | None, Mapping[str, Any] | None, str | None]],
) -> None:
    """Add an entry for each organisation, key, details and environment it was done to."""
    connection.execute(
        insert(audit),
        [
            {
                "at": at,
                "actor": actor,
                "action": action,
                "organization_id": organization_id,
                "key_id": key_id,
                "details": json.dumps(details, separators=(",", ":")) if details else None,
                "environment": environment,
            }
            for organization_id, key_id, details, environment in targets
        ],
    )


def page_of_events(
    connection: Connection,
    organization_id: str | None,
    limit: int,
    key_id: str | None = None,
    before: int | None = None,
    environment: str | None = None,
) -> list[AuditEvent]:
    """Some lines, the newest first; see `Keyring.events`.

    A key's lines are its organisation's, so those of one key are read by the index of that key
    alone: asked for both at once, a database may choose to walk the log of the organisation.
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


def _has_key(connection: Connection, organization_id: str, key_id: str) -> bool:
    owner = select(keys.c.organization_id).where(keys.c.id == key_id)
    return connection.execute(owner).scalar() == organization_id


def prune_events(connection: Connection, before: int) -> int:
    """Delete lines that were written before a time, among the oldest thousands; return how many.

    The last of those thousands stays until the next time. So the newest line of all stays whatever
    its age, because SQLite would give its number to the next one.
    """
    oldest = select(audit.c.id).order_by(audit.c.id).limit(_PRUNE_BATCH).subquery()
    last = connection.execute(select(func.max(oldest.c.id))).scalar()
    old = audit.c.id < (last or 0), audit.c.at < before
    return connection.execute(delete(audit).where(*old)).rowcount
