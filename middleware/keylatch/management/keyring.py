"""The operations on keys: create, list, get, change, rotate, delete.

The law of this file: every change is one call of the store, which authorizes the caller's key
again, writes the invalidation and the audit event in the transaction that makes the change. The
propagation starts after the commit. An organisation always comes from the caller's own key, never
from what the caller sent.

`by` is the caller's own key, as a principal that an engine authenticated. It limits what the caller
sees and changes. Every change with `by` may raise `CallerRefused`, because that key or its secret
is not valid any more, and `NotPermitted`; then nothing was changed. Without `by`, the caller is an
operator, who has all rights.
"""

import asyncio
import builtins
import copy
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Final

from keylatch.authentication.hashing import Hasher
from keylatch.core.decisions import FULL, AuditEvent, KeyRecord, Principal
from keylatch.core.imported_tokens import ImportedToken
from keylatch.core.keys import Key, Metadata
from keylatch.core.tokens import MacKeys, Token
from keylatch.core.validation import (
    LIVE,
    KeyValidator,
    NewKey,
    check_may_grant,
    serialize_metadata,
    validate_expiry,
    validate_grace,
    validate_name,
    validate_reason,
)
from keylatch.errors import InvalidValue
from keylatch.management.organization_limit import OrganizationLimit
from keylatch.management.results import Changed, Created, Imported, Revoked, Rotated
from keylatch.revocation.propagation import Propagation, Receipt
from keylatch.settings import Settings
from keylatch.storage.authorization import OPERATOR, Actor
from keylatch.storage.quotas import Quotas
from keylatch.storage.store import Page, Store
from keylatch.storage.usage import DAY_MS, KeyUsage

__all__ = [
    "UNSET",
    "Changed",
    "Created",
    "Imported",
    "Keyring",
    "NewKey",
    "Revoked",
    "Rotated",
    "Unset",
]

_MAX_OPERATOR_LENGTH: Final = 100
_CONCURRENT_HASHES: Final = 4
_WAITING_HASHES: Final = 16
_NO_GRACE: Final = timedelta()


class Unset(Enum):
    """The type of `UNSET`."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET
"""The default of `Keyring.change`: keep this field as it is. None removes an expiry or metadata."""


class Keyring:
    """The keys of a store. An engine creates it: `await engine.keyring()`.

    Args:
        store: an opened store.
        hasher: hashes new tokens.
        mac_keys: mint new tokens.
        settings: the prefix of new tokens, the permissions and environments that may be granted,
            the quotas.
        now_ms: the store's time, by which expiries are judged; milliseconds since the Unix epoch.
        propagation: tells every process about a committed change.
    """

    def __init__(
        self,
        store: Store,
        hasher: Hasher,
        mac_keys: MacKeys,
        settings: Settings,
        now_ms: Callable[[], int],
        propagation: Propagation,
    ) -> None:
        self._store = store
        self._hasher = hasher
        self._mac_keys = mac_keys
        self._prefix = settings.prefix
        self._validator = KeyValidator(settings.permissions, settings.environments)
        self._now_ms = now_ms
        self._propagation = propagation
        self._operator = OPERATOR.name
        self._quotas = Quotas(settings.max_keys, settings.max_changes)
        self._limit = OrganizationLimit(_CONCURRENT_HASHES, _WAITING_HASHES)

    def as_operator(self, operator: str) -> "Keyring":
        """The same keyring; the audit log names this operator, such as `cli:alice`, as the actor of
        changes without `by`."""
        keyring = copy.copy(self)
        keyring._operator = operator[:_MAX_OPERATOR_LENGTH]
        return keyring

    # Create

    async def create(
        self,
        organization_id: str,
        name: str,
        *,
        permission: str = FULL,
        environment: str = LIVE,
        expires_at: datetime | None = None,
        metadata: Metadata | None = None,
        by: Principal | None = None,
    ) -> Created:
        """Create a key.

        Args:
            organization_id: the owner; a new organisation is created with its first key.
            name: 1 to 100 characters; blanks around it are removed.
            permission: one of the settings' `permissions`.
            environment: a word such as `live` or `test`.
            expires_at: aware and in the future; None: with `by`, or never.
            metadata: names and scalars to store with the key; shown to all who manage it.
            by: the caller's own key, whose rights limit those of the new key; None: an operator.

        Raises:
            InvalidValue: names the argument.
            CallerRefused: `by` is not valid any more.
            NotPermitted: the new key would have more rights than `by`, or have them for longer.
            QuotaExceeded: a limit of the organisation; nothing was created.
            HashingBusy, StoreUnavailable: nothing was created.
        """
        new_key = NewKey(organization_id, name, permission, environment, expires_at, metadata)
        self._require_valid([new_key])
        if by is not None:
            check_may_grant(by, permission, environment)
        actor = self._actor(by)
        created = self._mint(new_key, self.now_ms(), actor.name)
        hashed = await self._hash(created.token, organization_id, by, new_keys=1)
        record, _ = await self._store.keys.add(created.record, hashed, by=actor)
        return Created(record, created.token)

    async def create_many(
        self, new_keys: Sequence[NewKey], *, by: Principal | None = None
    ) -> Sequence[Created]:
        """Create keys in one transaction: all of them, or none.

        Pass at most about a thousand at once: every other change waits for the transaction.

        Raises:
            InvalidValue: names the argument of one of them; nothing was created.
            CallerRefused, NotPermitted: as `create`; nothing was created.
            HashingFailed: nothing was created.
            StoreUnavailable: as a rule nothing was created; if it was, the tokens are lost.
        """
        if not new_keys:
            return []
        self._require_valid(new_keys)
        now_ms, actor = self.now_ms(), self._actor(by)
        minted = await asyncio.to_thread(
            lambda: [self._mint(new_key, now_ms, actor.name) for new_key in new_keys]
        )
        hashes = await self._hasher.hash_all([each.token for each in minted])
        rows = [(each.record, hashed) for each, hashed in zip(minted, hashes, strict=True)]
        records, _ = await self._store.keys.add_many(rows, by=actor)
        return [Created(record, each.token) for record, each in zip(records, minted, strict=True)]

    def validate(self, new_key: NewKey) -> builtins.list[InvalidValue]:
        """Every mistake in a new key; empty if it may be created."""
        return self._validator.validate(new_key, self.now_ms())

    # Read

    async def list(
        self,
        organization_id: str,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        by: Principal | None = None,
    ) -> builtins.list[Key]:
        """The organisation's keys in the order of their creation; with `deleted`, these as well."""
        records = await self._store.keys.list(
            organization_id,
            newest_first=newest_first,
            deleted=deleted,
            environment=_environment_of(by),
        )
        return [Key(record) for record in records]

    async def page(
        self,
        organization_id: str,
        limit: int,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        after: int | None = None,
        idle: timedelta | None = None,
        by: Principal | None = None,
    ) -> Page:
        """At most `limit` keys of that list.

        Args:
            organization_id: the owner.
            limit: the size of the page.
            newest_first: False: the oldest first.
            deleted: True: deleted keys as well.
            after: `next_cursor` of the page before; None: the first page.
            idle: only keys that were not used for this long.
            by: the caller's own key; None: an operator.
        """
        return await self._store.keys.page(
            organization_id,
            limit,
            newest_first=newest_first,
            deleted=deleted,
            after=after,
            unused_since=self._unused_since_ms(idle),
            environment=_environment_of(by),
        )

    def pages(
        self,
        organization_id: str,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        after: int | None = None,
        idle: timedelta | None = None,
        by: Principal | None = None,
    ) -> AsyncIterator[Page]:
        """That list page by page; for long lists. The arguments are those of `page`."""
        return self._store.keys.pages(
            organization_id,
            newest_first=newest_first,
            deleted=deleted,
            after=after,
            unused_since=self._unused_since_ms(idle),
            environment=_environment_of(by),
        )

    async def get(
        self, organization_id: str, key_id: str, *, by: Principal | None = None
    ) -> Key | None:
        """The key, deleted or not; None: the organisation has no such key."""
        record = await self._store.keys.get(organization_id, key_id, _environment_of(by))
        return None if record is None else Key(record)

    async def usage(
        self,
        organization_id: str,
        key_id: str,
        days: int = 30,
        *,
        by: Principal | None = None,
    ) -> KeyUsage | None:
        """The key's decisions by day, the last `days` with today.

        The counts are some seconds behind. None: the organisation has no such key.
        """
        since_day = self.now_ms() // DAY_MS - days + 1
        return await self._store.usage.of_key(
            organization_id, key_id, since_day, _environment_of(by)
        )

    async def events(
        self,
        organization_id: str | None,
        limit: int,
        *,
        key_id: str | None = None,
        before: int | None = None,
        by: Principal | None = None,
    ) -> Sequence[AuditEvent]:
        """The newest `limit` events of the audit log, the newest first.

        Args:
            organization_id: the owner of the keys; None: all organisations, for operators.
            limit: at most so many.
            key_id: only the changes of this key.
            before: only events before the one with this id.
            by: the caller's own key; one for another environment than `live` sees the events of
                keys in that environment only.
        """
        environment = _environment_of(by)
        return await self._store.audit.events(organization_id, limit, key_id, before, environment)

    # Change

    async def change(
        self,
        organization_id: str,
        key_id: str,
        *,
        name: str | Unset = UNSET,
        active: bool | Unset = UNSET,
        permission: str | Unset = UNSET,
        expires_at: datetime | Unset | None = UNSET,
        metadata: Metadata | Unset | None = UNSET,
        by: Principal | None = None,
        wait: bool = True,
    ) -> Changed | None:
        """Change the given fields of a key that is not deleted; the others stay as they are.

        Args:
            organization_id: the owner.
            key_id: the key.
            name: as in `create`.
            active: False: disable it until it is enabled again.
            permission: as in `create`.
            expires_at: as in `create`; None: it does not expire.
            metadata: replaces all of it; None: removes it.
            by: the caller's own key; None: an operator.
            wait: as in `delete`.

        Returns:
            the changed key, a deleted key as it is, or None: the organisation has no such key.

        Raises:
            InvalidValue: names the argument.
            CallerRefused: `by` is not valid any more.
            NotPermitted: the key would have more rights than `by`, or have them for longer.
            QuotaExceeded: as in `create`; a key can always be disabled.
            StoreUnavailable: nothing was changed.
        """
        values: dict[str, Any] = {}
        if name is not UNSET:
            values["name"] = validate_name(name)
        if active is not UNSET:
            values["active"] = active
        if permission is not UNSET:
            self._validator.validate_permission(permission)
            values["permission"] = permission
        if expires_at is not UNSET:
            values["expires_at"] = validate_expiry(expires_at, self.now_ms())
        if metadata is not UNSET:
            values["metadata"] = serialize_metadata(metadata)
        return await self._change(organization_id, key_id, values, by, wait)

    async def set_organization_active(
        self,
        organization_id: str,
        active: bool,
        *,
        by: Principal | None = None,
        wait: bool = True,
    ) -> Receipt | None:
        """Disable an organisation with all of its keys, or enable it again.

        Returns:
            the propagation of the change; None: no such organisation.
        """
        seq = await self._store.organizations.set_active(
            organization_id, self.now_ms(), active, by=self._actor(by)
        )
        return None if seq is None else await self._propagation.publish(seq, None, wait)

    # Rotate

    async def rotate(
        self,
        organization_id: str,
        key_id: str,
        *,
        grace: timedelta = _NO_GRACE,
        by: Principal | None = None,
        wait: bool = True,
    ) -> Rotated | None:
        """Give a key a new secret. The present one is accepted until the grace has passed; a
        secret that is still in the grace of an earlier rotation ends now.

        Args:
            organization_id: the owner.
            key_id: the key; it keeps its id and rights.
            grace: how long the present secret is accepted, never beyond the key's own expiry;
                zero: it ends with this call.
            by: the caller's own key; None: an operator.
            wait: as in `delete`.

        Returns:
            the key and its new secret; None: the organisation has no such key.

        Raises:
            InvalidValue: of the grace.
            CallerRefused: as in `delete`.
            NotPermitted: the key has more rights than `by`, or has them for longer.
            InvalidKeyState: the key was deleted.
            QuotaExceeded: as in `create`.
            HashingBusy, StoreUnavailable: it may not have been rotated; repeat the call.
        """
        grace_ms = validate_grace(grace)
        record = await self._store.keys.get(organization_id, key_id, _environment_of(by))
        if record is None:
            return None
        token = self._mac_keys.mint(self._prefix, record.environment, record.id)
        hashed = await self._hash(token, organization_id, by)
        now_ms = self.now_ms()
        ends_at = now_ms + grace_ms if grace_ms else None
        rotated = await self._store.rotation.rotate(
            organization_id, key_id, now_ms, hashed, token.partial, ends_at, by=self._actor(by)
        )
        if rotated is None:
            return None
        changed = await self._propagated(rotated, wait)
        return Rotated(changed.record, token, changed.receipt)

    async def cancel_rotation(
        self,
        organization_id: str,
        key_id: str,
        *,
        by: Principal | None = None,
        wait: bool = True,
    ) -> Changed | None:
        """End the new secret during the grace of a rotation; the previous one stays.

        Returns:
            the key; None: the organisation has no such key.

        Raises:
            NotPermitted: as in `rotate`.
            InvalidKeyState: no rotation has a grace now, or the key was deleted.
            StoreUnavailable: as in `delete`.
        """
        return await self._end_grace(organization_id, key_id, by, wait, restore_previous=True)

    async def finish_rotation(
        self,
        organization_id: str,
        key_id: str,
        *,
        by: Principal | None = None,
        wait: bool = True,
    ) -> Changed | None:
        """End the previous secret during the grace of a rotation. Returns and raises as
        `cancel_rotation`."""
        return await self._end_grace(organization_id, key_id, by, wait, restore_previous=False)

    # Revoke

    async def delete(
        self,
        organization_id: str,
        key_id: str,
        *,
        reason: str | None = None,
        descendants: bool = False,
        by: Principal | None = None,
        wait: bool = True,
    ) -> Changed | None:
        """Revoke a key for good. Repeating the call changes nothing.

        Args:
            organization_id: the owner.
            key_id: the key.
            reason: up to 200 characters, stored with the key.
            descendants: revoke the keys that it created as well, directly and indirectly, in the
                same change; `count` of the result is the number of keys.
            by: the caller's own key; None: an operator.
            wait: True: return when no process accepts the key any more; False: return after the
                commit, with a receipt that says how long the propagation may take.

        Returns:
            the deleted key, or None: the organisation has no such key.

        Raises:
            InvalidValue: of the reason.
            CallerRefused: `by` is not valid any more.
            NotPermitted: `by` is the secret before a rotation.
            StoreUnavailable: it may not have been revoked; repeat the call.
        """
        reason, now_ms = validate_reason(reason), self.now_ms()
        if not descendants:
            values = {"active": False, "revoked_reason": reason, "deleted_at": now_ms}
            return await self._change(organization_id, key_id, values, by, wait)
        deleted = await self._store.descendants.delete(
            organization_id, key_id, now_ms, reason, by=self._actor(by)
        )
        if deleted is None:
            return None
        record, count, seq = deleted
        return Changed(record, await self._propagation.publish(seq, record, wait), count)

    async def revoke_all(
        self,
        organization_id: str,
        *,
        reason: str | None = None,
        by: Principal | None = None,
        wait: bool = True,
    ) -> Revoked:
        """Revoke every key of an organisation, the caller's own included, in one change with one
        invalidation. Keys that are created later are valid.

        Raises:
            InvalidValue: of the reason.
            NotPermitted: `by` is not for `live`.
            StoreUnavailable: as in `delete`.
        """
        reason = validate_reason(reason)
        count, seq = await self._store.organizations.revoke_all(
            organization_id, self.now_ms(), reason, by=self._actor(by)
        )
        return Revoked(count, await self._propagation.publish(seq, None, wait))

    async def revoke_own_secret(
        self, by: Principal, *, reason: str | None = None, wait: bool = True
    ) -> Changed | None:
        """Revoke the caller's own key, whatever its permission. If the caller used the secret
        before a rotation, only that secret ends.

        Raises:
            InvalidValue: of the reason.
            CallerRefused: `by` is not valid any more.
            StoreUnavailable: as in `delete`.
        """
        secret = by.secret_version or 0  # the store refuses a caller without a secret
        return await self._revoke_secret(by.organization_id, by.key_id, secret, reason, by, wait)

    # For keylatch's own programs: `keylatch scan`, `keylatch keys import`

    async def revoke_secret(
        self,
        record: KeyRecord,
        secret: int,
        *,
        reason: str | None = None,
        wait: bool = True,
    ) -> Changed | None:
        """Revoke the key of a leaked secret. If it is the secret before a rotation, only that
        secret ends.

        Args:
            record: the key.
            secret: which of its secrets, see `secret_version_of`.
            reason: as in `delete`.
            wait: as in `delete`.

        Raises:
            InvalidValue: of the reason.
            InvalidKeyState: the key was rotated or deleted since the record was read.
            StoreUnavailable: as in `delete`.
        """
        return await self._revoke_secret(
            record.organization_id, record.id, secret, reason, None, wait
        )

    async def import_many(
        self, imports: Sequence[tuple[NewKey, ImportedToken]], *, by: Principal | None = None
    ) -> Sequence[Imported]:
        """Import keys of another system in one transaction. Returns when no process has a negative
        entry for one of them any more. Keys that are here already stay unchanged; a deleted one
        stays deleted.

        Raises:
            InvalidValue: names the argument of one of them; nothing was imported.
            HashingFailed: nothing was imported.
            StoreUnavailable: as a rule nothing was imported; the call can be repeated.
        """
        if not imports:
            return []
        self._require_valid([new_key for new_key, _ in imports])
        now_ms, actor = self.now_ms(), self._actor(by)
        tokens = [imported.token for _, imported in imports if imported.token is not None]
        hashes = iter(await self._hasher.hash_all(tokens))
        rows = await asyncio.to_thread(
            lambda: [
                (
                    self._imported_record(new_key, imported, now_ms, actor.name),
                    imported.hash or next(hashes),
                )
                for new_key, imported in imports
            ]
        )
        seq, existing = await self._store.keys.import_many(rows, by=actor)
        await self._propagation.publish(seq)
        results = []
        for record, _ in rows:
            key_id, is_deleted = existing.get(str(record.locator), (record.id, False))
            results.append(Imported(key_id, key_id == record.id, is_deleted))
        return results

    async def find_imported(self, tokens: Sequence[ImportedToken]) -> Sequence[Imported]:
        """Which of the tokens were imported already; `key_id` is empty for the others."""
        existing = await self._store.keys.by_locator([imported.locator for imported in tokens])
        return [
            Imported(existing[each.locator][0], False, existing[each.locator][1])
            if each.locator in existing
            else Imported("")
            for each in tokens
        ]

    async def analyze(self) -> None:
        """Update the database's statistics. Call it after many keys were created: without them,
        lists of a large store are slow."""
        await self._store.keys.analyze()

    def now_ms(self) -> int:
        """The store's time, in milliseconds since the epoch."""
        return self._now_ms()

    # Steps

    def _require_valid(self, new_keys: Sequence[NewKey]) -> None:
        for new_key in new_keys:
            for error in self.validate(new_key):
                raise error

    def _mint(self, new_key: NewKey, now_ms: int, by: str) -> Created:
        token = self._mac_keys.mint(self._prefix, new_key.environment)
        record = KeyRecord(
            id=token.key_id,
            organization_id=new_key.organization_id,
            name=new_key.name.strip(),
            permission=new_key.permission,
            environment=new_key.environment,
            partial_token=token.partial,
            active=True,
            organization_active=True,
            created_at=now_ms,
            updated_at=now_ms,
            expires_at=validate_expiry(new_key.expires_at, now_ms),
            metadata=serialize_metadata(new_key.metadata),
            created_by=by,
        )
        return Created(record, token)

    def _imported_record(
        self, new_key: NewKey, imported: ImportedToken, now_ms: int, by: str
    ) -> KeyRecord:
        minted = self._mint(new_key, now_ms, by).record  # for its id; its token is dropped
        return replace(minted, partial_token=imported.partial, locator=imported.locator)

    async def _hash(
        self, token: Token, organization_id: str, by: Principal | None, new_keys: int = 0
    ) -> str:
        """The hash of a new token. For callers with a key, the quotas are checked before the hash
        is computed, and an organisation may only compute a few hashes at a time."""
        if by is None:
            return await self._hasher.hash(token)
        async with self._limit.slot(organization_id):
            await self._store.keys.check_quota(
                organization_id, self.now_ms(), self._quotas, new_keys=new_keys
            )
            return await self._hasher.hash(token)

    async def _change(
        self,
        organization_id: str,
        key_id: str,
        values: dict[str, Any],
        by: Principal | None,
        wait: bool,
    ) -> Changed | None:
        changed = await self._store.keys.change(
            organization_id, key_id, self.now_ms(), values, by=self._actor(by)
        )
        return None if changed is None else await self._propagated(changed, wait)

    async def _end_grace(
        self,
        organization_id: str,
        key_id: str,
        by: Principal | None,
        wait: bool,
        *,
        restore_previous: bool,
    ) -> Changed | None:
        changed = await self._store.rotation.end_grace(
            organization_id, key_id, self.now_ms(), restore_previous, by=self._actor(by)
        )
        return None if changed is None else await self._propagated(changed, wait)

    async def _revoke_secret(
        self,
        organization_id: str,
        key_id: str,
        secret: int,
        reason: str | None,
        by: Principal | None,
        wait: bool,
    ) -> Changed | None:
        reason = validate_reason(reason)
        changed = await self._store.rotation.revoke_secret(
            organization_id, key_id, secret, self.now_ms(), reason, by=self._actor(by)
        )
        return None if changed is None else await self._propagated(changed, wait)

    async def _propagated(self, changed: tuple[KeyRecord, int], wait: bool) -> Changed:
        record, seq = changed
        return Changed(record, await self._propagation.publish(seq, record, wait))

    def _actor(self, by: Principal | None) -> Actor:
        if by is None:  # operators have no quotas
            return Actor(self._operator)
        return Actor(by.key_id, by, self.now_ms, self._quotas)

    def _unused_since_ms(self, idle: timedelta | None) -> int | None:
        return None if idle is None else self.now_ms() - idle // timedelta(milliseconds=1)


def _environment_of(by: Principal | None) -> str | None:
    """The only environment whose keys the caller sees; None: all of them."""
    return None if by is None or by.environment == LIVE else by.environment
