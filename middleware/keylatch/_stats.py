"""The health and the numbers of one engine: what readiness shows and `keylatch.metrics` exports.

The law of this file: it reads what the components have counted, and neither waits nor changes
anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from keylatch.authentication.hashing import Hasher
from keylatch.caches.local_cache import LocalCache
from keylatch.caches.shared_cache import SharedCache
from keylatch.revocation.freshness import Freshness
from keylatch.revocation.invalidations import Invalidations
from keylatch.revocation.lease import Lease
from keylatch.revocation.notifier import Notifier
from keylatch.revocation.open_connections import OpenConnections
from keylatch.storage.store import Store
from keylatch.telemetry.counters import Counters
from keylatch.telemetry.health import ComponentHealth
from keylatch.usage.recorder import UsageRecorder

HistogramReading: TypeAlias = tuple[list[tuple[str, float]], float]
"""Pairs of (bound, count of durations up to it), and the sum of all durations in seconds."""


@dataclass(frozen=True, slots=True)
class LeaseStats:
    """The lease of this process (PostgreSQL).

    Args:
        age_seconds: since the process requested its latest lease.
        seconds_left: until the lease expires; 0: expired.
        memberships_lost: how often another process removed this process's membership.
    """

    age_seconds: float
    seconds_left: float
    memberships_lost: int


@dataclass(frozen=True, slots=True)
class RedisStats:
    """The shared cache.

    Args:
        breaker_is_open: whether calls are skipped because of earlier failures.
        errors: calls that failed or timed out.
        forged: values read that had no valid MAC of this store.
        refusals: commands that Redis answered with an error, by the first word of the reply.
    """

    breaker_is_open: bool
    errors: int
    forged: int
    refusals: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Stats:
    """What one engine has counted since its process began.

    Args:
        decisions: (`allow` or the reason, source) → count.
        limited: changes by keys refused with 429, by limit.
        stages: durations of the stages of checks.
        propagation: durations from commit to the last acknowledgement.
        accepted_after_revocation: keys accepted although this process could know of the change.
        restores: how often the store was found to have lost changes, by a failover or a restore.
        cached: entries in the caches of this process, by type.
        components: health of the parts.
        lease: None: not started, or SQLite.
        redis: None: not configured, or not started.
        hashes_waiting: hashes that wait for a thread.
        hashes_in_progress: hashes computed or queued, by pool.
        hashes_rejected: checks that found the hash queue full.
        usage_pending: keys whose usage counts are not stored yet.
        usage_dropped: uses that were not counted.
        store_errors: by operation.
        store_pools: operations in progress, by pool.
        open_websockets: open WebSockets that are closed when their key is revoked.
    """

    decisions: Mapping[tuple[str, str], int]
    limited: Mapping[str, int]
    stages: Mapping[str, HistogramReading]
    propagation: HistogramReading
    accepted_after_revocation: int
    restores: int
    cached: Mapping[str, int]
    components: tuple[ComponentHealth, ...]
    lease: LeaseStats | None
    redis: RedisStats | None
    hashes_waiting: int
    hashes_in_progress: Mapping[str, int]
    hashes_rejected: int
    usage_pending: int
    usage_dropped: int
    store_errors: Mapping[str, int]
    store_pools: Mapping[str, int]
    open_websockets: int


class EngineStats:
    """Reads the health and the numbers of an engine's components.

    `failed_start` is the component that the last start lacked; None: none has failed, or the engine
    is started. `shared_cache` is None while Redis is not configured or the engine is not started;
    `notifier` is None on SQLite, and while the engine is not started.
    """

    def __init__(
        self,
        store: Store,
        hasher: Hasher,
        l1: LocalCache,
        invalidations: Invalidations,
        freshness: Freshness,
        usage: UsageRecorder,
        open_connections: OpenConnections,
        counters: Counters,
    ) -> None:
        self._store = store
        self._hasher = hasher
        self._l1 = l1
        self._invalidations = invalidations
        self._freshness = freshness
        self._usage = usage
        self._open_connections = open_connections
        self._counters = counters

    def components(
        self,
        is_started: bool,
        failed_start: ComponentHealth | None,
        shared_cache: SharedCache | None,
        notifier: Notifier | None,
    ) -> list[ComponentHealth]:
        """See `Engine.components`."""
        store = self._store.health.component_health(
            "store", "unavailable", "the store does not answer"
        )
        lease = self._freshness.component_health()
        if not is_started and failed_start is None and store.state == "ok":
            lease = ComponentHealth("lease", "off")
        if failed_start is not None:  # a store that answers may refuse what a start needs
            store, lease = (
                failed_start if each.name == failed_start.name and each.state == "ok" else each
                for each in (store, lease)
            )
        redis, notices = ComponentHealth("redis", "off"), ComponentHealth("notifier", "off")
        if shared_cache is not None:
            redis = shared_cache.breaker.component_health()
        if notifier is not None:
            notices = notifier.health.component_health(
                "notifier", "degraded", "notices are not received: changes wait for the next poll"
            )
        return [
            store,
            lease,
            redis,
            notices,
            self._hasher.health.component_health(
                "hashing", "degraded", "too many hashes are waiting"
            ),
            self._usage.health.component_health(
                "usage", "degraded", "usage counts wait for the store"
            ),
        ]

    def read(
        self,
        is_started: bool,
        failed_start: ComponentHealth | None,
        shared_cache: SharedCache | None,
        notifier: Notifier | None,
    ) -> Stats:
        """The numbers now."""
        counters, (keys, negative_entries) = self._counters, self._l1.sizes()
        return Stats(
            decisions={(what, source): count for what, source, count in counters.decisions()},
            limited={limit: count.value for limit, count in counters.limited.items()},
            stages={name: each.read() for name, each in counters.stages.items()},
            propagation=counters.propagation.read(),
            accepted_after_revocation=counters.accepted_after_revocation.value,
            restores=counters.restores.value,
            cached={
                "keys": keys,
                "negative_entries": negative_entries,
                "tombstones": self._invalidations.tombstone_count,
            },
            components=tuple(self.components(is_started, failed_start, shared_cache, notifier)),
            lease=self._lease_stats() if is_started else None,
            redis=None if shared_cache is None else _redis_stats(shared_cache),
            hashes_waiting=self._hasher.waiting,
            hashes_in_progress=self._hasher.in_progress(),
            hashes_rejected=self._hasher.health.failures.value,
            usage_pending=self._usage.pending,
            usage_dropped=self._usage.dropped,
            store_errors={
                "read": self._store.health.failures.value,
                "write": self._store.failed_writes.value,
            },
            store_pools=self._store.pools(),
            open_websockets=self._open_connections.count,
        )

    def _lease_stats(self) -> LeaseStats | None:
        lease = self._freshness
        if not isinstance(lease, Lease):
            return None
        return LeaseStats(lease.age_seconds, lease.seconds_left, lease.memberships_lost.value)


def _redis_stats(shared_cache: SharedCache) -> RedisStats:
    breaker = shared_cache.breaker
    return RedisStats(
        breaker.is_open,
        breaker.health.failures.value,
        shared_cache.forged.value,
        breaker.refusals.counts(),
    )
