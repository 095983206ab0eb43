"""Changes of more than one column by rule: a new secret beside the old one, and the end of all keys
of an organisation. The law of `changes` holds here too.
"""

from dataclasses import replace
from typing import Any, Final

from sqlalchemy import Connection, case, func, select, update

from keylatch.drafts import NotPossible
from keylatch.model import KeyRecord
from keylatch.sql.changes import advance, locked_key
from keylatch.sql.deeds import write_down
from keylatch.sql.questions import sequence
from keylatch.sql.schema import keys

_NO_PREVIOUS: Final = {
    "previous_hash": None,
    "previous_partial_token": None,
    "previous_expires_at": None,
    "previous_last_used": None,
}


def rotate_key(
    connection: Connection,
    organization_id: str,
    key_id: str,
    now_ms: int,
    hashed: str,
    partial_token: str,
    ends_at: int | None,
    by: str,
) -> tuple[KeyRecord, int] | None:
    """Give a key another hash; the present one stays good until `ends_at` or the key's own end."""
    found = locked_key(connection, organization_id, key_id)
    if found is None:
        return None
    record, present, _ = found
    if present == hashed:  # repeated after its answer was lost
        return record, sequence(connection)
    if record.deleted_at is not None:
        raise NotPossible("The API key was deleted; that is final")
    values: dict[str, Any] = {
        "hash": hashed,
        "partial_token": partial_token,
        "rotated_at": now_ms,
        **_NO_PREVIOUS,
    }
    if ends_at is not None:
        values |= {
            "previous_hash": present,
            "previous_partial_token": record.partial_token,
            "previous_expires_at": min(ends_at, record.expires_at or ends_at),
            "previous_last_used": record.last_used,
        }
    told = {"graceEndsAt": values["previous_expires_at"]}
    return _changed(connection, record, now_ms, values, by, "key.rotate", told)


def end_grace(
    connection: Connection,
    organization_id: str,
    key_id: str,
    now_ms: int,
    goes_back: bool,
    by: str,
) -> tuple[KeyRecord, int] | None:
    """While two secrets of a key are good: keep the previous one only (`goes_back`), or end it."""
    found = locked_key(connection, organization_id, key_id)
    if found is None:
        return None
    record, _, previous = found
    if record.deleted_at is not None:
        raise NotPossible("The API key was deleted; that is final")
    if previous is None or record.grace_ends_at(now_ms) is None:
        raise NotPossible("No rotation of the API key is under way")
    values = dict[str, Any](_NO_PREVIOUS)
    if goes_back:
        values |= {"hash": previous, "partial_token": record.previous_partial_token}
    action = "key.rotate.cancel" if goes_back else "key.rotate.finish"
    return _changed(connection, record, now_ms, values, by, action, {})


def revoke_all(
    connection: Connection, organization_id: str, now_ms: int, reason: str | None, by: str
) -> tuple[int, int]:
    """Delete every key of an organisation; their number, and one sequence number for all."""
    live = keys.c.organization_id == organization_id, keys.c.deleted_at.is_(None)
    # In the order in which uses are recorded, so that the two cannot deadlock.
    locked = select(keys.c.id).where(*live).order_by(keys.c.id).with_for_update().subquery()
    connection.execute(select(func.count()).select_from(locked))
    newer = case((keys.c.updated_at < now_ms, now_ms), else_=keys.c.updated_at + 1)
    count = connection.execute(
        update(keys)
        .where(*live)
        .values(active=False, deleted_at=now_ms, updated_at=newer, revoked_reason=reason)
    ).rowcount
    told = {"count": count} | ({} if reason is None else {"reason": reason})
    write_down(connection, now_ms, by, "organization.revoke", organization_id, None, told)
    return count, advance(connection, now_ms, organization_id=organization_id)


def _changed(
    connection: Connection,
    record: KeyRecord,
    now_ms: int,
    values: dict[str, Any],
    by: str,
    action: str,
    told: dict[str, Any],
) -> tuple[KeyRecord, int]:
    updated_at = max(now_ms, record.updated_at + 1)
    connection.execute(
        update(keys).where(keys.c.id == record.id).values(**values, updated_at=updated_at)
    )
    write_down(connection, now_ms, by, action, record.organization_id, record.id, told)
    shown = {name: value for name, value in values.items() if name in KeyRecord.__slots__}
    changed = replace(record, **shown, updated_at=updated_at)
    return changed, advance(connection, now_ms, key_id=record.id)
