"""Freshness on SQLite: every check reads the store's sequence number, so the commit is the
invalidation. No process needs a notice, and a change waits for none: the lease period is 0.
"""

import threading
from collections.abc import Callable

from keylatch.errors import StoreUnavailable
from keylatch.revocation.invalidations import MAX_SEQ, Invalidations
from keylatch.storage.store import Store
from keylatch.telemetry.health import ComponentHealth


class SequenceFreshness:
    """See `keylatch.revocation.freshness.Freshness`.

    Args:
        store: on SQLite.
        invalidations: kept complete.
        clock: seconds since the Unix epoch.
    """

    def __init__(
        self, store: Store, invalidations: Invalidations, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._invalidations = invalidations
        self._clock = clock
        self._read_data_version = store.data_version  # called at every check
        self.clear()

    def clear(self) -> None:
        self._lock = threading.Lock()
        self._data_version: bytes | None = None

    def now_if_fresh(self) -> float | None:
        data_version = self._read_data_version()  # before the sequence number
        if (
            data_version is not None and data_version == self._data_version
        ) or self._try_revalidate():
            return self._clock() * 1000
        return None

    def component_health(self) -> ComponentHealth:
        return ComponentHealth("lease", "off")

    def is_fresh(self) -> bool:
        return self.now_if_fresh() is not None

    def _try_revalidate(self) -> bool:
        # One thread at a time: a thread that read an older state and applied it later would undo
        # what another one has applied.
        with self._lock:
            data_version = self._read_data_version()
            position = self._store.invalidations.position_nowait()
            if position is None:
                return False
            if position != self._invalidations.position:
                batch = self._store.invalidations.since_nowait(self._invalidations.seq)
                if batch is None:
                    return False
                self._invalidations.apply(batch)
            self._data_version = data_version
            return True

    async def begin(self) -> None:
        self._data_version = None
        self._invalidations.begin(await self._store.invalidations.since(MAX_SEQ))
        await self.revalidate()

    async def revalidate(self) -> None:
        if self.is_fresh():
            return
        await self._store.ping()  # on a thread, which may wait for a lock
        if not self.is_fresh():
            raise StoreUnavailable(
                "the store's sequence number cannot be read", "see the lines above"
            )

    async def poll(self) -> None:
        await self.revalidate()

    async def run(self) -> None:
        return None

    async def end(self) -> None:
        return None

    def now_ms(self) -> int:
        return int(self._clock() * 1000)
