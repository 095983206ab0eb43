"""Usage that the store has not acknowledged: bounded, and written in batches.

A batch is written again unchanged until the store acknowledges it, because the store recognizes a
batch by its process id and sequence number. Usage that is recorded meanwhile goes into the next
batch. This module is not thread-safe: only the task that flushes uses it.
"""

import itertools
import logging
import secrets
from collections.abc import Mapping
from typing import Final, TypeVar

from keylatch.storage.usage import Client, CountKey, UsageBatch

CAPACITY: Final = 50_000
"""The maximum number of pending keys, and of pending counts."""
_BATCH_SIZE: Final = 2_000  # in one transaction, which blocks changes of these keys

log = logging.getLogger("keylatch")

K = TypeVar("K")
V = TypeVar("V")
PendingWrite = tuple[Mapping[str, int], UsageBatch]


class UsageBuffer:
    """The pending usage of one process."""

    def __init__(self) -> None:
        self.day = 0
        """Of the next batch, in days since the epoch."""
        self.dropped = 0
        """Uses that were not counted because too many keys were pending."""
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
        """Add uses of a key on a day, with their result."""
        if key in self._counts or len(self._counts) < CAPACITY:
            if count:
                self._counts[key] = self._counts.get(key, 0) + count
        else:
            self.drop(count)

    def add_clients(self, clients: Mapping[str, Client]) -> None:
        """Add the latest clients of keys; beyond `CAPACITY`, new keys are left out."""
        for key_id, client in clients.items():
            if key_id in self._clients or len(self._clients) < CAPACITY:
                self._clients[key_id] = client

    def drop(self, count: int) -> None:
        """Count uses that had no room."""
        if count:
            self.dropped += count
            log.warning("dropped %d uses from the usage counts: too many keys are pending", count)

    @property
    def is_empty(self) -> bool:
        """Whether the store has acknowledged everything."""
        return not (self._unacknowledged or self._last_used or self._counts or self._clients)

    @property
    def pending_keys(self) -> int:
        """The number of keys whose last use is pending."""
        unacknowledged = {} if self._unacknowledged is None else self._unacknowledged[0]
        return len({**unacknowledged, **self._last_used})

    def next_batch(self) -> PendingWrite:
        """The batch to write now: last uses (key id → milliseconds), and counts."""
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
        """The store has acknowledged the batch."""
        self._unacknowledged = None


def _split(pending: dict[K, V]) -> tuple[dict[K, V], dict[K, V]]:
    """One batch and the rest, in new dictionaries: a dictionary never releases its memory."""
    items = iter(pending.items())
    return dict(itertools.islice(items, _BATCH_SIZE)), dict(items)
