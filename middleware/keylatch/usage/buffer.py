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

from keylatch.storage.usage import Client, CountKey, UsageBatch

CAPACITY: Final = 50_000
"""Keys, and counts, that wait at most."""
_BATCH_SIZE: Final = 2_000  # in one transaction: changes of these keys wait for it

log = logging.getLogger("keylatch")

K = TypeVar("K")
V = TypeVar("V")
PendingWrite = tuple[Mapping[str, int], UsageBatch]


class UsageBuffer:
    """The uses of one process, on their way to the store."""

    def __init__(self) -> None:
        self.day = 0
        """The newest, since the epoch."""
        self.dropped = 0
        """Uses that were not counted, because too many keys were waiting."""
        self._process_id = secrets.token_hex(16)
        self._sequence = 0
        self._unacknowledged: PendingWrite | None = None
        self._last_used: dict[str, int] = {}
        self._counts: dict[CountKey, int] = {}
        self._clients: dict[str, Client] = {}

    def add_last_used(self, key_id: str, used_at: int) -> None:
        """A key was used at that time, in milliseconds since the epoch."""
        if key_id in self._last_used or len(self._last_used) < CAPACITY:
            self._last_used[key_id] = max(self._last_used.get(key_id, 0), used_at)

    def add_count(self, key: CountKey, count: int) -> None:
        """So many uses more."""
        if key in self._counts or len(self._counts) < CAPACITY:
            if count:
                self._counts[key] = self._counts.get(key, 0) + count
        else:
            self.drop(count)

    def add_clients(self, clients: Mapping[str, Client]) -> None:
        """Where keys were seen; those that are new may find no place."""
        for key_id, client in clients.items():
            if key_id in self._clients or len(self._clients) < CAPACITY:
                self._clients[key_id] = client

    def drop(self, count: int) -> None:
        """So many uses found no place."""
        if count:
            self.dropped += count
            log.warning("dropped %d uses from the usage counts: too many keys are pending", count)

    @property
    def is_empty(self) -> bool:
        """Whether the store knows everything."""
        return not (self._unacknowledged or self._last_used or self._counts or self._clients)

    @property
    def pending_keys(self) -> int:
        """How many keys' last uses wait."""
        unacknowledged = {} if self._unacknowledged is None else self._unacknowledged[0]
        return len({**unacknowledged, **self._last_used})

    def next_batch(self) -> PendingWrite:
        """What to tell the store now: when keys were last used, and a tally."""
        if self._unacknowledged is None:
            self._sequence += 1
            last_used, self._last_used = _split(self._last_used)
            counts, self._counts = _split(self._counts)
            clients, self._clients = _split(self._clients)
            self._unacknowledged = (
                last_used,
                UsageBatch(self._process_id, self._sequence, self.day, counts, clients),
            )
        return self._unacknowledged

    def mark_stored(self) -> None:
        """The store has answered."""
        self._unacknowledged = None


def _split(pending: dict[K, V]) -> tuple[dict[K, V], dict[K, V]]:
    """A portion and the rest, in new ones: a dictionary keeps the size that it once had."""
    items = iter(pending.items())
    return dict(itertools.islice(items, _BATCH_SIZE)), dict(items)
