"""Rotation of a key's secret: a new secret beside the previous one, and the end of either.

The law of this file is that of `key_changes`.
"""

from typing import Any, Final

from sqlalchemy import Connection

from keylatch.core.decisions import KeyRecord, secret_version_of
from keylatch.errors import InvalidKeyState
from keylatch.storage.authorization import OPERATOR, Actor, StoredKey, authorize, visible_key
from keylatch.storage.invalidation_log import Revokes, advance, sequence
from keylatch.storage.key_changes import (
    apply_change,
    check_limits,
    deletion_details,
    deletion_values,
    updated_after,
)
from keylatch.storage.records import SELECT_RECORDS, record_of
from keylatch.storage.repository import Repository, changes, lock_sequence
from keylatch.storage.schema import keys

_CLEAR_PREVIOUS: Final = {
    "previous_hash": None,
    "previous_partial_token": None,
    "previous_expires_at": None,
    "previous_last_used": None,
    "previous_rotated_at": None,
}


class RotationRepository(Repository):
    """The secrets of a store's keys.

    Every operation returns the key and the sequence number, or None: no such key.
    """

    @changes("key_id")
    def rotate(
        self,
        connection: Connection,
        organization_id: str,
        key_id: str,
        now_ms: int,
        hashed: str,
        partial_token: str,
        ends_at: int | None,
        *,
        by: Actor = OPERATOR,
    ) -> tuple[KeyRecord, int] | None:
        """Give a key another hash. The previous one is accepted until `ends_at` (milliseconds since
        the epoch) or the key's own expiry; None: it ends now.

        Raises:
            InvalidKeyState: the key was deleted.
        """
        committed = _find_rotated(connection, key_id, hashed)
        if committed is not None:  # by an earlier attempt whose answer was lost
            lock_sequence(connection)
            return committed, sequence(connection)
        found = visible_key(connection, by, organization_id, key_id)
        if found is None:
            return None
        ends_a_secret = ends_at is None or found.record.grace_ends_at(now_ms) is not None
        revokes: Revokes | None = "disable" if ends_a_secret else None
        seq = advance(connection, now_ms, key_id=key_id, revokes=revokes)
        authority, record = authorize(connection, by), _require_not_deleted(found)
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

    @changes("key_id")
    def end_grace(
        self,
        connection: Connection,
        organization_id: str,
        key_id: str,
        now_ms: int,
        restore_previous: bool,
        *,
        by: Actor = OPERATOR,
    ) -> tuple[KeyRecord, int] | None:
        """During the grace of a rotation: keep the previous secret only, or the new one.

        Raises:
            InvalidKeyState: the key was deleted, or has one secret.
        """
        found = visible_key(connection, by, organization_id, key_id)
        if found is None:
            return None
        seq = advance(connection, now_ms, key_id=key_id, revokes="disable")
        authority, record = authorize(connection, by), _require_not_deleted(found)
        authority.check(organization_id, record.permission, record.environment)
        if found.previous_hash is None or record.grace_ends_at(now_ms) is None:
            raise InvalidKeyState("No rotation of the API key is under way")
        values = dict[str, Any](_CLEAR_PREVIOUS)
        if restore_previous:
            authority.check_grant(record)  # the secret that was about to end becomes permanent
            values |= {
                "hash": found.previous_hash,
                "partial_token": record.previous_partial_token,
                "rotated_at": record.previous_rotated_at,
            }
        action = "key.rotate.cancel" if restore_previous else "key.rotate.finish"
        return apply_change(connection, record, now_ms, values, by, action, {}), seq

    @changes("key_id")
    def revoke_secret(
        self,
        connection: Connection,
        organization_id: str,
        key_id: str,
        secret: int,
        now_ms: int,
        reason: str | None,
        *,
        by: Actor = OPERATOR,
    ) -> tuple[KeyRecord, int] | None:
        """End one of a key's secrets (`secret_version_of`): with the current secret the key is
        deleted; the previous secret ends alone. A key may revoke the secret by which it acts.

        Raises:
            InvalidKeyState: the secret is not one of the key's any more, or the key was deleted.
        """
        found = visible_key(connection, by, organization_id, key_id)
        if found is None:
            return None
        is_current = secret == secret_version_of(found.record)
        revokes: Revokes = "delete" if is_current else "disable"
        seq = advance(connection, now_ms, key_id=key_id, revokes=revokes)
        authorize(connection, by, is_self_revocation=by.key_id == key_id)
        record = _require_not_deleted(found)
        if is_current:
            values, details = deletion_values(now_ms, reason), deletion_details(reason)
            return apply_change(connection, record, now_ms, values, by, "key.delete", details), seq
        if found.previous_hash is None or secret != secret_version_of(record, is_previous=True):
            raise InvalidKeyState(
                "The API key was rotated: this is not one of its secrets any more"
            )
        action = "key.rotate.finish"
        return apply_change(connection, record, now_ms, _CLEAR_PREVIOUS, by, action, {}), seq


def _require_not_deleted(found: StoredKey) -> KeyRecord:
    if found.record.deleted_at is not None:
        raise InvalidKeyState("The API key was deleted; that is final")
    return found.record


def _rotated_at(record: KeyRecord, now_ms: int) -> int:
    """The time of a rotation, which is its secret's version (`secret_version_of`), later than every
    change before it: a key never has it twice."""
    is_unchanged = record.updated_at == record.created_at
    return now_ms if is_unchanged else updated_after(record, now_ms)


def _find_rotated(connection: Connection, key_id: str, hashed: str) -> KeyRecord | None:
    is_same = keys.c.id == key_id, keys.c.hash == hashed
    row = connection.execute(SELECT_RECORDS.where(*is_same)).first()
    return None if row is None else record_of(row)
