"""What the changes of keys share, as functions of a connection.

The law of this file: a change of what a key may do is ONE transaction that advances `meta.seq`,
makes the change and writes the invalidation. Recording a use is no such change. The acting key is
authorized once the transaction holds the sequence row: see `authorization`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from sqlalchemy import Connection, case, insert, select, update

from keylatch.core.decisions import FULL, KeyRecord
from keylatch.storage.audit import digest_of, record_event, record_events
from keylatch.storage.authorization import Actor, Authority, authorize
from keylatch.storage.invalidation_log import Revokes, advance
from keylatch.storage.quotas import check_quota
from keylatch.storage.records import SELECT_RECORDS, record_of
from keylatch.storage.repository import batches, lock_sequence
from keylatch.storage.schema import keys, organizations

GRANT_COLUMNS: Final = ("permission", "expires_at")
_JSON_NAMES: Final = {"expires_at": "expiresAt"}
_RESTRICTABLE_COLUMNS: Final = frozenset(("active", "permission"))
_STORED: Final = tuple(name for name in KeyRecord.__slots__ if name in keys.c)


def insert_keys(
    connection: Connection,
    new_keys: Sequence[tuple[KeyRecord, str]],
    by: Actor,
    action: str,
    key_id: str | None = None,
    organization_id: str | None = None,
) -> tuple[list[KeyRecord], int]:
    """Insert keys with their hashes, in this order; return them and the sequence number.

    Each key takes a sequence number of its own, which lists are ordered by; one invalidation, of
    `key_id` or `organization_id`, is for all of them.
    """
    last, hashed = new_keys[-1]
    committed = _find_inserted(connection, last, hashed)
    if committed is not None:  # by an earlier attempt whose answer was lost
        lock_sequence(connection)
        return [*(record for record, _ in new_keys[:-1]), committed[0]], committed[1]
    now_ms, count = last.created_at, len(new_keys)
    seq = advance(connection, now_ms, key_id, organization_id, steps=count)
    authority = authorize(connection, by)
    records = [_authorize_new_key(authority, record) for record, _ in new_keys]
    check_limits(connection, by, last.organization_id, now_ms, new_keys=count)
    _insert(connection, records, [hashed for _, hashed in new_keys], seq)
    targets = [
        (record.organization_id, record.id, _creation_details(record), record.environment)
        for record in records
    ]
    record_events(connection, now_ms, by.name, action, targets)
    return records, seq


def _find_inserted(
    connection: Connection, record: KeyRecord, hashed: str
) -> tuple[KeyRecord, int] | None:
    row = connection.execute(
        SELECT_RECORDS.add_columns(keys.c.created_seq).where(
            keys.c.id == record.id, keys.c.hash == hashed
        )
    ).first()
    return None if row is None else (record_of(row[:-1]), row[-1])


def _authorize_new_key(authority: Authority, record: KeyRecord) -> KeyRecord:
    bounded = authority.with_inherited_expiry(record)
    authority.check_grant(bounded)
    return bounded


def _insert(
    connection: Connection, records: Sequence[KeyRecord], hashes: Sequence[str], seq: int
) -> None:
    organization_ids = {record.organization_id for record in records}
    _add_organizations(connection, organization_ids, records[-1].created_at)
    created_seqs = range(seq - len(records) + 1, seq + 1)
    connection.execute(
        insert(keys),
        [
            {
                **{name: getattr(record, name) for name in _STORED},
                "hash": hashed,
                "created_seq": created_seq,
            }
            for created_seq, record, hashed in zip(created_seqs, records, hashes, strict=True)
        ],
    )


def _add_organizations(connection: Connection, organization_ids: set[str], now_ms: int) -> None:
    for batch in batches(sorted(organization_ids)):
        statement = select(organizations.c.id).where(organizations.c.id.in_(batch))
        missing = set(batch).difference(connection.execute(statement).scalars())
        if missing:
            connection.execute(
                insert(organizations),
                [{"id": name, "active": True, "created_at": now_ms} for name in sorted(missing)],
            )


def _creation_details(record: KeyRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "permission": record.permission,
        "environment": record.environment,
        "expiresAt": record.expires_at,
    }


def check_limits(
    connection: Connection, by: Actor, organization_id: str, now_ms: int, new_keys: int = 0
) -> None:
    """Raises `QuotaExceeded` if the quotas of the acting key's organisation do not allow one more
    change. The transaction holds the sequence row, so every change that commits before it is
    counted."""
    if by.quotas is not None:
        check_quota(connection, organization_id, now_ms, by.quotas, new_keys=new_keys)


def is_restriction(record: KeyRecord, values: Mapping[str, Any]) -> bool:
    """Whether a change only takes access away: a quota must not prevent it."""
    is_narrower = record.permission == FULL and values.get("permission", FULL) != FULL
    is_disabled = record.active and values.get("active") is False
    return (
        values.keys() <= _RESTRICTABLE_COLUMNS
        and values.get("active") is not True
        and (is_narrower or is_disabled)
    )


def what_is_revoked(record: KeyRecord, values: Mapping[str, Any]) -> Revokes | None:
    """What a change of columns takes away, for the invalidation log."""
    if values.get("deleted_at") is not None:
        return "delete"
    expires_at = values.get("expires_at")
    ends_earlier = expires_at is not None and expires_at < (record.expires_at or expires_at + 1)
    # Any other permission than FULL may lack something that the key could do.
    may_do_less = values.get("permission", FULL) not in (FULL, record.permission)
    return "disable" if values.get("active") is False or may_do_less or ends_earlier else None


def apply_change(
    connection: Connection,
    record: KeyRecord,
    now_ms: int,
    values: Mapping[str, Any],
    by: Actor,
    action: str,
    details: Mapping[str, Any],
) -> KeyRecord:
    """Change columns of a locked key and write the audit event; return the changed key."""
    updated_at = updated_after(record, now_ms)
    change = update(keys).where(keys.c.id == record.id).values(**values, updated_at=updated_at)
    place = record.organization_id, record.id, details, record.environment
    record_event(connection, now_ms, by.name, action, *place, change=change)
    changed = {name: value for name, value in values.items() if name in KeyRecord.__slots__}
    return replace(record, **changed, updated_at=updated_at)


def updated_after(record: KeyRecord, now_ms: int) -> int:
    """The time of a change, later than that of the change before it."""
    return max(now_ms, record.updated_at + 1)


def next_updated_at(now_ms: int) -> Any:
    """`updated_after` as SQL, for several keys at once."""
    return case((keys.c.updated_at < now_ms, now_ms), else_=keys.c.updated_at + 1)


def deletion_values(now_ms: int, reason: str | None) -> dict[str, Any]:
    """The columns of a deleted key."""
    return {"active": False, "deleted_at": now_ms, "revoked_reason": reason}


def change_details(values: Mapping[str, Any]) -> dict[str, Any]:
    """The details of a change in the audit log, in the words of the HTTP API."""
    if "deleted_at" in values:
        return deletion_details(values.get("revoked_reason"))
    details = {_JSON_NAMES.get(name, name): value for name, value in values.items()}
    if details.get("metadata") is not None:
        details["metadata"] = digest_of(details["metadata"])
    return details


def deletion_details(reason: str | None) -> dict[str, Any]:
    """The details of a deletion in the audit log."""
    return {} if reason is None else {"reason": reason}
