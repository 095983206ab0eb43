"""Every change of keys and organisations, as a plain function of a connection.

The law of this file: whatever changes what a key may do is ONE transaction that advances
`meta.seq`, makes the change and writes the invalidation. Recording a use is no such change.
It judges the key that asks for it once it holds the counter row: see `authorization`.
"""

import secrets as csprng
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Connection,
    bindparam,
    insert,
    or_,
    select,
    update,
)

from keylatch.core.decisions import FULL, PREVIOUS_SUFFIX, KeyRecord
from keylatch.core.validation import LIVE
from keylatch.storage.audit import digest_of, record_event, record_events
from keylatch.storage.authorization import (
    OPERATOR,
    Actor,
    Authority,
    authorize,
    in_byte_order,
    stored_key,
)
from keylatch.storage.listing import keys_by_locator
from keylatch.storage.queries import SELECT_RECORDS, record_of, sequence
from keylatch.storage.quotas import check_quota
from keylatch.storage.schema import NO_ID, audit, invalidations, keys, meta, organizations

_MAX_INVALIDATIONS: Final = 100_000
_MAX_PARAMETERS: Final = 500  # parameters of one statement
_JSON_NAMES: Final = {"expires_at": "expiresAt"}
_GRANT_COLUMNS: Final = ("permission", "expires_at")
_RESTRICTABLE_COLUMNS: Final = frozenset(("active", "permission"))
_STORED: Final = tuple(name for name in KeyRecord.__slots__ if name in keys.c)


def advance(
    connection: Connection,
    now_ms: int,
    key_id: str | None = None,
    organization_id: str | None = None,
    steps: int = 1,
) -> int:
    seq = _advance(connection, steps)
    connection.execute(
        insert(invalidations).values(
            seq=seq, key_id=key_id, organization_id=organization_id, at=now_ms
        )
    )
    return seq


def is_committed(connection: Connection, seq: int, now_ms: int, invalidated_id: str | None) -> bool:
    """Whether a change was committed although its answer was lost: by its entry in the log.

    Args:
        connection: of the transaction that would repeat it.
        seq: the number that it had got.
        now_ms: the time that it wrote.
        invalidated_id: the key or organisation that it named; None: several.
    """
    row = connection.execute(select(invalidations).where(invalidations.c.seq == seq)).first()
    if row is None or row.at != now_ms:
        return False
    return invalidated_id in (None, row.key_id, row.organization_id)


def lock_sequence(connection: Connection) -> None:
    """Keep all other changes from committing until this transaction ends."""
    _advance(connection, 0)


def advance_for_each(connection: Connection, now_ms: int, key_ids: Sequence[str]) -> int:
    """A sequence number for each of several keys; the last of them."""
    seq = _advance(connection, len(key_ids))
    connection.execute(
        insert(invalidations),
        [
            {"seq": number, "key_id": key_id, "organization_id": None, "at": now_ms}
            for number, key_id in enumerate(key_ids, seq - len(key_ids) + 1)
        ],
    )
    return seq


def _advance(connection: Connection, steps: int) -> int:
    seq: int = connection.execute(
        update(meta).values(seq=meta.c.seq + steps).returning(meta.c.seq)
    ).scalar_one()
    return seq


def add_key(
    connection: Connection, record: KeyRecord, hashed: str, by: Actor = OPERATOR
) -> tuple[KeyRecord, int]:
    """Insert a key; it and the sequence number. It ends no later than the key that creates it."""
    # A new key is announced too: somebody may remember that there is no such key.
    [added], seq = _add(connection, [(record, hashed)], by, "key.create", key_id=record.id)
    return added, seq


def add_keys(
    connection: Connection, new_keys: Sequence[tuple[KeyRecord, str]], by: Actor = OPERATOR
) -> tuple[list[KeyRecord], int]:
    """Insert many keys with their hashes, in this order; each takes a sequence number of its own,
    so that lists know it, and one invalidation tells of all of them."""
    return _add(connection, new_keys, by, "key.import", organization_id=NO_ID)


def import_keys(
    connection: Connection, new_keys: Sequence[tuple[KeyRecord, str]], by: Actor = OPERATOR
) -> tuple[int, dict[str, tuple[str, bool]]]:
    """Insert keys that were made elsewhere, but for those whose locator is here already; these are
    told: locator → (id of its key, whether that is deleted)."""
    existing = keys_by_locator(connection, [str(record.locator) for record, _ in new_keys])
    missing = [each for each in new_keys if each[0].locator not in existing]
    seq = add_keys(connection, missing, by)[1] if missing else sequence(connection)
    return seq, existing


def _add(
    connection: Connection,
    new_keys: Sequence[tuple[KeyRecord, str]],
    by: Actor,
    action: str,
    key_id: str | None = None,
    organization_id: str | None = None,
) -> tuple[list[KeyRecord], int]:
    last, hashed = new_keys[-1]
    committed = _find_added(connection, last, hashed)
    if committed is not None:  # repeated after its answer was lost, it finds its own work done
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


def _insert(
    connection: Connection, records: Sequence[KeyRecord], hashes: Sequence[str], seq: int
) -> None:
    _add_organizations(
        connection, {record.organization_id for record in records}, records[-1].created_at
    )
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


def _find_added(
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


def _creation_details(record: KeyRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "permission": record.permission,
        "environment": record.environment,
        "expiresAt": record.expires_at,
    }


def _add_organizations(connection: Connection, organization_ids: set[str], now_ms: int) -> None:
    names = sorted(organization_ids)
    for start in range(0, len(names), _MAX_PARAMETERS):
        batch = names[start : start + _MAX_PARAMETERS]
        statement = select(organizations.c.id).where(organizations.c.id.in_(batch))
        missing = set(batch).difference(connection.execute(statement).scalars())
        if missing:
            connection.execute(
                insert(organizations),
                [{"id": name, "active": True, "created_at": now_ms} for name in sorted(missing)],
            )


def change_key(
    connection: Connection,
    organization_id: str,
    key_id: str,
    now_ms: int,
    values: Mapping[str, Any],
    by: Actor = OPERATOR,
) -> tuple[KeyRecord, int] | None:
    for lock in (False, True):  # what is not there, or changes nothing, waits for no lock
        found = stored_key(connection, organization_id, key_id, lock=lock)
        if found is None or not by.can_see(found.record):
            authorize(connection, by)
            return None
        record = found.record
        is_unchanged = all(getattr(record, name) == value for name, value in values.items())
        if record.deleted_at is not None or is_unchanged:
            authorize(connection, by)
            return record, sequence(connection)
    seq = advance(connection, now_ms, key_id=key_id)
    authority = authorize(connection, by)
    authority.check(organization_id, record.permission, record.environment)
    if values.get("deleted_at") is not None:
        return apply_change(
            connection, record, now_ms, values, by, "key.delete", _change_details(values)
        ), seq
    if values.get("active") or any(name in values for name in _GRANT_COLUMNS):
        authority.check_grant(replace(record, **values))
    if not _is_restriction(record, values):
        check_limits(connection, by, organization_id, now_ms)
    return apply_change(
        connection, record, now_ms, values, by, "key.change", _change_details(values)
    ), seq


def _is_restriction(record: KeyRecord, values: Mapping[str, Any]) -> bool:
    """Whether a change takes access away and does nothing else: a quota must not keep it back."""
    is_narrower = record.permission == FULL and values.get("permission", FULL) != FULL
    is_disabled = record.active and values.get("active") is False
    return (
        values.keys() <= _RESTRICTABLE_COLUMNS
        and values.get("active") is not True
        and (is_narrower or is_disabled)
    )


def check_limits(
    connection: Connection, by: Actor, organization_id: str, now_ms: int, new_keys: int = 0
) -> None:
    """Whether the limits of the acting key's organisation allow one more change. Exact, because the
    counter row is held: what other changes have added is committed and counted.

    Raises:
        QuotaExceeded: they do not.
    """
    if by.quotas is not None:
        check_quota(connection, organization_id, now_ms, by.quotas, new_keys=new_keys)


def apply_change(
    connection: Connection,
    record: KeyRecord,
    now_ms: int,
    values: Mapping[str, Any],
    by: Actor,
    action: str,
    details: Mapping[str, Any],
) -> KeyRecord:
    """Change columns of a locked key and audit it; the key after that."""
    updated_at = updated_after(record, now_ms)
    connection.execute(
        update(keys).where(keys.c.id == record.id).values(**values, updated_at=updated_at)
    )
    place = record.organization_id, record.id
    record_event(connection, now_ms, by.name, action, *place, details, record.environment)
    changed = {name: value for name, value in values.items() if name in KeyRecord.__slots__}
    return replace(record, **changed, updated_at=updated_at)


def updated_after(record: KeyRecord, now_ms: int) -> int:
    """The time of a change, later than that of the change before it."""
    return max(now_ms, record.updated_at + 1)


def _change_details(values: Mapping[str, Any]) -> dict[str, Any]:
    """A change as the audit log has it, in the words of the HTTP API."""
    if "deleted_at" in values:
        return deletion_details(values.get("revoked_reason"))
    details = {_JSON_NAMES.get(name, name): value for name, value in values.items()}
    if details.get("metadata") is not None:
        details["metadata"] = digest_of(details["metadata"])
    return details


def deletion_details(reason: str | None) -> dict[str, Any]:
    """A deletion as the audit log has it."""
    return {} if reason is None else {"reason": reason}


def set_organization_active(
    connection: Connection, organization_id: str, now_ms: int, active: bool, by: Actor = OPERATOR
) -> int | None:
    matches_id = organizations.c.id == organization_id
    if connection.execute(select(organizations.c.id).where(matches_id)).first() is None:
        return None
    seq = advance(connection, now_ms, organization_id=organization_id)
    authorize(connection, by).check(organization_id, FULL, LIVE)
    connection.execute(update(organizations).where(matches_id).values(active=active))
    action = "organization.enable" if active else "organization.disable"
    record_event(connection, now_ms, by.name, action, organization_id)
    return seq


def start_new_epoch(connection: Connection, epoch: str, seq: int) -> None:
    row = connection.execute(select(meta.c.seq, meta.c.epoch)).one()
    if row.epoch != epoch and row.seq >= seq:
        return  # another process was faster, and the store is as far as this one knows
    connection.execute(update(meta).values(seq=max(row.seq, seq), epoch=csprng.token_hex(8)))
    advance(connection, now_ms())  # it names nobody, so it concerns everybody


def now_ms() -> int:
    return int(time.time() * 1000)


def prune_invalidations(connection: Connection) -> None:
    seq = sequence(connection)
    oldest = seq - _MAX_INVALIDATIONS
    if oldest <= 0:
        return
    connection.execute(update(meta).values(pruned_seq=oldest))
    connection.execute(invalidations.delete().where(invalidations.c.seq <= oldest))


def analyze(connection: Connection) -> None:
    """Let PostgreSQL count its rows, which it does by itself only minutes after many were added.
    SQLite takes the indexes without."""
    if connection.dialect.name == "postgresql":
        for table in (keys, organizations, invalidations, audit):
            connection.exec_driver_sql(f"ANALYZE {table.name}")


_USED_AT: Final = bindparam("used_at", type_=BigInteger)
RECORD_LAST_USED: Final = (
    update(keys)
    .where(
        keys.c.id == bindparam("used_id"),
        or_(keys.c.last_used.is_(None), keys.c.last_used < _USED_AT),
        or_(keys.c.deleted_at.is_(None), keys.c.deleted_at >= _USED_AT),
    )
    .values(last_used=_USED_AT)
)


RECORD_PREVIOUS_LAST_USED: Final = (
    update(keys)
    .where(
        keys.c.id == bindparam("used_id"),
        keys.c.previous_hash.is_not(None),
        or_(keys.c.previous_last_used.is_(None), keys.c.previous_last_used < _USED_AT),
    )
    .values(previous_last_used=_USED_AT)
)


def record_last_used(connection: Connection, last_used: Mapping[str, int]) -> None:
    """Record uses, in the order of ids, so that two processes cannot deadlock."""
    newest: dict[str, int] = {}
    for secret, used_at in last_used.items():
        key_id = secret.removesuffix(PREVIOUS_SUFFIX)
        newest[key_id] = max(newest.get(key_id, 0), used_at)
    rows = [{"used_id": key_id, "used_at": newest[key_id]} for key_id in sorted(newest)]
    previous = sorted(secret for secret in last_used if secret.endswith(PREVIOUS_SUFFIX))
    if previous:  # both statements go through the keys from the smallest id
        _lock_in_order(connection, sorted(newest))
    connection.execute(RECORD_LAST_USED, rows)
    if previous:
        rows = [
            {"used_id": secret.removesuffix(PREVIOUS_SUFFIX), "used_at": last_used[secret]}
            for secret in previous
        ]
        connection.execute(RECORD_PREVIOUS_LAST_USED, rows)


def _lock_in_order(connection: Connection, key_ids: Sequence[str]) -> None:
    for start in range(0, len(key_ids), _MAX_PARAMETERS):
        matches_batch = keys.c.id.in_(key_ids[start : start + _MAX_PARAMETERS])
        ordered = (
            select(keys.c.id).where(matches_batch).order_by(in_byte_order(connection, keys.c.id))
        )
        connection.execute(ordered.with_for_update(key_share=True)).all()


def replace_hash(connection: Connection, key_id: str, old: str, new: str) -> None:
    """Exchange a hash, if it is still the old one."""
    connection.execute(update(keys).where(keys.c.id == key_id, keys.c.hash == old).values(hash=new))
