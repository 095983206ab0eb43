"""What management does with keys: create, list, get, change, delete, within one organisation.

The law of this file: every change is one call of the store, which judges the caller's key again,
invalidates and writes the audit log in the transaction that makes the change; what is told to Redis
afterwards is a courtesy. The organisation always comes from the caller's own key, never from what
the caller says.

`by` is the caller's own key, as a principal that an engine made: it bounds what the caller sees and
changes. Every change may raise `CallerRefused`, because that key or its secret is not valid any
more, and `NotPermitted`; then nothing was changed. None: an operator, who is bound by no key.
"""

import asyncio
import copy
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from keylatch.authentication.hashing import Hasher
from keylatch.core.decisions import FULL, AuditEvent, KeyRecord, Principal
from keylatch.core.imported_tokens import ImportedToken
from keylatch.core.tokens import MacKeys, Token
from keylatch.core.validation import (
    LIVE,
    CallerRefused,
    InvalidKeyState,
    InvalidValue,
    KeyValidator,
    Metadata,
    NewKey,
    NotPermitted,
    QuotaExceeded,
    check_may_grant,
    serialize_metadata,
    validate_expiry,
    validate_grace,
    validate_name,
    validate_reason,
)
from keylatch.management.organization_limit import OrganizationLimit
from keylatch.revocation.invalidations import Receipt
from keylatch.settings import Settings
from keylatch.storage.authorization import OPERATOR, Actor
from keylatch.storage.quotas import Quotas
from keylatch.storage.store import Page, Store
from keylatch.storage.usage import DAY_MS, KeyUsage

__all__ = [
    "CallerRefused",
    "Changed",
    "Created",
    "InvalidKeyState",
    "InvalidValue",
    "Keyring",
    "NewKey",
    "NotPermitted",
    "QuotaExceeded",
    "Revoked",
    "Rotated",
]

_LONGEST_ACTOR: Final = 100
_HASHES_AT_ONCE: Final = 4
_HASHES_WAITING: Final = 16

Propagate = Callable[[KeyRecord | None, int, bool], Awaitable[Receipt]]


@dataclass(frozen=True, slots=True)
class Changed:
    """A key after a change, what is known of the change's spreading, and how many keys it was."""

    record: KeyRecord
    receipt: Receipt
    count: int = 1


@dataclass(frozen=True, slots=True)
class Created:
    """A new key and, this once, its token."""

    record: KeyRecord
    token: Token = field(repr=False)


@dataclass(frozen=True, slots=True)
class Imported:
    """A key that was made elsewhere, and whether it was here already: then it is as it was."""

    key_id: str
    is_new: bool = True
    is_deleted: bool = False


@dataclass(frozen=True, slots=True)
class Rotated:
    """A key with a new secret, its token this once, and what is known of the change's spreading."""

    record: KeyRecord
    token: Token = field(repr=False)
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Revoked:
    """How many keys of an organisation were revoked at once, and how far that has spread."""

    count: int
    receipt: Receipt


class Keyring:
    """The keys of a store.

    Args:
        store: an opened store.
        hasher: hashes new tokens.
        mac_keys: mint new tokens.
        settings: prefix of new tokens and the permissions that may be given.
        now_ms: the store's time, which expiry is judged by; milliseconds since the Unix epoch.
        propagate: called with each changed key (None: an organisation), its number and `wait`,
            after the commit; waits until all processes decide by it, if its last argument says so.
    """

    def __init__(
        self,
        store: Store,
        hasher: Hasher,
        mac_keys: MacKeys,
        settings: Settings,
        now_ms: Callable[[], int],
        propagate: Propagate,
    ) -> None:
        self._store = store
        self._hasher = hasher
        self._mac_keys = mac_keys
        self._prefix = settings.prefix
        self._rules = KeyValidator(settings.grantable, settings.allowed_environments)
        self._now_ms = now_ms
        self._propagate = propagate
        self._operator = OPERATOR.name
        self._quotas = Quotas(settings.max_keys, settings.max_changes)
        self._limit = OrganizationLimit(_HASHES_AT_ONCE, _HASHES_WAITING)

    def as_operator(self, operator: str) -> "Keyring":
        """The same, for somebody whom the audit log names where no key acts: `cli:alice`."""
        keyring = copy.copy(self)
        keyring._operator = operator[:_LONGEST_ACTOR]
        return keyring

    async def create(
        self,
        organization_id: str,
        name: str,
        *,
        permission: str = FULL,
        environment: str = LIVE,
        expires_at: int | None = None,
        metadata: Metadata | None = None,
        by: Principal | None = None,
    ) -> Created:
        """Make a key.

        Args:
            organization_id: whose key it will be; a new organisation is made on the way.
            name: 1 to 100 characters, blanks around it are dropped.
            permission: one of the settings' `permissions`.
            environment: a word such as `live` or `test`.
            expires_at: milliseconds since the epoch, in the future; None: with `by`, or never.
            metadata: names and scalars to keep with it, shown to whoever may manage it.
            by: the caller's own key, whose rights bound those of the new key; None: the operator.

        Raises:
            InvalidValue: naming the argument at fault.
            CallerRefused: `by` is not valid any more.
            NotPermitted: the new key would have more rights than `by`, or have them for longer.
            QuotaExceeded: a limit on what the organisation's keys may do; nothing was made.
            HashingBusy, StoreUnavailable: nothing was made.
        """
        new_key = NewKey(organization_id, name, permission, environment, expires_at, metadata)
        for error in self.validate(new_key):
            raise error
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
        """Make keys in one transaction: all of them, or none.

        A thousand at a time is plenty: every other change waits for the transaction.

        Raises:
            InvalidValue: naming the argument at fault of one of them; nothing was made.
            CallerRefused, NotPermitted: as `create`; nothing was made.
            HashingFailed: nothing was made.
            StoreUnavailable: as a rule nothing was made, and if it was, nobody has the tokens.
        """
        if not new_keys:
            return []
        for new_key in new_keys:
            for error in self.validate(new_key):
                raise error
        now_ms, actor = self.now_ms(), self._actor(by)
        created = await asyncio.to_thread(
            lambda: [self._mint(new_key, now_ms, actor.name) for new_key in new_keys]
        )
        hashes = await self._hasher.hash_all([each.token for each in created])
        made = [(each.record, hashed) for each, hashed in zip(created, hashes, strict=True)]
        records, _ = await self._store.keys.add_many(made, by=actor)
        return [Created(record, each.token) for record, each in zip(records, created, strict=True)]

    async def import_many(
        self, imports: Sequence[tuple[NewKey, ImportedToken]], *, by: Principal | None = None
    ) -> Sequence[Imported]:
        """Take keys in that were made elsewhere, in one transaction, and return when every process
        knows that there are such keys. Those that are here already stay as they are: a deleted one
        stays deleted.

        Raises:
            InvalidValue: naming the argument at fault of one of them; nothing was taken in.
            HashingFailed: nothing was taken in.
            StoreUnavailable: as a rule nothing was taken in; it can be repeated.
        """
        if not imports:
            return []
        for new_key, _ in imports:
            for error in self.validate(new_key):
                raise error
        now_ms, actor = self.now_ms(), self._actor(by)
        tokens = [imported.token for _, imported in imports if imported.token is not None]
        hashes = iter(await self._hasher.hash_all(tokens))
        made = await asyncio.to_thread(
            lambda: [
                (
                    self._imported_record(new_key, foreign, now_ms, actor.name),
                    foreign.hash or next(hashes),
                )
                for new_key, foreign in imports
            ]
        )
        seq, existing = await self._store.keys.import_many(made, by=actor)
        await self._propagate(None, seq, True)
        results = []
        for record, _ in made:
            key_id, is_deleted = existing.get(str(record.locator), (record.id, False))
            results.append(Imported(key_id, key_id == record.id, is_deleted))
        return results

    async def find_imported(self, tokens: Sequence[ImportedToken]) -> Sequence[Imported]:
        """Which of them are here already; `key_id` is empty for those that are not."""
        existing = await self._store.keys.by_locator([foreign.locator for foreign in tokens])
        return [
            Imported(existing[each.locator][0], False, existing[each.locator][1])
            if each.locator in existing
            else Imported("")
            for each in tokens
        ]

    def _imported_record(
        self, new_key: NewKey, imported: ImportedToken, now_ms: int, by: str
    ) -> KeyRecord:
        minted = self._mint(new_key, now_ms, by).record  # for its id; its token is dropped
        return replace(minted, partial_token=imported.partial, locator=imported.locator)

    async def analyze(self) -> None:
        """To be called when many were made: lists stay quick on a database that knows of them."""
        await self._store.keys.analyze()

    def validate(self, new_key: NewKey) -> list[InvalidValue]:
        """Everything that is wrong with a key to be made."""
        return self._rules.validate(new_key, self.now_ms())

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
            expires_at=new_key.expires_at,
            metadata=serialize_metadata(new_key.metadata),
            created_by=by,
        )
        return Created(record, token)

    async def list(
        self,
        organization_id: str,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        by: Principal | None = None,
    ) -> list[KeyRecord]:
        """The organisation's keys in the order of their creation; deleted ones if asked for."""
        return await self._store.keys.list(
            organization_id,
            newest_first=newest_first,
            deleted=deleted,
            environment=_environment_of(by),
        )

    async def page(
        self,
        organization_id: str,
        limit: int,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        after: int | None = None,
        idle_days: int | None = None,
        by: Principal | None = None,
    ) -> Page:
        """At most `limit` keys of that list, from where another page `next_cursor`; only those
        that nobody has used for so many days, if that is given."""
        return await self._store.keys.page(
            organization_id,
            limit,
            newest_first=newest_first,
            deleted=deleted,
            after=after,
            unused_since=self._days_ago(idle_days),
            environment=_environment_of(by),
        )

    def pages(
        self,
        organization_id: str,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        after: int | None = None,
        idle_days: int | None = None,
        by: Principal | None = None,
    ) -> AsyncIterator[Page]:
        """That list page by page, for those that are long."""
        return self._store.keys.pages(
            organization_id,
            newest_first=newest_first,
            deleted=deleted,
            after=after,
            unused_since=self._days_ago(idle_days),
            environment=_environment_of(by),
        )

    async def get(
        self, organization_id: str, key_id: str, *, by: Principal | None = None
    ) -> KeyRecord | None:
        """The key, deleted or not; None where the organisation has no such key."""
        return await self._store.keys.get(organization_id, key_id, _environment_of(by))

    async def usage(
        self,
        organization_id: str,
        key_id: str,
        days: int = 30,
        *,
        by: Principal | None = None,
    ) -> KeyUsage | None:
        """How often the key was let in and refused on each of the last days, today included.

        It is some seconds behind: see `usage`. None where the organisation has no such key.
        """
        since_day = self.now_ms() // DAY_MS - days + 1
        return await self._store.usage.of_key(
            organization_id, key_id, since_day, _environment_of(by)
        )

    async def change(
        self,
        organization_id: str,
        key_id: str,
        *,
        by: Principal | None = None,
        wait: bool = True,
        **values: Any,
    ) -> Changed | None:
        """Change `name`, `active`, `permission`, `expires_at` or `metadata` of a key that is not
        deleted.

        Returns:
            the key after it, a deleted key as it is, or None where there is no such key.

        Raises:
            InvalidValue: naming the argument at fault.
            CallerRefused: `by` is not valid any more.
            NotPermitted: the key would have more rights than `by`, or have them for longer.
            QuotaExceeded: as in `create`; disabling a key is never refused for that.
            StoreUnavailable: nothing was changed.
        """
        if "name" in values:
            values["name"] = validate_name(values["name"])
        if "permission" in values:
            self._rules.validate_permission(values["permission"])
        if "expires_at" in values:
            validate_expiry(values["expires_at"], self.now_ms())
        if "metadata" in values:
            values["metadata"] = serialize_metadata(values["metadata"])
        return await self._change(organization_id, key_id, values, by, wait)

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
        """Revoke a key, finally. Repeating it changes nothing.

        Args:
            organization_id: whose key it is.
            key_id: which key.
            reason: why, in up to 200 characters, for those who look at the key later.
            descendants: revoke in the same change what the key created, what that created, and so
                on; `count` of the result tells how many keys it was.
            by: the caller's own key; None: the operator.
            wait: return only when no process accepts it any more; False: right after the commit,
                with a receipt that bounds how long it may take.

        Returns:
            the deleted key, or None where the organisation has no such key.

        Raises:
            InvalidValue: of the reason.
            CallerRefused: `by` is not valid any more.
            NotPermitted: `by` is the secret before a rotation.
            StoreUnavailable: it may not have been revoked; repeat it.
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
        return Changed(record, await self._propagate(record, seq, wait), count)

    async def revoke_secret(
        self,
        record: KeyRecord,
        secret: int,
        *,
        reason: str | None = None,
        wait: bool = True,
    ) -> Changed | None:
        """Revoke the key of a secret that is known to others; the secret before a rotation ends
        alone, and its key goes on.

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

    async def revoke_own_secret(
        self, by: Principal, *, reason: str | None = None, wait: bool = True
    ) -> Changed | None:
        """Revoke the key that asks, whatever its permission; asked with the secret before a
        rotation, that secret alone.

        Raises:
            InvalidValue: of the reason.
            CallerRefused: it is not valid any more.
            StoreUnavailable: as in `delete`.
        """
        # Without a secret the store refuses the caller.
        secret = by.secret_version or 0
        return await self._revoke_secret(by.organization_id, by.key_id, secret, reason, by, wait)

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

    async def rotate(
        self,
        organization_id: str,
        key_id: str,
        *,
        grace_seconds: int = 0,
        by: Principal | None = None,
        wait: bool = True,
    ) -> Rotated | None:
        """Give a key a new secret; the one before stays good for the grace.

        A secret that is still in its grace from an earlier rotation ends now.

        Args:
            organization_id: whose key it is.
            key_id: which key; it keeps its id, its rights and all else.
            grace_seconds: how long the present secret stays good, never beyond the key's own
                expiry; 0: it ends with this call.
            by: the caller's own key; None: the operator.
            wait: as in `delete`.

        Returns:
            the key and its new token; None where the organisation has no such key.

        Raises:
            InvalidValue: of the grace.
            CallerRefused: as in `delete`.
            NotPermitted: the key has more rights than `by`, or has them for longer.
            InvalidKeyState: the key was deleted.
            QuotaExceeded: as in `create`.
            HashingBusy, StoreUnavailable: it may not have been rotated; repeat it.
        """
        validate_grace(grace_seconds)
        record = await self._store.keys.get(organization_id, key_id, _environment_of(by))
        if record is None:
            return None
        token = self._mac_keys.mint(self._prefix, record.environment, record.id)
        hashed = await self._hash(token, organization_id, by)
        now_ms = self.now_ms()
        ends_at = now_ms + grace_seconds * 1000 if grace_seconds else None
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
        """While the grace of a rotation runs: the secret before it is the key's again, and the new
        one ends now.

        Returns:
            the key; None where the organisation has no such key.

        Raises:
            NotPermitted: as in `rotate`.
            InvalidKeyState: no grace runs, or the key was deleted.
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
        """While the grace of a rotation runs: end it now. As `cancel_rotation`, the other way."""
        return await self._end_grace(organization_id, key_id, by, wait, restore_previous=False)

    async def revoke_all(
        self,
        organization_id: str,
        *,
        reason: str | None = None,
        by: Principal | None = None,
        wait: bool = True,
    ) -> Revoked:
        """Revoke every key of an organisation, the caller's own among them, in one change that
        every cache takes in as one. Keys that are made afterwards are good.

        Raises:
            InvalidValue: of the reason.
            NotPermitted: `by` is not for live.
            StoreUnavailable: as in `delete`.
        """
        reason = validate_reason(reason)
        count, seq = await self._store.organizations.revoke_all(
            organization_id, self.now_ms(), reason, by=self._actor(by)
        )
        return Revoked(count, await self._propagate(None, seq, wait))

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
            what is known of the change's spreading; None: no such organisation.
        """
        seq = await self._store.organizations.set_active(
            organization_id, self.now_ms(), active, by=self._actor(by)
        )
        return None if seq is None else await self._propagate(None, seq, wait)

    async def events(
        self,
        organization_id: str | None,
        limit: int,
        *,
        key_id: str | None = None,
        before: int | None = None,
        by: Principal | None = None,
    ) -> Sequence[AuditEvent]:
        """The audit log: at most `limit` of what was done, the newest first.

        Args:
            organization_id: whose; None: everybody's, for the operator.
            limit: at most so many.
            key_id: only what was done to this key.
            before: only what was done before the deed with this id.
            by: the caller's own key; one for another environment than `live` sees what was done
                to the keys of that environment.
        """
        environment = _environment_of(by)
        return await self._store.audit.events(organization_id, limit, key_id, before, environment)

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

    async def _propagated(self, changed: tuple[KeyRecord, int], wait: bool) -> Changed:
        record, seq = changed
        return Changed(record, await self._propagate(record, seq, wait))

    async def _hash(
        self, token: Token, organization_id: str, by: Principal | None, new_keys: int = 0
    ) -> str:
        """The hash of a new token. One that would be refused afterwards is not hashed, and of those
        that keys ask for an organisation has only some at a time."""
        if by is None:
            return await self._hasher.hash(token)
        async with self._limit.slot(organization_id):
            await self._store.keys.check_quota(
                organization_id, self.now_ms(), self._quotas, new_keys=new_keys
            )
            return await self._hasher.hash(token)

    def _actor(self, by: Principal | None) -> Actor:
        if by is None:  # operators have no limits
            return Actor(self._operator)
        return Actor(by.key_id, by, self.now_ms, self._quotas)

    def _days_ago(self, days: int | None) -> int | None:
        return None if days is None else self.now_ms() - days * DAY_MS

    def now_ms(self) -> int:
        """The store's time, in milliseconds since the epoch."""
        return self._now_ms()


def _environment_of(by: Principal | None) -> str | None:
    """The only environment whose keys the caller sees; None: all of them."""
    return None if by is None or by.environment == LIVE else by.environment
