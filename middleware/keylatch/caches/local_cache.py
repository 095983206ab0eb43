"""L1: what this process remembers, in two bounded maps. It holds digests, never tokens.

Keys that exist and tokens that fit none are kept apart, so a spray of bad tokens evicts no good
key. A key is found by the fingerprint of its token, which proves it, and by its id, which tells
that another secret is wrong. While the grace of a rotation runs, a key has two entries. Nothing
here expires by being told so: each use asks `Invalidations` whether the entry may be used, and
`evaluate` whether its key has expired. Threads may share it: a hit takes no lock: a thread that
is preempted while holding a lock makes all the others queue.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from cachetools import TTLCache

from keylatch.core.decisions import PREVIOUS_SUFFIX, Allow, KeyRecord, Reason, principal_of

_MAX_NEGATIVE_ENTRIES: Final = 4_096
_NEGATIVE_TTL_SECONDS: Final = 10.0
_SECOND_CHANCES: Final = 16


class UsageCounter:
    """When a key was last used, and what counts its uses while they wait to be stored: see `usage`.
    A counter for each entry, needed or not, would make L1 a sixth larger.

    Args:
        key_id: the key.
    """

    __slots__ = ("key_id", "ticks", "used_at")

    def __init__(self, key_id: str) -> None:
        self.key_id = key_id
        self.used_at = 0.0
        self.ticks: itertools.count[int] | None = None

    @property
    def secret_id(self) -> str:
        """By which of the key's secrets: the key's id, or that with `PREVIOUS_SUFFIX` behind it."""
        return self.key_id


class Entry(UsageCounter):
    """A key that was good when it was read, and whose secret was proven.

    Args:
        fingerprint: of its token.
        record: it had no flaw.
        as_of: the sequence number at which that was so.
    """

    __slots__ = ("allow", "as_of", "considered_at", "fingerprint", "version")

    def __init__(self, fingerprint: bytes, record: KeyRecord, as_of: int) -> None:
        super().__init__(record.id)
        self.fingerprint = fingerprint
        self.allow = Allow(principal_of(record), record.expires_at)
        self.as_of = as_of
        self.considered_at = 0.0  # when it was last spared, see `_Entries`
        self.version: object = None  # of the feed, by which it was last found to be true

    @property
    def organization_id(self) -> str:
        """Whose key it is."""
        return self.allow.principal.organization_id

    @property
    def grace_ends_at(self) -> int:
        """Until when the key has another good secret, in milliseconds since the epoch."""
        return 0


class _RotatedEntry(Entry):
    """One of a key that was rotated with a grace. Few are, and 50,000 need not carry its end."""

    __slots__ = ("_grace_ends_at",)

    def __init__(self, fingerprint: bytes, record: KeyRecord, as_of: int) -> None:
        super().__init__(fingerprint, record, as_of)
        self._grace_ends_at = record.previous_expires_at or 0

    @property
    def grace_ends_at(self) -> int:
        return self._grace_ends_at


class _PreviousSecretEntry(_RotatedEntry):
    """Its secret is the one before the rotation."""

    __slots__ = ("_secret_id",)

    def __init__(self, fingerprint: bytes, record: KeyRecord, as_of: int) -> None:
        super().__init__(fingerprint, record, as_of)
        self._secret_id = record.id + PREVIOUS_SUFFIX
        self.allow = replace(self.allow, principal=principal_of(record, is_previous=True))
        # The key's own end may have been moved since.
        ends_at = min(self._grace_ends_at, record.expires_at or self._grace_ends_at)
        self.allow = replace(self.allow, expires_at=ends_at)

    @property
    def secret_id(self) -> str:
        return self._secret_id


def entry_of(fingerprint: bytes, record: KeyRecord, as_of: int, is_previous: bool = False) -> Entry:
    """An entry; `is_previous`: the secret is the one before the last rotation."""
    if record.previous_expires_at is None:
        return Entry(fingerprint, record, as_of)
    kind = _PreviousSecretEntry if is_previous else _RotatedEntry
    return kind(fingerprint, record, as_of)


class _Entries:
    """Keys by fingerprint and by id, a bounded number of them.

    Least recently used, more or less: the oldest goes, unless it was used since it was last
    considered (second chance). So a hit leaves the order alone. Only a few get a second chance at
    a time: going through all of them would hold up the event loop. Two plain dictionaries and a
    queue take half of what a cache of cachetools and a second index take, and there are 50,000.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: dict[str, Entry] = {}
        self._queue: deque[Entry] = deque()  # oldest first; who is gone already is passed over
        self.by_fingerprint: dict[bytes, Entry] = {}
        self.by_secret_id = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Keep a key; what was known of it goes."""
        self.remove(entry.secret_id)
        while len(self._entries) >= self._size:
            self._evict_one()
        self._entries[entry.secret_id] = self.by_fingerprint[entry.fingerprint] = entry
        self._queue.append(entry)
        if len(self._queue) > 2 * self._size:  # keys that change again and again leave many
            self._queue = deque(filter(self._is_live, self._queue))

    def remove(self, secret_id: str) -> None:
        """Forget a key, or its previous secret."""
        entry = self._entries.pop(secret_id, None)
        # After a rotation the same secret may have got another entry.
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
    """A token that is no usable key, and why.

    Args:
        reason: why.
        key_id: the key that it belongs to, or whose id it carries; empty: it names none.
        organization_id: whose key that is; empty: there is no such key.
        as_of: the sequence number at which that was so.
    """

    __slots__ = ("as_of", "key_id", "organization_id", "reason")

    def __init__(self, reason: Reason, key_id: str, organization_id: str, as_of: int) -> None:
        self.reason = reason
        self.key_id = key_id
        self.organization_id = organization_id
        self.as_of = as_of


class LocalCache:
    """L1.

    Args:
        size: keys to remember.
        timer: seconds that never go back; a test moves it.
    """

    def __init__(self, size: int = 50_000, timer: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._timer = timer
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Begin anew, with a lock that nobody holds: in a forked child, a thread of the parent may
        have held the old one."""
        self._lock = threading.Lock()
        self._reset_entries()

    def _reset_entries(self) -> None:
        self._entries = _Entries(self._size)
        self._negative_entries: TTLCache[bytes, NegativeEntry] = TTLCache(
            _MAX_NEGATIVE_ENTRIES, _NEGATIVE_TTL_SECONDS, self._timer
        )
        self.by_fingerprint = self._entries.by_fingerprint.get
        """The entry for a token's fingerprint, or None."""
        self.by_secret_id = self._entries.by_secret_id
        """The entry for a key's id and its present secret, or None."""

    def negative_entry(self, fingerprint: bytes) -> NegativeEntry | None:
        """The absence for a token's fingerprint, or None."""
        with self._lock:
            return self._negative_entries.get(fingerprint)

    def add(self, entry: Entry) -> None:
        """Keep a key."""
        with self._lock:
            self._entries.add(entry)

    def add_negative(self, fingerprint: bytes, entry: NegativeEntry) -> None:
        """Keep, for ten seconds at most, that a token is no usable key.

        Where that is the key's fault and not the token's, what was known of the key until then
        goes: a stale entry would hide the absence, and every check of a revoked key would ask the
        store. What was read later stays, however long the absence was on its way.
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
        """How many keys and how many absences are remembered."""
        with self._lock:
            return len(self._entries), len(self._negative_entries)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._reset_entries()
