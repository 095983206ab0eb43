"""Authorizes the acting key again, in the transaction of the change that it requests.

A management request is authenticated when its headers arrive. Reading its body, computing a hash
and waiting for locks come after that, and the key may be revoked, demoted or rotated meanwhile. So
each change authorizes the acting key by its row, and is made only if the key still may make it.

It does so once the transaction holds the sequence row (`invalidation_log.advance`), which every
change locks before it commits. A change that revokes the acting key either was committed before
that, and is seen, or is committed later and has a later sequence number. The acting key's row
itself is not locked: shared locks do not queue, and a key whose requests overlap could delay its
own revocation for as long as it likes (measured: with 12 clients the DELETE gave up after five
seconds, twice).

The law of this file is one order of locks, so that two changes never deadlock: the keys to be
changed, by their ids (the order in which uses are recorded), then the sequence row. A change that
holds the sequence row waits for no other lock. SQLite takes one lock for all (`BEGIN IMMEDIATE`).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, and_, true

from keylatch.core.decisions import (
    FULL,
    KeyRecord,
    Principal,
    Reason,
    secret_version_of,
    unusable_reason,
)
from keylatch.core.validation import LIVE, check_may_grant, check_may_grant_until
from keylatch.errors import CallerRefused, NotPermitted
from keylatch.storage.database import Contended
from keylatch.storage.quotas import Quotas
from keylatch.storage.records import SELECT_RECORDS, record_of
from keylatch.storage.repository import batches
from keylatch.storage.schema import keys

_STORED_KEYS: Final = SELECT_RECORDS.add_columns(keys.c.hash, keys.c.previous_hash)


def _no_clock() -> int:
    raise TypeError("an actor with a principal needs a clock")


@dataclass(frozen=True, slots=True)
class Actor:
    """The caller of a change.

    Args:
        name: for the audit log: a key's id, `cli:` and an account, or `operator`.
        principal: the key, with the secret by which it was authenticated; None: an operator, who
            may make every change.
        now_ms: the time for the key's expiry, in milliseconds since the epoch; called in the
            transaction, after it has waited for locks.
        quotas: what the key's organisation may add; None: no limits.
    """

    name: str
    principal: Principal | None = None
    now_ms: Callable[[], int] = _no_clock
    quotas: Quotas | None = None

    @property
    def key_id(self) -> str | None:
        """The acting key; None: an operator."""
        return None if self.principal is None else self.principal.key_id

    def can_see(self) -> ColumnElement[bool]:
        """Whether a key is of its organisation and in an environment that it has access to
        (`has_access_to_environment`)."""
        if self.principal is None:
            return true()
        is_of_organization = keys.c.organization_id == self.principal.organization_id
        if self.principal.environment == LIVE:
            return is_of_organization
        return and_(is_of_organization, keys.c.environment == self.principal.environment)


OPERATOR: Final = Actor("operator")


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key with its hashes."""

    record: KeyRecord
    hash: str = field(repr=False)
    previous_hash: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Authority:
    """What the acting key may do, by its row in this transaction.

    Args:
        record: the acting key; None: an operator, who may do everything.
        is_previous: whether it was authenticated by the secret before its last rotation.
    """

    record: KeyRecord | None = None
    is_previous: bool = False

    def check(self, organization_id: str, permission: str, environment: str) -> None:
        """Raises `NotPermitted` unless it has these rights itself."""
        if self.record is not None:
            if organization_id != self.record.organization_id:
                raise NotPermitted("a key manages the keys of its own organisation only")
            check_may_grant(self.record, permission, environment)

    def check_grant(self, record: KeyRecord) -> None:
        """Raises `NotPermitted` if a key would have more rights than the acting key, or have them
        for longer."""
        self.check(record.organization_id, record.permission, record.environment)
        if self.record is not None:
            check_may_grant_until(self.record, record.expires_at)

    def with_inherited_expiry(self, record: KeyRecord) -> KeyRecord:
        """A new key; one without an expiry gets that of the acting key."""
        if self.record is None or record.expires_at is not None:
            return record
        return replace(record, expires_at=self.record.expires_at)


def authorize(
    connection: Connection, actor: Actor, *, is_self_revocation: bool = False
) -> Authority:
    """What an actor may do, by its key's row as it is now. The sequence row must be locked.

    Args:
        connection: of the transaction.
        actor: the caller.
        is_self_revocation: whether the acting secret only ends itself, which every key may do.

    Raises:
        CallerRefused: the acting key, or its secret, is not valid any more.
        NotPermitted: it may not make this change.
    """
    principal = actor.principal
    if principal is None:
        return Authority()
    acting = stored_key(connection, principal.organization_id, principal.key_id)
    return reauthorize(principal, acting, actor.now_ms(), is_self_revocation=is_self_revocation)


def stored_key(connection: Connection, organization_id: str, key_id: str) -> StoredKey | None:
    """A key of an organisation."""
    statement = _STORED_KEYS.where(keys.c.id == key_id, keys.c.organization_id == organization_id)
    row = connection.execute(statement).first()
    return None if row is None else _stored_key(row)


def visible_key(
    connection: Connection, actor: Actor, organization_id: str, key_id: str, *, lock: bool = True
) -> StoredKey | None:
    """A key of an organisation that the actor can see; None: there is none.

    Args:
        connection: of the transaction.
        actor: the caller.
        organization_id: of the key.
        key_id: of the key.
        lock: no other transaction changes it until this one ends. What the actor cannot see is not
            locked: it must not delay those who can.

    Raises:
        CallerRefused, NotPermitted: as `authorize`, where there is none.
    """
    statement = _STORED_KEYS.where(
        keys.c.id == key_id, keys.c.organization_id == organization_id, actor.can_see()
    )
    if lock:
        statement = statement.with_for_update(of=keys)
    row = connection.execute(statement).first()
    if row is None:
        authorize(connection, actor)
        return None
    return _stored_key(row)


def lock_keys(
    connection: Connection, organization_id: str, key_ids: Collection[str], *, wait: bool = True
) -> Mapping[str, StoredKey]:
    """The organisation's keys among these, locked in the order of their ids.

    Raises:
        Contended: another transaction holds one of them, and `wait` is False.
    """
    found: dict[str, StoredKey] = {}
    for batch in batches(sorted(key_ids)):
        statement = _STORED_KEYS.where(
            keys.c.id.in_(batch), keys.c.organization_id == organization_id
        )
        rows = connection.execute(
            statement.order_by(in_byte_order(connection, keys.c.id)).with_for_update(
                of=keys, skip_locked=not wait
            )
        ).all()
        if not wait and len(rows) < len(batch):
            raise Contended("another transaction holds one of the keys")
        found |= {row[0]: _stored_key(row) for row in rows}
    return found


def in_byte_order(connection: Connection, column: Any) -> Any:
    """A column of ids in the order of their bytes, which is that of `sorted`; the database may have
    been created with the collation of a language."""
    return column.collate("C") if connection.dialect.name == "postgresql" else column


def reauthorize(
    principal: Principal, acting: StoredKey | None, now_ms: int, *, is_self_revocation: bool = False
) -> Authority:
    """What a principal may do now; see `authorize`.

    Args:
        principal: the key, with the secret by which it was authenticated.
        acting: the key's row now; None: it has none.
        now_ms: the time for its expiry.
        is_self_revocation: as in `authorize`.
    """
    if principal.secret_version is None:
        raise NotPermitted("only a caller that presented the key itself can manage keys")
    if acting is None:
        raise CallerRefused(Reason.UNKNOWN)
    reason = unusable_reason(acting.record, now_ms, None)
    if reason is not None:
        raise CallerRefused(reason)
    authority = Authority(acting.record, _is_previous(principal.secret_version, acting, now_ms))
    if not is_self_revocation:
        _check_may_change(principal, authority)
    return authority


def _stored_key(row: Any) -> StoredKey:
    return StoredKey(record_of(row[:-2]), row[-2], row[-1])


def _is_previous(secret: int, acting: StoredKey, now_ms: int) -> bool:
    if secret == secret_version_of(acting.record):
        return False
    if (
        acting.previous_hash is None
        or secret != secret_version_of(acting.record, is_previous=True)
        or acting.record.grace_ends_at(now_ms) is None
    ):
        raise CallerRefused(Reason.WRONG_SECRET)
    return True


def _check_may_change(principal: Principal, authority: Authority) -> None:
    if authority.is_previous:
        raise NotPermitted("the secret before a rotation can end itself and change nothing else")
    record = authority.record
    if record is not None and record.permission not in (FULL, principal.permission):
        raise NotPermitted("the key has fewer rights than when the call began")
