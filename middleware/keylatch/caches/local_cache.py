"""L1: the cache of one process, two bounded maps. It holds digests, never tokens.

Entries of keys and negative entries are separate, so many invalid tokens evict no valid key. An
entry is found by the fingerprint of its token, which proves the secret, and by the id of its key,
which shows that another secret is wrong. While the grace of a rotation runs, a key has two entries.
An invalidation removes nothing here: each use asks `Invalidations` whether the entry may be used,
and `evaluate` whether the key has expired. The cache is thread-safe, and a hit takes no lock: a
thread that is preempted while it holds a lock makes all others wait.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from cachetools import TTLCache

from keylatch.core.decisions import PREVIOUS_SUFFIX, Allow, KeyRecord, Reason, principal_of

_MAX_NEGATIVE_ENTRIES: Final = 4_096
_NEGATIVE_TTL_SECONDS: Final = 10.0
_SECOND_CHANCES: Final = 16


class UsageCounter:
    """The last use of a key, and the counter of its uses until the next flush: see `usage`.

    The counter exists only while uses are pending: one for each entry would make L1 a sixth larger.
    """

    __slots__ = ("key_id", "steps", "used_at")

    def __init__(self, key_id: str) -> None:
        self.key_id = key_id
        self.used_at = 0.0
        self.steps: itertools.count[int] | None = None

    @property
    def secret_id(self) -> str:
        """The secret that was used: the key's id, with `PREVIOUS_SUFFIX` for the previous one."""
        return self.key_id


class Entry(UsageCounter):
    """A usable key whose secret was verified.

    Args:
        fingerprint: of its token.
        record: of the key, which was usable at `as_of`.
        as_of: the sequence number at which the record was read.
    """

    __slots__ = ("allow", "as_of", "considered_at", "fingerprint", "history", "version")

    def __init__(self, fingerprint: bytes, record: KeyRecord, as_of: int) -> None:
        super().__init__(record.id)
        self.fingerprint = fingerprint
        self.allow = Allow(principal_of(record), record.expires_at)
        self.as_of = as_of
        self.considered_at = 0.0  # `used_at` when it last got a second chance, see `_Entries`
        self.history: object = None  # of `Invalidations` before the record was read
        self.version: object = None  # of `Invalidations` when this entry was last validated

    @property
    def organization_id(self) -> str:
        return self.allow.principal.organization_id

    @property
    def grace_ends_at(self) -> int:
        """The end of a rotation's grace, in milliseconds since the epoch; 0: there is none."""
        return 0


class _RotatedEntry(Entry):
    """An entry of a key that was rotated with a grace. Few are, so only these hold its end."""

    __slots__ = ("_grace_ends_at",)

    def __init__(self, fingerprint: bytes, record: KeyRecord, as_of: int) -> None:
        super().__init__(fingerprint, record, as_of)
        self._grace_ends_at = record.previous_expires_at or 0

    @property
    def grace_ends_at(self) -> int:
        return self._grace_ends_at


class _PreviousSecretEntry(_RotatedEntry):
    """An entry for the secret before the rotation."""

    __slots__ = ("_secret_id",)

    def __init__(self, fingerprint: bytes, record: KeyRecord, as_of: int) -> None:
        super().__init__(fingerprint, record, as_of)
        self._secret_id = record.id + PREVIOUS_SUFFIX
        # The key itself may expire before the grace ends.
        ends_at = min(self._grace_ends_at, record.expires_at or self._grace_ends_at)
        self.allow = Allow(principal_of(record, is_previous=True), ends_at)

    @property
    def secret_id(self) -> str:
        return self._secret_id


def entry_of(fingerprint: bytes, record: KeyRecord, as_of: int, is_previous: bool = False) -> Entry:
    """An entry; `is_previous`: for the secret before the last rotation."""
    if record.previous_expires_at is None:
        return Entry(fingerprint, record, as_of)
    kind = _PreviousSecretEntry if is_previous else _RotatedEntry
    return kind(fingerprint, record, as_of)


class _Entries:
    """A bounded number of entries, by fingerprint and by secret id.

    Eviction is "second chance", an approximation of LRU: the oldest entry goes, unless it was used
    since it was last considered. So a hit does not change the order. One eviction gives a limited
    number of second chances, because a pass over all entries would block the event loop. Two
    dictionaries and a queue take half the memory of a cachetools cache with a second index.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: dict[str, Entry] = {}
        self._queue: deque[Entry] = deque()  # oldest first; may hold removed entries
        self.by_fingerprint: dict[bytes, Entry] = {}
        self.by_secret_id = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Add an entry in place of the one for the same secret."""
        self.remove(entry.secret_id)
        while len(self._entries) >= self._size:
            self._evict_one()
        self._entries[entry.secret_id] = self.by_fingerprint[entry.fingerprint] = entry
        self._queue.append(entry)
        if len(self._queue) > 2 * self._size:  # keys that change often leave many
            self._queue = deque(filter(self._is_live, self._queue))

    def remove(self, secret_id: str) -> None:
        entry = self._entries.pop(secret_id, None)
        # After a rotation, another entry may have taken the same fingerprint.
        if entry is not None and self.by_fingerprint.get(entry.fingerprint) is entry:
            del self.by_fingerprint[entry.fingerprint]

    def _evict_one(self) -> None:
        spared = 0
        while True:
            entry = self._queue.popleft()
            if not self._is_live(entry):
                continue
            if entry.used_at == entry.considered_at or spared == _SECOND_CHANCES:
                self.remove(entry.secret_id)
                return
            entry.considered_at = entry.used_at
            self._queue.append(entry)
            spared += 1

    def _is_live(self, entry: Entry) -> bool:
        return self._entries.get(entry.secret_id) is entry


class NegativeEntry:
    """A token that is not accepted (negative caching, RFC 2308).

    Args:
        reason: the reason for the refusal.
        key_id: the key that the token belongs to or names; empty: it names none.
        organization_id: of that key; empty: there is no such key.
        as_of: the sequence number at which that was read.
    """

    __slots__ = ("as_of", "history", "key_id", "organization_id", "reason")

    def __init__(self, reason: Reason, key_id: str, organization_id: str, as_of: int) -> None:
        self.reason = reason
        self.key_id = key_id
        self.organization_id = organization_id
        self.as_of = as_of
        self.history: object = None  # of `Invalidations` before that was read


class LocalCache:
    """L1.

    Args:
        size: the maximum number of entries of keys.
        timer: seconds, monotonic.
    """

    def __init__(self, size: int = 50_000, timer: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._timer = timer
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Clear the cache, with a new lock: a thread of the parent may have held the old one."""
        self._lock = threading.Lock()
        self._reset_entries()

    def _reset_entries(self) -> None:
        self._entries = _Entries(self._size)
        self._negative_entries: TTLCache[bytes, NegativeEntry] = TTLCache(
            _MAX_NEGATIVE_ENTRIES, _NEGATIVE_TTL_SECONDS, self._timer
        )
        self.by_fingerprint = self._entries.by_fingerprint.get
        """The entry for the fingerprint of a token, or None."""
        self.by_secret_id = self._entries.by_secret_id
        """The entry for a secret id, or None; the id of a key is that of its current secret."""

    def negative_entry(self, fingerprint: bytes) -> NegativeEntry | None:
        """The negative entry for the fingerprint of a token, or None."""
        with self._lock:
            return self._negative_entries.get(fingerprint)

    def add(self, entry: Entry) -> None:
        with self._lock:
            self._entries.add(entry)

    def add_negative(self, fingerprint: bytes, entry: NegativeEntry) -> None:
        """Add a negative entry, for at most ten seconds.

        If the key is unusable, and not only the secret wrong, the key's entries are removed: a
        stale entry would be found first, and every check of a revoked key would query the store.
        Entries that were read after this one stay.
        """
        with self._lock:
            self._negative_entries[fingerprint] = entry
            if entry.key_id and entry.reason is not Reason.WRONG_SECRET:
                self._remove_until(entry.as_of, entry.key_id)
                self._remove_until(entry.as_of, entry.key_id + PREVIOUS_SUFFIX)

    def _remove_until(self, as_of: int, secret_id: str) -> None:
        entry = self._entries.by_secret_id(secret_id)
        if entry is not None and entry.as_of <= as_of:
            self._entries.remove(secret_id)

    def sizes(self) -> tuple[int, int]:
        """The number of entries of keys, and of negative entries."""
        with self._lock:
            return len(self._entries), len(self._negative_entries)

    def clear(self) -> None:
        with self._lock:
            self._reset_entries()
