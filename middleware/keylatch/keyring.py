"""What management does with keys: create, list, get, change, delete, within one organisation.

The law of this file: every change goes through `Store.add`, `Store.add_many`, `Store.bring_many` or
`_change`, so there is no path that forgets to invalidate; the invalidation is part of the
transaction, and what is told to Redis afterwards is a courtesy. The organisation always comes from
the caller's own key, never from what the caller says.
"""

import asyncio
import re
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from keylatch.feed import Receipt
from keylatch.foreign import Foreign
from keylatch.hashing import Hasher
from keylatch.model import FULL, KeyRecord, Principal
from keylatch.settings import Settings
from keylatch.store import Page, Store
from keylatch.tokens import ENVIRONMENT_PATTERN, CheckKeys, Token, without_tokens

MAX_NAME_LENGTH: Final = 100
ORGANIZATION_PATTERN: Final = r"[A-Za-z0-9_-]{1,64}"
LIVE: Final = "live"

# Categories of code points that have no place in a name: controls, surrogates, line separators.
_NAMELESS: Final = frozenset(("Cc", "Cs", "Zl", "Zp"))
# Unicode TR 36: these make a name read as another one.
_BIDI_CONTROLS: Final = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


Announce = Callable[[KeyRecord | None, int, bool], Awaitable[Receipt]]


class InvalidValue(ValueError):
    """A value that no key may have.

    Args:
        field: the argument at fault.
        message: what it must be instead.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class NotPermitted(Exception):
    """The caller would hand out more rights than its own key has."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A key to be made; see `Keyring.create`."""

    organization_id: str
    name: str
    permission: str = FULL
    environment: str = LIVE
    expires_at: int | None = None


@dataclass(frozen=True, slots=True)
class Changed:
    """A key after a change, and what is known of the change's spreading."""

    record: KeyRecord
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Created:
    """A new key and, this once, its token."""

    record: KeyRecord
    token: Token = field(repr=False)


@dataclass(frozen=True, slots=True)
class Brought:
    """A key that was made elsewhere, and whether it was here already: then it is as it was."""

    key_id: str
    is_new: bool = True
    is_deleted: bool = False


class Keyring:
    """The keys of a store.

    Args:
        store: an opened store.
        hasher: hashes new tokens.
        check_keys: mint new tokens.
        settings: prefix of new tokens and the permissions that may be given.
        clock: seconds since the Unix epoch.
        announce: told of every changed key (None: a whole organisation) and the sequence number,
            after the commit; waits until all processes decide by it, if it is told to.
    """

    def __init__(
        self,
        store: Store,
        hasher: Hasher,
        check_keys: CheckKeys,
        settings: Settings,
        clock: Callable[[], float],
        announce: Announce,
    ) -> None:
        self._store = store
        self._hasher = hasher
        self._check_keys = check_keys
        self._prefix = settings.prefix
        self._grantable = settings.grantable
        self._clock = clock
        self._announce = announce

    async def create(
        self,
        organization_id: str,
        name: str,
        *,
        permission: str = FULL,
        environment: str = LIVE,
        expires_at: int | None = None,
        by: Principal | None = None,
    ) -> Created:
        """Make a key.

        Args:
            organization_id: whose key it will be; a new organisation is made on the way.
            name: 1 to 100 characters, blanks around it are dropped.
            permission: one of the settings' `permissions`.
            environment: a word such as `live` or `test`.
            expires_at: milliseconds since the epoch, in the future; None: never.
            by: the caller's own key, whose rights bound those of the new key; None: the operator.

        Raises:
            InvalidValue: naming the argument at fault.
            NotPermitted: the new key would have more rights than `by`.
            HashingBusy, StoreUnavailable: nothing was made.
        """
        draft = Draft(organization_id, name, permission, environment, expires_at)
        for fault in self.faults(draft):
            raise fault
        if by is not None:
            _check_rights(by, permission, environment)
        created = self._mint(draft, self._now_ms())
        await self._store.add(created.record, await self._hasher.hash(created.token))
        return created

    async def create_many(self, drafts: Sequence[Draft]) -> Sequence[Created]:
        """Make keys in one transaction: all of them, or none.

        A thousand at a time is plenty: every other change waits for the transaction.

        Raises:
            InvalidValue: naming the argument at fault of one of them; nothing was made.
            HashingFailed: nothing was made.
            StoreUnavailable: as a rule nothing was made, and if it was, nobody has the tokens.
        """
        if not drafts:
            return []
        for draft in drafts:
            for fault in self.faults(draft):
                raise fault
        now_ms = self._now_ms()
        created = await asyncio.to_thread(lambda: [self._mint(draft, now_ms) for draft in drafts])
        hashes = await self._hasher.hash_all([each.token for each in created])
        records = [each.record for each in created]
        await self._store.add_many(list(zip(records, hashes, strict=True)))
        return created

    async def bring_many(self, asked: Sequence[tuple[Draft, Foreign]]) -> Sequence[Brought]:
        """Take keys in that were made elsewhere, in one transaction, and return when every process
        knows that there are such keys. Those that are here already stay as they are: a deleted one
        stays deleted.

        Raises:
            InvalidValue: naming the argument at fault of one of them; nothing was taken in.
            HashingFailed: nothing was taken in.
            StoreUnavailable: as a rule nothing was taken in; it can be repeated.
        """
        if not asked:
            return []
        for draft, _ in asked:
            for fault in self.faults(draft):
                raise fault
        now_ms = self._now_ms()
        raw = [foreign.token for _, foreign in asked if foreign.token is not None]
        fresh = iter(await self._hasher.hash_all(raw))
        made = await asyncio.to_thread(
            lambda: [
                (self._brought(draft, foreign, now_ms), foreign.hash or next(fresh))
                for draft, foreign in asked
            ]
        )
        seq, held = await self._store.bring_many(made)
        await self._announce(None, seq, True)
        told = []
        for record, _ in made:
            key_id, is_deleted = held.get(str(record.locator), (record.id, False))
            told.append(Brought(key_id, key_id == record.id, is_deleted))
        return told

    async def held(self, asked: Sequence[Foreign]) -> Sequence[Brought]:
        """Which of them are here already; `key_id` is empty for those that are not."""
        held = await self._store.holders([foreign.locator for foreign in asked])
        return [
            Brought(held[each.locator][0], False, held[each.locator][1])
            if each.locator in held
            else Brought("")
            for each in asked
        ]

    def _brought(self, draft: Draft, foreign: Foreign, now_ms: int) -> KeyRecord:
        minted = self._mint(draft, now_ms).record  # for its id; nobody gets its token
        return replace(minted, partial_token=foreign.partial, locator=foreign.locator)

    async def made_many(self) -> None:
        """To be called when many were made: lists stay quick on a database that knows of them."""
        await self._store.analyze()

    def faults(self, draft: Draft) -> list[InvalidValue]:
        """Everything that is wrong with a key to be made."""
        checks: list[Callable[[], object]] = [
            lambda: _check_form("organization", ORGANIZATION_PATTERN, draft.organization_id),
            lambda: _check_form("environment", ENVIRONMENT_PATTERN, draft.environment),
            lambda: checked_name(draft.name),
            lambda: self._check_permission(draft.permission),
            lambda: self._check_expiry(draft.expires_at, self._now_ms()),
        ]
        found = []
        for check in checks:
            try:
                check()
            except InvalidValue as fault:
                found.append(fault)
        return found

    def _mint(self, draft: Draft, now_ms: int) -> Created:
        token = self._check_keys.mint(self._prefix, draft.environment)
        record = KeyRecord(
            id=token.key_id,
            organization_id=draft.organization_id,
            name=draft.name.strip(),
            permission=draft.permission,
            environment=draft.environment,
            partial_token=token.partial,
            active=True,
            organization_active=True,
            created_at=now_ms,
            updated_at=now_ms,
            expires_at=draft.expires_at,
        )
        return Created(record, token)

    async def list(
        self, organization_id: str, *, newest_first: bool = True, deleted: bool = False
    ) -> list[KeyRecord]:
        """The organisation's keys in the order of their creation; deleted ones if asked for."""
        return await self._store.list(organization_id, newest_first=newest_first, deleted=deleted)

    async def page(
        self,
        organization_id: str,
        limit: int,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        after: int | None = None,
    ) -> Page:
        """At most `limit` keys of that list, from where another page `goes_on_after`."""
        return await self._store.page(
            organization_id, limit, newest_first=newest_first, deleted=deleted, after=after
        )

    def pages(
        self,
        organization_id: str,
        *,
        newest_first: bool = True,
        deleted: bool = False,
        after: int | None = None,
    ) -> AsyncIterator[Page]:
        """That list page by page, for those that are long."""
        return self._store.pages(
            organization_id, newest_first=newest_first, deleted=deleted, after=after
        )

    async def get(self, organization_id: str, key_id: str) -> KeyRecord | None:
        """The key, deleted or not; None where the organisation has no such key."""
        return await self._store.get(organization_id, key_id)

    async def change(
        self,
        organization_id: str,
        key_id: str,
        *,
        by: Principal | None = None,
        wait: bool = True,
        **values: Any,
    ) -> Changed | None:
        """Change `name`, `active`, `permission` or `expires_at` of a key that is not deleted.

        Returns:
            the key after it, a deleted key as it is, or None where there is no such key.

        Raises:
            InvalidValue: naming the argument at fault.
            NotPermitted: the key would have more rights than `by`.
            StoreUnavailable: nothing was changed.
        """
        if "name" in values:
            values["name"] = checked_name(values["name"])
        if "permission" in values:
            self._check_permission(values["permission"])
        if "expires_at" in values:
            self._check_expiry(values["expires_at"], self._now_ms())
        if not await self._may_touch(organization_id, key_id, by, values.get("permission")):
            return None
        return await self._change(organization_id, key_id, values, wait)

    async def delete(
        self,
        organization_id: str,
        key_id: str,
        *,
        by: Principal | None = None,
        wait: bool = True,
    ) -> Changed | None:
        """Revoke a key, finally. Repeating it changes nothing.

        Args:
            organization_id: whose key it is.
            key_id: which key.
            by: the caller's own key; None: the operator.
            wait: return only when no process accepts it any more; False: right after the commit,
                with a receipt that bounds how long it may take.

        Returns:
            the deleted key, or None where the organisation has no such key.

        Raises:
            NotPermitted: the key is for an environment that `by` does not reach.
            StoreUnavailable: it may not have been revoked; repeat it.
        """
        if not await self._may_touch(organization_id, key_id, by):
            return None
        return await self._change(
            organization_id, key_id, {"active": False, "deleted_at": self._now_ms()}, wait
        )

    async def set_organization_active(
        self, organization_id: str, active: bool, *, wait: bool = True
    ) -> Receipt | None:
        """Disable an organisation with all of its keys, or enable it again.

        Returns:
            what is known of the change's spreading; None: no such organisation.
        """
        seq = await self._store.change_organization(organization_id, self._now_ms(), active)
        return None if seq is None else await self._announce(None, seq, wait)

    async def _may_touch(
        self,
        organization_id: str,
        key_id: str,
        by: Principal | None,
        permission: str | None = None,
    ) -> bool:
        """Whether the key is there; a key's environment never changes, so this holds later."""
        if by is None:
            return True
        record = await self._store.get(organization_id, key_id)
        if record is None:
            return False
        _check_rights(by, permission or by.permission, record.environment)
        return True

    async def _change(
        self, organization_id: str, key_id: str, values: dict[str, Any], wait: bool
    ) -> Changed | None:
        changed = await self._store.change(organization_id, key_id, self._now_ms(), values)
        if changed is None:
            return None
        record, seq = changed
        return Changed(record, await self._announce(record, seq, wait))

    def _check_permission(self, permission: str) -> None:
        if permission not in self._grantable:
            raise InvalidValue("permission", f"must be one of {', '.join(self._grantable)}")

    def _check_expiry(self, expires_at: int | None, now_ms: int) -> None:
        if expires_at is not None and expires_at <= now_ms:
            raise InvalidValue("expiresAt", "must lie in the future")

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def checked_name(name: str) -> str:
    """The name without blanks around it.

    Raises:
        InvalidValue: it is empty, too long, or holds control characters or a token.
    """
    name = name.strip()
    if not name:
        raise InvalidValue("name", "must not be empty or blank")
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidValue("name", f"must have at most {MAX_NAME_LENGTH} characters")
    is_plain = name.isascii() and name.isprintable()  # as most are
    if not is_plain and any(
        unicodedata.category(c) in _NAMELESS or c in _BIDI_CONTROLS for c in name
    ):
        raise InvalidValue("name", "must not hold control characters")
    if without_tokens(name) != name:
        raise InvalidValue("name", "must not hold a token: names are stored and shown")
    return name


def _check_form(field: str, pattern: str, value: str) -> None:
    if not re.fullmatch(pattern, value):
        raise InvalidValue(field, f"must match {pattern}")
    if without_tokens(value) != value:
        raise InvalidValue(field, "must not hold a token: it is stored and shown")


def _check_rights(by: Principal, permission: str, environment: str) -> None:
    """Nobody gives more than they have: neither another permission, nor a way into live."""
    if by.permission not in (FULL, permission):
        raise NotPermitted("a key cannot give more rights than its own")
    if by.environment not in (LIVE, environment):
        raise NotPermitted(f"a key for {by.environment} cannot touch one for {environment}")
