"""L1: what this process remembers, in two bounded maps. It holds digests, never tokens.

Keys that exist and tokens that fit none are kept apart, so a spray of bad tokens evicts no good
key. A key is found by the fingerprint of its token, which proves it at once, and by the token's
look-up part, which tells that another secret is wrong. Nothing here expires by being told so:
whether an entry may be used is asked of the `Feed` at each use, and whether its key has expired of
`judge`. Threads may share it: a hit takes no lock, because one that is preempted while holding a
lock makes all the others queue for it.
"""

import threading
import time
from collections.abc import Callable
from typing import Final

from cachetools import FIFOCache, TTLCache

from keylatch.model import Allow, KeyRecord, Reason, principal_of

_ABSENCES: Final = 4_096
_ABSENCE_SECONDS: Final = 10.0
_SECOND_CHANCES: Final = 16


class Use:
    """When a key was last used, and whether that is waiting to be stored: see `usage`."""

    __slots__ = ("is_waiting", "key_id", "used_at")

    def __init__(self, key_id: str) -> None:
        self.key_id = key_id
        self.used_at = 0.0
        self.is_waiting = False


class Entry(Use):
    """A key that was good when it was read, and whose secret was proven.

    Args:
        fingerprint: of its token.
        record: it had no flaw.
        as_of: the sequence number at which that was so.
    """

    __slots__ = ("allow", "as_of", "considered_at", "fingerprint", "state")

    def __init__(self, fingerprint: bytes, record: KeyRecord, as_of: int) -> None:
        super().__init__(record.id)
        self.fingerprint = fingerprint
        self.allow = Allow(principal_of(record), record.expires_at)
        self.as_of = as_of
        self.considered_at = 0.0  # when it was last spared, see `_Entries`
        self.state: object = None  # of the feed, by which it was last found to be true

    @property
    def organization_id(self) -> str:
        """Whose key it is."""
        return self.allow.principal.organization_id


class _Entries(FIFOCache[str, Entry]):
    """Least recently used, more or less: the oldest goes, unless it was used since it was last
    considered (second chance). So a hit leaves the order alone. Only a few get a second chance at
    a time: going through all of them would hold up the event loop."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.by_fingerprint: dict[bytes, Entry] = {}

    def __setitem__(self, look_up: str, entry: Entry) -> None:
        super().__setitem__(look_up, entry)
        self.by_fingerprint[entry.fingerprint] = entry

    def __delitem__(self, look_up: str) -> None:
        self.by_fingerprint.pop(self[look_up].fingerprint, None)
        super().__delitem__(look_up)

    def popitem(self) -> tuple[str, Entry]:
        for _ in range(_SECOND_CHANCES):
            look_up, entry = super().popitem()
            if entry.used_at == entry.considered_at:
                return look_up, entry
            entry.considered_at = entry.used_at
            self[look_up] = entry
        return super().popitem()


class Absence:
    """A token that is no usable key, and why."""

    __slots__ = ("as_of", "key_id", "organization_id", "reason")

    def __init__(self, reason: Reason, key_id: str, organization_id: str, as_of: int) -> None:
        self.reason = reason
        self.key_id = key_id
        self.organization_id = organization_id
        self.as_of = as_of


class Cache:
    """L1.

    Args:
        size: keys to remember.
        timer: seconds that never go back; a test moves it.
    """

    def __init__(self, size: int = 50_000, timer: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._timer = timer
        self.forget()

    def forget(self) -> None:
        """Begin anew, with a lock that nobody holds: in a forked child, a thread of the parent may
        have held the old one."""
        self._lock = threading.Lock()
        self._empty()

    def _empty(self) -> None:
        self._entries = _Entries(self._size)
        self._absences: TTLCache[bytes, Absence] = TTLCache(
            _ABSENCES, _ABSENCE_SECONDS, self._timer
        )
        self.proven = self._entries.by_fingerprint.get
        """The entry for a token's fingerprint, or None."""

    def entry(self, look_up: str) -> Entry | None:
        """The entry for a token's look-up part, or None."""
        try:
            return self._entries[look_up]
        except KeyError:
            return None

    def absence(self, fingerprint: bytes) -> Absence | None:
        """The absence for a token's fingerprint, or None."""
        with self._lock:
            return self._absences.get(fingerprint)

    def remember(self, look_up: str, entry: Entry) -> None:
        """Keep a key under its token's look-up part, and its fingerprint."""
        with self._lock:
            self._entries[look_up] = entry

    def remember_absence(self, look_up: str, fingerprint: bytes, absence: Absence) -> None:
        """Keep, for ten seconds at most, that a token is no usable key.

        Where that is the key's fault and not the token's, what was known of the key goes: a stale
        entry would hide the absence, and every check of a revoked key would ask the store.
        """
        with self._lock:
            self._absences[fingerprint] = absence
            if absence.reason is not Reason.WRONG_SECRET:
                self._entries.pop(look_up, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._empty()
