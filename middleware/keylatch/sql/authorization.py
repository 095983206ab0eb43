"""Judges the acting key again, in the transaction of the change that it asked for.

A management call is authenticated when its headers arrive. Reading its body, computing a hash and
waiting for locks come after that, and the key may be revoked, demoted or rotated meanwhile. So each
change begins here: it locks the acting key, judges it by what the row says now, and is written only
if the key may still make it. A revocation waits for the locks of the changes before it, and every
change after it finds the key revoked.

The law of this file is one order of locks, so that two changes never deadlock: the organisation,
then keys by their ids (the order in which uses are recorded), then the counter row
(`changes.advance`). SQLite takes one lock for all of it (`BEGIN IMMEDIATE`).
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from sqlalchemy import Connection, select

from keylatch.drafts import CallerRefused, NotPermitted, check_end, check_rights, reaches
from keylatch.model import FULL, KeyRecord, Principal, Reason, flaw, secret_of
from keylatch.sql.questions import RECORDS, record_of
from keylatch.sql.quotas import Quotas
from keylatch.sql.schema import keys, organizations

_MAX_NAMED: Final = 500  # parameters of one statement


def _now_ms() -> int:
    return int(time.time() * 1000)


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks for a change.

    Args:
        name: for the audit log: a key's id, `cli:` and an account, or `operator`.
        principal: the key, with the secret by which it was authenticated; None: an operator, who
            is not bound by any key.
        now_ms: the time to judge the key's expiry at, asked once its row is locked; milliseconds
            since the epoch.
        quotas: what the key's organisation may add; None: no limits.
    """

    name: str
    principal: Principal | None = None
    now_ms: Callable[[], int] = _now_ms
    quotas: Quotas | None = None

    @property
    def key_id(self) -> str | None:
        """The acting key; None: an operator."""
        return None if self.principal is None else self.principal.key_id


OPERATOR: Final = Actor("operator")


@dataclass(frozen=True, slots=True)
class LockedKey:
    """A key that no other transaction changes until this one ends."""

    record: KeyRecord
    hash: str = field(repr=False)
    previous_hash: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Authority:
    """What the acting key may do, by its row in this transaction.

    Args:
        record: the acting key; None: an operator, who may do everything.
        is_previous: whether it acts by the secret before its last rotation.
    """

    record: KeyRecord | None = None
    is_previous: bool = False

    def sees(self, record: KeyRecord) -> bool:
        """Whether a key exists for it: of its organisation, in an environment that it reaches."""
        return self.record is None or (
            record.organization_id == self.record.organization_id
            and reaches(self.record, record.environment)
        )

    def check(self, organization_id: str, permission: str, environment: str) -> None:
        """Raises `NotPermitted` unless it has these rights itself."""
        if self.record is not None:
            if organization_id != self.record.organization_id:
                raise NotPermitted("a key manages the keys of its own organisation only")
            check_rights(self.record, permission, environment)

    def check_grant(self, record: KeyRecord) -> None:
        """Raises `NotPermitted` if a key would have more rights than the acting key, or have them
        for longer."""
        self.check(record.organization_id, record.permission, record.environment)
        if self.record is not None:
            check_end(self.record, record.expires_at)

    def bounded(self, record: KeyRecord) -> KeyRecord:
        """A new key; one without an end gets that of the acting key."""
        if self.record is None or record.expires_at is not None:
            return record
        return replace(record, expires_at=self.record.expires_at)


def authorize(
    connection: Connection,
    actor: Actor,
    organization_id: str,
    key_id: str | None = None,
    *,
    alone: bool = False,
    ends_itself: bool = False,
) -> tuple[Authority, LockedKey | None]:
    """Lock the acting key, and the key to be changed if one is named, and judge the acting key.

    Args:
        connection: of the transaction.
        actor: who asks.
        organization_id: whose keys are to be changed.
        key_id: the key to be changed.
        alone: whether no other key of the organisation may make changes meanwhile.
        ends_itself: whether the acting secret is to be ended and nothing else; any may do that.

    Returns:
        its authority, and the key to be changed; None: it sees no such key in the organisation.

    Raises:
        CallerRefused: the acting key, or its secret, is not valid any more.
        NotPermitted: it may not make this change.
    """
    lock_organization(connection, actor, organization_id, alone=alone)
    acting = actor.key_id
    ids = {each for each in (acting, key_id) if each is not None}
    found = {each: locked_key(connection, each, shared=each != key_id) for each in sorted(ids)}
    authority = judge_again(actor, found.get(acting or ""), ends_itself=ends_itself)
    target = found.get(key_id or "")
    if target is None or target.record.organization_id != organization_id:
        return authority, None
    return authority, target if authority.sees(target.record) else None


def lock_organization(
    connection: Connection, actor: Actor, organization_id: str, *, alone: bool
) -> None:
    """Keep an organisation from being disabled meanwhile; `alone`: and other keys from making
    changes in it."""
    if alone or actor.principal is not None:
        # FOR NO KEY UPDATE and not FOR UPDATE: an operator who creates a key locks the counter row
        # and then, by the foreign key, the organisation FOR KEY SHARE.
        connection.execute(
            select(organizations.c.id)
            .where(organizations.c.id == organization_id)
            .with_for_update(read=not alone, key_share=alone)
        )


def locked_key(connection: Connection, key_id: str, *, shared: bool = False) -> LockedKey | None:
    """A key that no other transaction changes until this one ends; `shared`: and neither does this
    one, so others may lock it in the same way."""
    row = connection.execute(
        RECORDS.add_columns(keys.c.hash, keys.c.previous_hash)
        .where(keys.c.id == key_id)
        .with_for_update(read=shared, of=keys)
    ).first()
    return None if row is None else LockedKey(record_of(row[:-2]), row[-2], row[-1])


def locked_keys(connection: Connection, key_ids: Collection[str]) -> Mapping[str, LockedKey]:
    """Those of the keys that exist, locked in the order of their ids."""
    ordered = sorted(key_ids)
    found: dict[str, LockedKey] = {}
    for start in range(0, len(ordered), _MAX_NAMED):
        rows = connection.execute(
            RECORDS.add_columns(keys.c.hash, keys.c.previous_hash)
            .where(keys.c.id.in_(ordered[start : start + _MAX_NAMED]))
            .order_by(keys.c.id)
            .with_for_update(of=keys)
        )
        for row in rows:
            found[row[0]] = LockedKey(record_of(row[:-2]), row[-2], row[-1])
    return found


def judge_again(actor: Actor, acting: LockedKey | None, *, ends_itself: bool = False) -> Authority:
    """What an actor may do; see `authorize`.

    Args:
        actor: who asks.
        acting: its key, locked.
        ends_itself: as in `authorize`.
    """
    principal = actor.principal
    if principal is None:
        return Authority()
    if principal.secret is None:
        raise NotPermitted("only a caller that presented the key itself can manage keys")
    if acting is None:
        raise CallerRefused(Reason.UNKNOWN)
    now_ms = actor.now_ms()
    reason = flaw(acting.record, now_ms, None)
    if reason is not None:
        raise CallerRefused(reason)
    authority = Authority(acting.record, _is_previous(principal.secret, acting, now_ms))
    if not ends_itself:
        _check_acting(principal, authority)
    return authority


def _is_previous(secret: int, acting: LockedKey, now_ms: int) -> bool:
    if secret == secret_of(acting.record):
        return False
    if (
        acting.previous_hash is None
        or secret != secret_of(acting.record, is_previous=True)
        or acting.record.grace_ends_at(now_ms) is None
    ):
        raise CallerRefused(Reason.WRONG_SECRET)
    return True


def _check_acting(principal: Principal, authority: Authority) -> None:
    if authority.is_previous:
        raise NotPermitted("the secret before a rotation can end itself and change nothing else")
    record = authority.record
    if record is not None and record.permission not in (FULL, principal.permission):
        raise NotPermitted("the key has fewer rights than when the call began")
