"""Finding out what a token is: the store, then Redis, then argon2. It decides nothing.

What a process meets for the first time it reads in the store. Redis can only save it the hash: see
`shared_cache`.

An error anywhere on the way goes to the caller, and nothing is remembered of it.

A token that was made elsewhere finds its key by its locators and not by an id, and Redis knows
nothing of those. Only the store can tell a made-up one from a real one, so a bounded number is
looked up at a time.
"""

import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

from keylatch import foreign
from keylatch.argon2id import is_digested
from keylatch.caches.cache import Absence, Entry, entry_of
from keylatch.caches.shared_cache import SharedCache
from keylatch.errors import HashingBusy, KeylatchError
from keylatch.hashing import Hasher
from keylatch.model import PREVIOUS, KeyRecord, Reason, flaw, secret_of
from keylatch.revocation.feed import Feed, Witness
from keylatch.sql.schema import NOBODY
from keylatch.store import Absent, Found, Store
from keylatch.telemetry.meter import L2, STORE, Meter
from keylatch.tokens import Token, is_native

_MOST_FOREIGN: Final = 32


@dataclass(frozen=True, slots=True)
class Owner:
    """The key that a token belongs to.

    Args:
        record: of the key, whatever its state.
        is_of_use: False: its secret opens nothing and never will, because the key was deleted, or
            rotated and the grace is over.
        is_previous: whether it is the secret before the last rotation.
    """

    record: KeyRecord
    is_of_use: bool
    is_previous: bool = False

    @property
    def secret(self) -> int:
        """Which of the key's secrets it is."""
        return secret_of(self.record, self.is_previous)


@dataclass(frozen=True, slots=True)
class _Secret:
    """One that is good for a key, as the store holds it.

    Args:
        name: the key's id, or that with `PREVIOUS` behind it.
        hash: of it.
        is_previous: whether it is the one before the last rotation.
    """

    name: str
    hash: str = field(repr=False)
    is_previous: bool = False


class Lookup:
    """Looks tokens up for one process.

    Args:
        store: an opened store.
        shared: the shared cache, if there is one.
        hasher: verifies, and makes outdated hashes anew.
        feed: knows the store's epoch.
        witness: tells the time.
        environment: the only one whose keys are welcome; None: all of them.
        later: runs work that no request waits for.
        meter: counts how long that takes.
    """

    def __init__(
        self,
        store: Store,
        shared: SharedCache | None,
        hasher: Hasher,
        feed: Feed,
        witness: Witness,
        environment: str | None,
        later: Callable[[Coroutine[Any, Any, None]], None],
        meter: Meter,
    ) -> None:
        self._store = store
        self._shared = shared
        self._hasher = hasher
        self._feed = feed
        self._witness = witness
        self._environment = environment
        self._later = later
        self._foreign = 0  # being looked up
        self._meter = meter

    async def fetch(self, token: Token) -> tuple[Entry | Absence, str]:
        """What the token is, by the store, and what proved that: `meter.L2` or `meter.STORE`.

        Raises:
            StoreUnavailable, HashingBusy, HashingFailed: it cannot be found out now.
        """
        with self._meter.stage(STORE):
            found = await self._found(token)
        if isinstance(found, Absent):
            # Of another shape, it names no key, whatever stands where an id would be.
            key_id = token.key_id if is_native(token) else NOBODY
            return Absence(Reason.UNKNOWN, key_id, NOBODY, found.as_of), STORE
        flawed = self._flawed(found)
        if flawed is not None:
            return flawed, STORE
        secret, tier = await self._secret_of(token, self._secrets(found))
        if secret is None:
            return _absence(Reason.WRONG_SECRET, found), STORE
        # Once more: a hash takes its time, and the key may have expired meanwhile.
        entry = entry_of(token.fingerprint, found.record, found.as_of, secret.is_previous)
        return self._flawed(found) or entry, tier

    async def identify(self, token: Token) -> Owner | None:
        """The key whose secret this token is, whatever has become of it since; None: there is none.

        Raises:
            StoreUnavailable, HashingBusy, HashingFailed: it cannot be found out now.
        """
        found = await self._found(token)
        if isinstance(found, Absent):
            return None
        if await self._hasher.verify(found.hash, token):
            return Owner(found.record, found.record.deleted_at is None)
        if found.previous_hash is None:
            return None
        if not await self._hasher.verify(found.previous_hash, token):
            return None
        grace = found.record.grace_ends_at(self._witness.now_ms())
        return Owner(found.record, found.record.deleted_at is None and grace is not None, True)

    def _secrets(self, found: Found) -> list[_Secret]:
        """The present one, and while its grace runs the one before."""
        secrets = [_Secret(found.record.id, found.hash)]
        is_in_grace = found.record.grace_ends_at(self._witness.now_ms()) is not None
        if found.previous_hash is not None and is_in_grace:
            name = found.record.id + PREVIOUS
            secrets.append(_Secret(name, found.previous_hash, is_previous=True))
        return secrets

    async def _secret_of(self, token: Token, secrets: list[_Secret]) -> tuple[_Secret | None, str]:
        """Which of these a token is, and who proved it."""
        if self._shared is not None and is_native(token):
            for secret in secrets:
                if is_digested(secret.hash) and await self._is_shared(self._shared, token, secret):
                    return secret, L2
        for secret in secrets:
            if await self._fits(secret, token):
                return secret, STORE
        return None, STORE

    async def _is_shared(self, shared: SharedCache, token: Token, secret: _Secret) -> bool:
        with self._meter.stage(L2):
            return await shared.proves(token, secret.name, secret.hash, self._feed.epoch)

    async def _fits(self, secret: _Secret, token: Token) -> bool:
        with self._meter.stage("hash"):
            fit = await self._hasher.verify(secret.hash, token)
        if not fit:
            return False
        if not secret.is_previous and self._hasher.is_outdated(secret.hash):
            self._later(self._hash_anew(token, secret.name, secret.hash))
        elif self._shared is not None and is_native(token) and isinstance(fit, bytes):
            epoch = self._feed.epoch
            put = self._shared.put(token, secret.name, secret.hash, fit, epoch)
            self._later(put)
        return True

    async def _found(self, token: Token) -> Found | Absent:
        if is_native(token):
            return await self._store.find(token.key_id)
        if self._foreign == _MOST_FOREIGN:
            raise HashingBusy(
                f"{_MOST_FOREIGN} tokens that were made elsewhere are being looked up",
                "somebody may be sending made-up ones",
            )
        self._foreign += 1
        try:
            return await self._store.find_foreign(foreign.locators(token))
        finally:
            self._foreign -= 1

    def _flawed(self, found: Found) -> Absence | None:
        """Why a key opens nothing, even with its secret."""
        reason = flaw(found.record, self._witness.now_ms(), self._environment)
        return None if reason is None else _absence(reason, found)

    async def _hash_anew(self, token: Token, key_id: str, old: str) -> None:
        with contextlib.suppress(KeylatchError):  # the next use tries again
            await self._store.replace_hash(key_id, old, await self._hasher.hash_anew(token))


def _absence(reason: Reason, found: Found) -> Absence:
    return Absence(reason, found.record.id, found.record.organization_id, found.as_of)
