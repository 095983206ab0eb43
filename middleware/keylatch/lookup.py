"""Finding out what a token is: Redis, then the store, then argon2. It decides nothing.

An error anywhere on the way goes to the caller, and nothing is remembered of it.

A token that was made elsewhere finds its key by its locators and not by an id, so Redis, which the
revoker overwrites by the id, is not asked about it. Nobody but the store can tell a made-up one
from a real one, so only some are looked up at a time.
"""

import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from keylatch import foreign
from keylatch.caches.cache import Absence, Entry, entry_of
from keylatch.caches.shared_cache import SharedCache, Told
from keylatch.errors import HashingBusy, KeylatchError
from keylatch.hashing import Hasher
from keylatch.model import KeyRecord, Reason, flaw, secret_of
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


class Lookup:
    """Looks tokens up for one process.

    Args:
        store: an opened store.
        shared: the shared cache, if there is one.
        hasher: verifies, and makes outdated hashes anew.
        feed: what has changed, to judge what Redis says.
        witness: keeps the feed current.
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
        """What the token is, by whoever knows it, and who that was: `meter.L2` or `meter.STORE`.

        Raises:
            StoreUnavailable, HashingBusy, HashingFailed: it cannot be found out now.
        """
        shared = await self._fetch_shared(token)
        return (shared, L2) if shared is not None else (await self._fetch_stored(token), STORE)

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
        if found.previous_hash is None or not await self._hasher.verify(found.previous_hash, token):
            return None
        grace = found.record.grace_ends_at(self._witness.now_ms())
        return Owner(found.record, found.record.deleted_at is None and grace is not None, True)

    async def _fetch_shared(self, token: Token) -> Entry | Absence | None:
        if self._shared is None or not is_native(token):
            return None
        with self._meter.stage(L2):
            told = await self._shared.get(token, self._feed.epoch)
        if told is None:
            return None
        known: Entry | Absence
        if isinstance(told, Told):
            known = self._known(token, told.record, told.as_of, told.is_previous)
        else:
            known = told
        await self._witness.catch_up()
        # What was read after all that this process has heard of is left to the store: it may
        # come from before a restore, when numbers were higher.
        fresh = known.as_of <= self._feed.seq and self._feed.accepts(
            known.key_id, known.organization_id, known.as_of
        )
        return known if fresh else None

    async def _fetch_stored(self, token: Token) -> Entry | Absence:
        with self._meter.stage(STORE):
            found = await self._found(token)
        if isinstance(found, Absent):
            # Of another shape, it names no key, whatever stands where an id would be.
            key_id = token.key_id if is_native(token) else NOBODY
            return Absence(Reason.UNKNOWN, key_id, NOBODY, found.as_of)
        record = found.record
        known = self._known(token, record, found.as_of)
        if isinstance(known, Absence):
            return known
        is_previous = False
        if not await self._fits(found.hash, token):
            is_previous = await self._is_previous(found, token)
            if not is_previous:
                return Absence(Reason.WRONG_SECRET, record.id, record.organization_id, found.as_of)
            known = self._known(token, record, found.as_of, is_previous)
        if self._shared is not None and is_native(token):
            self._later(self._shared.put(token, record, found.as_of, self._feed.epoch, is_previous))
        if not is_previous and self._hasher.is_outdated(found.hash):
            self._later(self._hash_anew(token, record.id, found.hash))
        return known

    async def _is_previous(self, found: Found, token: Token) -> bool:
        """Whether its secret is the one before the last rotation, and still good."""
        if found.previous_hash is None:
            return False
        if found.record.grace_ends_at(self._witness.now_ms()) is None:
            return False
        return await self._fits(found.previous_hash, token)

    async def _fits(self, hashed: str, token: Token) -> bool:
        with self._meter.stage("hash"):
            return await self._hasher.verify(hashed, token)

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

    def _known(
        self, token: Token, record: KeyRecord, as_of: int, is_previous: bool = False
    ) -> Entry | Absence:
        """What the token is if its secret is right."""
        reason = flaw(record, self._witness.now_ms(), self._environment)
        if reason is not None:
            return Absence(reason, record.id, record.organization_id, as_of)
        return entry_of(token.fingerprint, record, as_of, is_previous)

    async def _hash_anew(self, token: Token, key_id: str, old: str) -> None:
        with contextlib.suppress(KeylatchError):  # the next use tries again
            await self._store.replace_hash(key_id, old, await self._hasher.hash_anew(token))
