"""Changes of more than one column by rule: a new secret beside the old one, and the end of many
keys at once. The law of `changes` holds here too.
"""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Select, case, func, literal, select, update

from keylatch.core.decisions import FULL, KeyRecord, secret_version_of
from keylatch.core.validation import LIVE
from keylatch.errors import InvalidKeyState
from keylatch.storage.audit import record_event, record_events
from keylatch.storage.authorization import (
    Actor,
    StoredKey,
    authorize,
    in_byte_order,
    lock_keys,
    stored_key,
)
from keylatch.storage.changes import (
    advance,
    advance_for_each,
    apply_change,
    check_limits,
    deletion_details,
    lock_sequence,
    updated_after,
)
from keylatch.storage.database import Contended
from keylatch.storage.queries import SELECT_RECORDS, record_of, sequence
from keylatch.storage.schema import keys

_CLEAR_PREVIOUS: Final = {
    "previous_hash": None,
    "previous_partial_token": None,
    "previous_expires_at": None,
    "previous_last_used": None,
    "previous_rotated_at": None,
}
_MAX_PARAMETERS: Final = 500  # parameters of one statement


def rotate_key(
    connection: Connection,
    organization_id: str,
    key_id: str,
    now_ms: int,
    hashed: str,
    partial_token: str,
    ends_at: int | None,
    by: Actor,
) -> tuple[KeyRecord, int] | None:
    """Give a key another hash; the present one stays good until `ends_at` or the key's own end."""
    committed = _find_rotated(connection, key_id, hashed)
    if committed is not None:  # repeated after its answer was lost
        return committed, sequence(connection)
    found = _lock_visible_key(connection, by, organization_id, key_id)
    if found is None:
        return None
    seq = advance(connection, now_ms, key_id=key_id)
    authority = authorize(connection, by)
    record = _require_not_deleted(found)
    authority.check_grant(record)
    check_limits(connection, by, organization_id, now_ms)
    values: dict[str, Any] = {
        "hash": hashed,
        "partial_token": partial_token,
        "rotated_at": _rotated_at(record, now_ms),
        **_CLEAR_PREVIOUS,
    }
    if ends_at is not None:
        values |= {
            "previous_hash": found.hash,
            "previous_partial_token": record.partial_token,
            "previous_expires_at": min(ends_at, record.expires_at or ends_at),
            "previous_last_used": record.last_used,
            "previous_rotated_at": record.rotated_at,
        }
    details = {"graceEndsAt": values["previous_expires_at"]}
    return apply_change(connection, record, now_ms, values, by, "key.rotate", details), seq


def end_grace(
    connection: Connection,
    organization_id: str,
    key_id: str,
    now_ms: int,
    restore_previous: bool,
    by: Actor,
) -> tuple[KeyRecord, int] | None:
    """While two secrets of a key are good: keep the previous one only (`goes_back`), or end it."""
    found = _lock_visible_key(connection, by, organization_id, key_id)
    if found is None:
        return None
    seq = advance(connection, now_ms, key_id=key_id)
    authority = authorize(connection, by)
    record = _require_not_deleted(found)
    authority.check(organization_id, record.permission, record.environment)
    if found.previous_hash is None or record.grace_ends_at(now_ms) is None:
        raise InvalidKeyState("No rotation of the API key is under way")
    values = dict[str, Any](_CLEAR_PREVIOUS)
    if restore_previous:
        authority.check_grant(record)  # what was about to end is good again
        values |= {
            "hash": found.previous_hash,
            "partial_token": record.previous_partial_token,
            "rotated_at": record.previous_rotated_at,
        }
    action = "key.rotate.cancel" if restore_previous else "key.rotate.finish"
    return apply_change(connection, record, now_ms, values, by, action, {}), seq


def revoke_secret(
    connection: Connection,
    organization_id: str,
    key_id: str,
    secret: int,
    now_ms: int,
    reason: str | None,
    by: Actor,
) -> tuple[KeyRecord, int] | None:
    """End one of a key's secrets (`secret_version_of`): the present one deletes the key, the one
    before the last rotation ends alone. A key may do that to the secret by which it acts."""
    found = _lock_visible_key(connection, by, organization_id, key_id)
    if found is None:
        return None
    seq = advance(connection, now_ms, key_id=key_id)
    authorize(connection, by, is_self_revocation=by.key_id == key_id)
    record = _require_not_deleted(found)
    if secret == secret_version_of(record):
        values, details = _deletion_values(now_ms, reason), deletion_details(reason)
        return apply_change(connection, record, now_ms, values, by, "key.delete", details), seq
    if found.previous_hash is None or secret != secret_version_of(record, is_previous=True):
        raise InvalidKeyState("The API key was rotated: this is not one of its secrets any more")
    return apply_change(
        connection, record, now_ms, _CLEAR_PREVIOUS, by, "key.rotate.finish", {}
    ), seq


def delete_with_descendants(
    connection: Connection,
    organization_id: str,
    key_id: str,
    now_ms: int,
    reason: str | None,
    by: Actor,
) -> tuple[KeyRecord, int, int] | None:
    """Delete a key, the keys that it created, those that they created, and so on.

    Returns:
        the key, how many were deleted, and the sequence number; None: there is no such key.
    """
    root = stored_key(connection, organization_id, key_id)
    if root is None or not by.can_see(root.record):
        authorize(connection, by)
        return None
    family = _descendants(connection, organization_id, key_id)
    found = dict(lock_keys(connection, organization_id, family))
    lock_sequence(connection)
    # Keys that it created meanwhile. From here on none of the family creates another one.
    more = _descendants(connection, organization_id, key_id) - found.keys()
    found |= lock_keys(connection, organization_id, more, wait=False)
    authority = authorize(connection, by)
    root = found[key_id]
    authority.check(organization_id, root.record.permission, root.record.environment)
    live = [found[each].record for each in sorted(found) if found[each].record.deleted_at is None]
    if not live:
        return root.record, 0, sequence(connection)
    _delete_all(connection, [each.id for each in live], now_ms, reason)
    details = deletion_details(reason)
    targets = [
        (organization_id, each.id, details | _creator_details(each, key_id), each.environment)
        for each in live
    ]
    record_events(connection, now_ms, by.name, "key.delete", targets)
    seq = advance_for_each(connection, now_ms, [each.id for each in live])
    return _load_record(connection, key_id), len(live), seq


def _creator_details(record: KeyRecord, root_id: str) -> dict[str, Any]:
    return {} if record.id == root_id else {"createdBy": record.created_by}


def revoke_all(
    connection: Connection, organization_id: str, now_ms: int, reason: str | None, by: Actor
) -> tuple[int, int]:
    """Delete every key of an organisation; their number, and one sequence number for all."""
    live = keys.c.organization_id == organization_id, keys.c.deleted_at.is_(None)
    in_order = select(keys.c.id).where(*live).order_by(in_byte_order(connection, keys.c.id))
    _count(connection, in_order.with_for_update())
    seq = advance(connection, now_ms, organization_id=organization_id)
    # Keys that were created meanwhile. From here on no key of the organisation creates another one.
    every = select(keys.c.id).where(*live)
    locked = _count(connection, every.with_for_update(skip_locked=True))
    if locked < _count(connection, every):
        raise Contended("another transaction holds one of the keys")
    authorize(connection, by).check(organization_id, FULL, LIVE)
    count = connection.execute(
        update(keys)
        .where(*live)
        .values(**_deletion_values(now_ms, reason), updated_at=_next_updated_at(now_ms))
    ).rowcount
    details = {"count": count} | deletion_details(reason)
    record_event(connection, now_ms, by.name, "organization.revoke", organization_id, None, details)
    return count, seq


def _count(connection: Connection, statement: Select[Any]) -> int:
    count: int = connection.execute(
        select(func.count()).select_from(statement.subquery())
    ).scalar_one()
    return count


def _lock_visible_key(
    connection: Connection, by: Actor, organization_id: str, key_id: str
) -> StoredKey | None:
    """A key that exists for the actor, locked."""
    found = stored_key(connection, organization_id, key_id)
    if found is None or not by.can_see(found.record):
        authorize(connection, by)
        return None
    return stored_key(connection, organization_id, key_id, lock=True)


def _deletion_values(now_ms: int, reason: str | None) -> dict[str, Any]:
    return {"active": False, "deleted_at": now_ms, "revoked_reason": reason}


def _next_updated_at(now_ms: int) -> Any:
    return case((keys.c.updated_at < now_ms, now_ms), else_=keys.c.updated_at + 1)


def _delete_all(
    connection: Connection, key_ids: Sequence[str], now_ms: int, reason: str | None
) -> None:
    for start in range(0, len(key_ids), _MAX_PARAMETERS):
        connection.execute(
            update(keys)
            .where(keys.c.id.in_(key_ids[start : start + _MAX_PARAMETERS]))
            .values(**_deletion_values(now_ms, reason), updated_at=_next_updated_at(now_ms))
        )


def _descendants(connection: Connection, organization_id: str, key_id: str) -> set[str]:
    """The ids of a key and of those that it created, directly and indirectly."""
    family = select(literal(key_id).label("id")).cte("family", recursive=True)
    created = select(keys.c.id).where(
        keys.c.created_by == family.c.id, keys.c.organization_id == organization_id
    )
    family = family.union(created)
    return set(connection.execute(select(family.c.id)).scalars())


def _rotated_at(record: KeyRecord, now_ms: int) -> int:
    """The time of a rotation, which is its secret's version (`secret_version_of`), never twice
    the same for a key: later than every change before it."""
    is_unchanged = record.updated_at == record.created_at
    return now_ms if is_unchanged else updated_after(record, now_ms)


def _find_rotated(connection: Connection, key_id: str, hashed: str) -> KeyRecord | None:
    row = connection.execute(
        SELECT_RECORDS.where(keys.c.id == key_id, keys.c.hash == hashed)
    ).first()
    return None if row is None else record_of(row)


def _load_record(connection: Connection, key_id: str) -> KeyRecord:
    return record_of(connection.execute(SELECT_RECORDS.where(keys.c.id == key_id)).one())


def _require_not_deleted(found: StoredKey) -> KeyRecord:
    if found.record.deleted_at is not None:
        raise InvalidKeyState("The API key was deleted; that is final")
    return found.record
