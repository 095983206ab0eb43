"""What was counted and the store may not know yet: bounded, and told in portions.

A portion that was told is told again in the same words until the store has answered, because it
knows a tally by its number; what comes meanwhile waits for the next one. Only the event loop that
flushes is here.
"""

import itertools
import logging
import secrets
from collections.abc import Mapping
from typing import Final, TypeVar

from keylatch.usage.tally import Client, Count, Tally

CAPACITY: Final = 50_000
"""Keys, and counts, that wait at most."""
_AT_ONCE: Final = 2_000  # in one transaction: changes of these keys wait for it

log = logging.getLogger("keylatch")

K = TypeVar("K")
V = TypeVar("V")
Told = tuple[Mapping[str, int], Tally]


class Unstored:
    """The uses of one process, on their way to the store."""

    def __init__(self) -> None:
        self.day = 0
        """The newest, since the epoch."""
        self.lost = 0
        """Uses that were not counted, because too many keys were waiting."""
        self._by = secrets.token_hex(16)
        self._number = 0
        self._told: Told | None = None
        self._uses: dict[str, int] = {}
        self._counts: dict[Count, int] = {}
        self._seen: dict[str, Client] = {}

    def use(self, key_id: str, used_at: int) -> None:
        """A key was used at that time, in milliseconds since the epoch."""
        if key_id in self._uses or len(self._uses) < CAPACITY:
            self._uses[key_id] = max(self._uses.get(key_id, 0), used_at)

    def count(self, what: Count, count: int) -> None:
        """So many uses more."""
        if what in self._counts or len(self._counts) < CAPACITY:
            if count:
                self._counts[what] = self._counts.get(what, 0) + count
        else:
            self.lose(count)

    def see(self, seen: Mapping[str, Client]) -> None:
        """Where keys were seen; those that are new may find no place."""
        for key_id, client in seen.items():
            if key_id in self._seen or len(self._seen) < CAPACITY:
                self._seen[key_id] = client

    def lose(self, count: int) -> None:
        """So many uses found no place."""
        if count:
            self.lost += count
            log.warning("%d uses are not counted: too many keys wait for the store", count)

    @property
    def is_empty(self) -> bool:
        """Whether the store knows everything."""
        return not (self._told or self._uses or self._counts or self._seen)

    @property
    def keys(self) -> int:
        """How many keys' last uses wait."""
        told = {} if self._told is None else self._told[0]
        return len({**told, **self._uses})

    def told(self) -> Told:
        """What to tell the store now: when keys were last used, and a tally."""
        if self._told is None:
            self._number += 1
            uses, self._uses = _parted(self._uses)
            counts, self._counts = _parted(self._counts)
            seen, self._seen = _parted(self._seen)
            self._told = (uses, Tally(self._by, self._number, self.day, counts, seen))
        return self._told

    def stored(self) -> None:
        """The store has answered."""
        self._told = None


def _parted(waiting: dict[K, V]) -> tuple[dict[K, V], dict[K, V]]:
    """A portion and the rest, in new ones: a dictionary keeps the size that it once had."""
    items = iter(waiting.items())
    return dict(itertools.islice(items, _AT_ONCE)), dict(items)
