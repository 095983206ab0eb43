"""Looks a token up: the store, then Redis, then the hash. It decides nothing.

A process reads every uncached key in the store. Redis can only save it the hash: see
`shared_cache`.

The law of this file: an error goes to the caller, and is not cached.

An imported token finds its key by its locators and not by an id, and Redis holds no such key. Only
the store can tell a forged one from a real one, so a bounded number is looked up at a time.
"""

import contextlib
from dataclasses import dataclass, field, replace
from typing import Final

from keylatch._background import EngineTasks
from keylatch.authentication.hashing import Hasher
from keylatch.caches.local_cache import Entry, NegativeEntry, entry_of
from keylatch.caches.shared_cache import SharedCache
from keylatch.core import imported_tokens
from keylatch.core.argon2id import has_digest_format
from keylatch.core.decisions import (
    PREVIOUS_SUFFIX,
    KeyRecord,
    Reason,
    secret_version_of,
    unusable_reason,
)
from keylatch.core.tokens import Token, is_native
from keylatch.errors import HashingBusy, KeylatchError, StoreUnavailable
from keylatch.revocation.freshness import Freshness
from keylatch.revocation.invalidations import Invalidations
from keylatch.storage.schema import NO_ID
from keylatch.storage.store import Found, NotFound, Store
from keylatch.telemetry.counters import HASH, L2, STORE
from keylatch.telemetry.events import Events

_MAX_IMPORTED_LOOKUPS: Final = 32
_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class Owner:
    """The key that a token belongs to.

    Args:
        record: of the key, whatever its state.
        is_usable: False: its secret is never accepted again, because the key was deleted, or
            rotated and the grace is over.
        is_previous: whether it is the secret before the last rotation.
    """

    record: KeyRecord
    is_usable: bool
    is_previous: bool = False

    @property
    def secret(self) -> int:
        """The version of the secret, see `secret_version_of`."""
        return secret_version_of(self.record, self.is_previous)


@dataclass(frozen=True, slots=True)
class _Secret:
    """An accepted secret of a key, as the store holds it.

    Args:
        name: the key's id, with `PREVIOUS_SUFFIX` for the secret before the last rotation.
        hash: of the token.
        is_previous: whether it is the secret before the last rotation.
    """

    name: str
    hash: str = field(repr=False)
    is_previous: bool = False


class Lookup:
    """Looks tokens up for one process.

    Args:
        store: an opened store.
        shared_cache: Redis, if it is configured.
        hasher: verifies hashes, and replaces outdated ones.
        invalidations: name the epoch under which Redis holds values.
        freshness: tells the time.
        environment: only its keys are accepted; None: the keys of all environments.
        tasks: run work that no request waits for.
        events: observe the duration of each stage.
    """

    def __init__(
        self,
        store: Store,
        shared_cache: SharedCache | None,
        hasher: Hasher,
        invalidations: Invalidations,
        freshness: Freshness,
        environment: str | None,
        tasks: EngineTasks,
        events: Events,
    ) -> None:
        self._store = store
        self._shared_cache = shared_cache
        self._hasher = hasher
        self._invalidations = invalidations
        self._freshness = freshness
        self._environment = environment
        self._tasks = tasks
        self._imported_lookups = 0  # in progress
        self._events = events

    async def fetch(self, token: Token) -> tuple[Entry | NegativeEntry, str]:
        """The cache entry for a token, and what verified its secret: `L2` or `STORE`.

        Raises:
            StoreUnavailable, HashingBusy, HashingFailed: it cannot be found out now.
        """
        if self._store.has_standby and is_native(token):
            with self._events.stage(STORE):
                on_standby = await self._find_on_standby(token)
            if on_standby is not None:
                entry, source = await self._judge(token, on_standby)
                if isinstance(entry, Entry):  # only the primary can tell that a token is not valid
                    return entry, source
        with self._events.stage(STORE):
            found = await self._find(token)
        entry, source = await self._judge(token, found)
        if isinstance(entry, NegativeEntry):
            # Only the server that grants a lease now can refuse: a primary that has been replaced
            # knows no keys and secrets that were created since.
            await self._freshness.poll()
        return entry, source

    async def _judge(
        self, token: Token, found: Found | NotFound
    ) -> tuple[Entry | NegativeEntry, str]:
        if isinstance(found, NotFound):
            # A token of another format names no key, whatever stands in place of an id.
            key_id = token.key_id if is_native(token) else NO_ID
            return NegativeEntry(Reason.UNKNOWN, key_id, NO_ID, found.as_of), STORE
        unusable = self._unusable(found)
        if unusable is not None:
            return unusable, STORE
        secret, source = await self._match_secret(token, self._valid_secrets(found))
        if secret is None:
            return _negative_entry(Reason.WRONG_SECRET, found), STORE
        # Again, because the key may have expired while the hash was computed.
        entry = entry_of(token.fingerprint, found.record, found.as_of, secret.is_previous)
        return self._unusable(found) or entry, source

    async def identify(self, token: Token) -> Owner | None:
        """The key whose secret this token is, whatever its state; None: there is none.

        Raises:
            StoreUnavailable, HashingBusy, HashingFailed: it cannot be found out now.
        """
        found = await self._find(token)
        if isinstance(found, NotFound):
            return None
        if await self._hasher.verify(found.hash, token):
            return Owner(found.record, found.record.deleted_at is None)
        if found.previous_hash is None:
            return None
        if not await self._hasher.verify(found.previous_hash, token):
            return None
        grace = found.record.grace_ends_at(self._freshness.now_ms())
        return Owner(found.record, found.record.deleted_at is None and grace is not None, True)

    def _valid_secrets(self, found: Found) -> list[_Secret]:
        """The current secret, and the previous one during its grace."""
        secrets = [_Secret(found.record.id, found.hash)]
        is_in_grace = found.record.grace_ends_at(self._freshness.now_ms()) is not None
        if found.previous_hash is not None and is_in_grace:
            name = found.record.id + PREVIOUS_SUFFIX
            secrets.append(_Secret(name, found.previous_hash, is_previous=True))
        return secrets

    async def _match_secret(
        self, token: Token, secrets: list[_Secret]
    ) -> tuple[_Secret | None, str]:
        """Which of the secrets the token is, and what verified it."""
        if self._shared_cache is not None and is_native(token):
            for secret in secrets:
                if has_digest_format(secret.hash) and await self._is_in_shared_cache(
                    self._shared_cache, token, secret
                ):
                    return secret, L2
        for secret in secrets:
            if await self._matches(secret, token):
                return secret, STORE
        return None, STORE

    async def _is_in_shared_cache(
        self, shared_cache: SharedCache, token: Token, secret: _Secret
    ) -> bool:
        with self._events.stage(L2):
            return await shared_cache.proves(
                token, secret.name, secret.hash, self._invalidations.epoch
            )

    async def _matches(self, secret: _Secret, token: Token) -> bool:
        with self._events.stage(HASH):
            verified = await self._hasher.verify(secret.hash, token)
        if not verified:
            return False
        if not secret.is_previous and self._hasher.needs_rehash(secret.hash):
            self._tasks.start_soon(self._rehash(token, secret.name, secret.hash))
        elif self._shared_cache is not None and is_native(token) and isinstance(verified, bytes):
            epoch = self._invalidations.epoch
            put = self._shared_cache.put(token, secret.name, secret.hash, verified, epoch)
            self._tasks.start_soon(put)
        return True

    async def _find(self, token: Token) -> Found | NotFound:
        """What the store has, with an `as_of` in the history that this process knows."""
        for _ in range(_ATTEMPTS):
            found = await self._find_in_any_history(token, self._invalidations.known.seq)
            as_of = self._invalidations.as_of(found.log)
            if as_of is not None:
                return replace(found, as_of=as_of)
            await self._freshness.poll()
        raise StoreUnavailable("the store and its log of changes are not the same server's")

    async def _find_on_standby(self, token: Token) -> Found | None:
        """The key as a standby has it, if that is its present state as far as is known here.

        A standby that was promoted, or that follows an old primary, has changes of its own. So its
        newest row must be one that was read here from the server that grants the leases.
        """
        found = await self._store.keys.find_on_standby(token.key_id)
        known = self._invalidations
        if found is None or found.as_of > known.seq or not known.is_known(found.log.position):
            return None
        record = found.record
        is_current = known.accepts(record.id, record.organization_id, found.as_of)
        return found if is_current else None

    async def _find_in_any_history(self, token: Token, anchor: int) -> Found | NotFound:
        if is_native(token):
            return await self._store.keys.find(token.key_id, anchor)
        if self._imported_lookups == _MAX_IMPORTED_LOOKUPS:
            raise HashingBusy(
                f"{_MAX_IMPORTED_LOOKUPS} lookups of imported tokens are under way: limit reached",
                "a client may be sending invalid tokens",
            )
        self._imported_lookups += 1
        try:
            return await self._store.keys.find_by_locator(imported_tokens.locators(token), anchor)
        finally:
            self._imported_lookups -= 1

    def _unusable(self, found: Found) -> NegativeEntry | None:
        """The reason why a key is not accepted, even with its secret."""
        reason = unusable_reason(found.record, self._freshness.now_ms(), self._environment)
        return None if reason is None else _negative_entry(reason, found)

    async def _rehash(self, token: Token, key_id: str, old: str) -> None:
        with contextlib.suppress(KeylatchError):  # the next use tries again
            await self._store.keys.replace_hash(key_id, old, await self._hasher.rehash(token))


def _negative_entry(reason: Reason, found: Found) -> NegativeEntry:
    return NegativeEntry(reason, found.record.id, found.record.organization_id, found.as_of)
