"""L1: what this process remembers, in two bounded maps. It holds digests, never tokens.

Keys that exist and tokens that fit none are kept apart, so a spray of bad tokens evicts no good
key. Nothing here expires by being told so: whether an entry may be used is asked of the `Feed`
at each use, and whether its key has expired of `judge`. Threads may share it: a hit takes no lock,
because one that is preempted while holding a lock makes all the others queue for it.
"""

import threading
import time
from collections.abc import Callable
from typing import Final

from cachetools import FIFOCache, TTLCache

from keylatch.model import (
    Allow,
    KeyRecord,
    Principal,
    Reason,
    Verdict,
    Wanted,
    judge,
    principal_of,
)

_ABSENCES: Final = 4_096
_ABSENCE_SECONDS: Final = 10.0
_SECOND_CHANCES: Final = 16


class Entry:
    """A key whose secret was proven: the token has this digest."""

    __slots__ = (
        *("_allowed", "as_of", "digest", "key_id", "organization_id", "principal", "record"),
        "used",
    )

    def __init__(self, digest: bytes, record: KeyRecord, as_of: int) -> None:
        self.digest = digest
        self.key_id = record.id
        self.organization_id = record.organization_id
        self.record = record
        self.principal: Principal = principal_of(record)
        self.as_of = as_of
        self.used = False
        # One attribute: two threads that write two of them could marry one's question to the
        # other's answer.
        self._allowed: tuple[Wanted, Allow] | None = None

    def judge(self, wanted: Wanted, now_ms: int, environment: str | None) -> Verdict:
        """`model.judge`, remembering what it allowed last: only time can take that back."""
        record = self.record
        allowed = self._allowed
        if (
            allowed is not None
            and allowed[0] is wanted
            and (record.expires_at is None or now_ms < record.expires_at)
        ):
            return allowed[1]
        verdict = judge(record, self.principal, now_ms, environment, wanted)
        if isinstance(verdict, Allow):
            self._allowed = (wanted, verdict)
        return verdict


class _Entries(FIFOCache[str, Entry]):
    """Least recently used, more or less: the oldest goes, unless it was used since it was last
    considered (second chance). So a hit marks the entry and leaves the order alone. Only a few get
    a second chance at a time: going through all of them would hold up the event loop."""

    def popitem(self) -> tuple[str, Entry]:
        for _ in range(_SECOND_CHANCES):
            look_up, entry = super().popitem()
            if not entry.used:
                return look_up, entry
            entry.used = False
            super().__setitem__(look_up, entry)
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
        self._entries = _Entries(self._size)
        self._absences: TTLCache[bytes, Absence] = TTLCache(
            _ABSENCES, _ABSENCE_SECONDS, self._timer
        )

    def entry(self, look_up: str) -> Entry | None:
        """The entry for a token's look-up part, or None."""
        try:
            entry = self._entries[look_up]
        except KeyError:
            return None
        entry.used = True
        return entry

    def absence(self, digest: bytes) -> Absence | None:
        """The absence for a token's digest, or None."""
        with self._lock:
            return self._absences.get(digest)

    def remember(self, look_up: str, entry: Entry) -> None:
        """Keep a key under its token's look-up part."""
        with self._lock:
            self._entries[look_up] = entry

    def remember_absence(self, look_up: str, digest: bytes, absence: Absence) -> None:
        """Keep, for ten seconds at most, that a token is no usable key.

        Where that is the key's fault and not the token's, what was known of the key goes: a stale
        entry would hide the absence, and every check of a revoked key would ask the store.
        """
        with self._lock:
            self._absences[digest] = absence
            if absence.reason is not Reason.WRONG_SECRET:
                self._entries.pop(look_up, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._absences.clear()
