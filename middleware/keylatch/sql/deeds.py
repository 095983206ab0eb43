"""The audit log: who did what to which key, and when.

The law of this file: a line is written in the transaction that does the deed, so neither is ever
there without the other; lines are never changed and never deleted. Nothing secret is in one.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, insert, select

from keylatch.model import Deed
from keylatch.sql.schema import audit

OPERATOR: Final = "operator"
"""Who acts where nobody says who."""


def write_down(
    connection: Connection,
    at: int,
    actor: str,
    action: str,
    organization_id: str | None,
    key_id: str | None = None,
    details: Mapping[str, Any] | None = None,
    environment: str | None = None,
) -> None:
    """Add an entry; see `Deed`. `environment`: of the key."""
    done_to = [(organization_id, key_id, details, environment)]
    write_down_all(connection, at, actor, action, done_to)


def write_down_all(
    connection: Connection,
    at: int,
    actor: str,
    action: str,
    done_to: Sequence[tuple[str | None, str | None, Mapping[str, Any] | None, str | None]],
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
            for organization_id, key_id, details, environment in done_to
        ],
    )


def page_of_deeds(
    connection: Connection,
    organization_id: str | None,
    limit: int,
    key_id: str | None = None,
    before: int | None = None,
    environment: str | None = None,
) -> list[Deed]:
    """Some lines, the newest first; see `Keyring.deeds`."""
    statement = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if organization_id is not None:
        statement = statement.where(audit.c.organization_id == organization_id)
    if key_id is not None:
        statement = statement.where(audit.c.key_id == key_id)
    if environment is not None:
        statement = statement.where(audit.c.environment == environment)
    if before is not None:
        statement = statement.where(audit.c.id < before)
    return [
        Deed(
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
