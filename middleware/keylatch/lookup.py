"""Finding out what a token is: Redis, then the store, then argon2. It decides nothing.

An error anywhere on the way goes to the caller, and nothing is remembered of it.
"""

import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from keylatch.cache import Absence, Entry
from keylatch.errors import KeylatchError
from keylatch.feed import Feed, Witness
from keylatch.hashing import Hasher
from keylatch.meter import L2, STORE, Meter
from keylatch.model import KeyRecord, Reason, flaw
from keylatch.shared_cache import SharedCache, Told
from keylatch.store import Absent, Store
from keylatch.tokens import Token


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
        self._meter = meter

    async def fetch(self, token: Token) -> tuple[Entry | Absence, str]:
        """What the token is, by whoever knows it, and who that was: `meter.L2` or `meter.STORE`.

        Raises:
            StoreUnavailable, HashingBusy, HashingFailed: it cannot be found out now.
        """
        shared = await self._fetch_shared(token)
        return (shared, L2) if shared is not None else (await self._fetch_stored(token), STORE)

    async def _fetch_shared(self, token: Token) -> Entry | Absence | None:
        if self._shared is None:
            return None
        with self._meter.stage(L2):
            told = await self._shared.get(token, self._feed.epoch)
        if told is None:
            return None
        known = self._known(token, told.record, told.as_of) if isinstance(told, Told) else told
        await self._witness.catch_up()
        # What was read after all that this process has heard of is left to the store: it may
        # come from before a restore, when numbers were higher.
        fresh = known.as_of <= self._feed.seq and self._feed.accepts(
            known.key_id, known.organization_id, known.as_of
        )
        return known if fresh else None

    async def _fetch_stored(self, token: Token) -> Entry | Absence:
        with self._meter.stage(STORE):
            found = await self._store.find(token.key_id)
        if isinstance(found, Absent):
            return Absence(Reason.UNKNOWN, token.key_id, "", found.as_of)
        record = found.record
        known = self._known(token, record, found.as_of)
        if isinstance(known, Absence):
            return known
        with self._meter.stage("hash"):
            is_right = await self._hasher.verify(found.hash, token)
        if not is_right:
            return Absence(Reason.WRONG_SECRET, record.id, record.organization_id, found.as_of)
        if self._shared is not None:
            self._later(self._shared.put(token, record, found.as_of, self._feed.epoch))
        if self._hasher.is_outdated(found.hash):
            self._later(self._hash_anew(token, record.id, found.hash))
        return known

    def _known(self, token: Token, record: KeyRecord, as_of: int) -> Entry | Absence:
        """What the token is if its secret is right."""
        reason = flaw(record, self._witness.now_ms(), self._environment)
        if reason is not None:
            return Absence(reason, record.id, record.organization_id, as_of)
        return Entry(token.fingerprint, record, as_of)

    async def _hash_anew(self, token: Token, key_id: str, old: str) -> None:
        with contextlib.suppress(KeylatchError):  # the next use tries again
            await self._store.replace_hash(key_id, old, await self._hasher.hash(token))
