"""The statements about the store's own secrets: the check keys of tokens, and L2's peppers.

The law of this file is that of `changes`: whatever changes what the secrets are is ONE
transaction that advances `meta.seq` and writes the invalidation that names them. Work may be
repeated: a lost answer, or a crash between two steps, makes no second secret.
"""

import secrets as csprng
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Connection, and_, exists, func, insert, or_, select, update

from keylatch.storage.audit import record_event
from keylatch.storage.changes import advance
from keylatch.storage.schema import STORE_SECRETS_ID, keys, secrets

KINDS: Final = ("mac", "pepper")
_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class SecretInfo:
    """What there is to know of a secret without it."""

    id: int
    kind: str
    status_since: int
    """Milliseconds since the epoch: when it was added, or enabled."""
    status: Literal["primary", "enabled", "pending"]
    """What it is for: everything new; what was made before; nothing until everybody knows it."""


def list_secrets(connection: Connection) -> list[SecretInfo]:
    """All secrets, newest first."""
    rows = connection.execute(
        select(secrets.c.id, secrets.c.kind, secrets.c.status_since, secrets.c.enabled).order_by(
            secrets.c.id.desc()
        )
    ).all()
    primaries: dict[str, int] = {}
    for row in rows:
        if row.enabled:
            primaries.setdefault(row.kind, row.id)
    return [
        SecretInfo(
            *(row.id, row.kind, row.status_since),
            "pending"
            if not row.enabled
            else "primary"
            if primaries[row.kind] == row.id
            else "enabled",
        )
        for row in rows
    ]


def add_pending(connection: Connection, kinds: Sequence[str], now_ms: int, by: str) -> int:
    """Add a secret of each kind that none waits of; everybody is told of those as well that wait
    already, because whoever introduced them may not have lived to hear that they are known."""
    seq = advance(connection, now_ms, organization_id=STORE_SECRETS_ID)  # first: it locks
    record_event(connection, now_ms, by, "secrets.introduce", None, None, {"kinds": list(kinds)})
    pending = set(
        connection.execute(select(secrets.c.kind).where(secrets.c.enabled.is_(False))).scalars()
    )
    for kind in kinds:
        if kind not in pending:
            connection.execute(
                insert(secrets).values(
                    kind=kind, value=csprng.token_bytes(_BYTES), status_since=now_ms, enabled=False
                )
            )
    return seq


def promote(connection: Connection, kinds: Sequence[str], now_ms: int, by: str) -> int:
    """Make everything with what waits."""
    seq = advance(connection, now_ms, organization_id=STORE_SECRETS_ID)
    connection.execute(
        update(secrets)
        .where(secrets.c.kind.in_(kinds), secrets.c.enabled.is_(False))
        .values(enabled=True, status_since=now_ms)
    )
    record_event(connection, now_ms, by, "secrets.rotate", None, None, {"kinds": list(kinds)})
    return seq


def retire(
    connection: Connection, secret_id: int, before_ms: int, now_ms: int, by: str
) -> int | None:
    """Delete a secret if one that came into use after it, and before that time, makes now."""
    successor = secrets.alias()
    replaced = exists().where(
        successor.c.kind == secrets.c.kind,
        successor.c.id > secrets.c.id,
        successor.c.enabled,
        successor.c.status_since <= before_ms,
    )
    seq = advance(connection, now_ms, organization_id=STORE_SECRETS_ID)
    deleted = connection.execute(
        secrets.delete().where(secrets.c.id == secret_id, secrets.c.enabled, replaced)
    )
    if not deleted.rowcount:
        return None
    record_event(connection, now_ms, by, "secrets.retire", None, None, {"id": secret_id})
    return seq


def count_issued_before(connection: Connection, time_ms: int, now_ms: int) -> int:
    """Keys that are live and whose token was made here before that time."""
    made_at = func.coalesce(keys.c.rotated_at, keys.c.created_at)
    count: int = connection.execute(
        select(func.count()).select_from(keys).where(_is_live(now_ms), made_at < time_ms)
    ).scalar_one()
    return count


def _is_live(now_ms: int) -> ColumnElement[Any]:
    return and_(
        keys.c.deleted_at.is_(None),
        keys.c.locator.is_(None),  # made elsewhere
        or_(keys.c.expires_at.is_(None), keys.c.expires_at > now_ms),
    )
