"""The numbers of one engine at one moment: what `keylatch.metrics` exports."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from keylatch.telemetry.health import ComponentHealth

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
    """

    breaker_is_open: bool
    errors: int
    forged: int


@dataclass(frozen=True, slots=True)
class Stats:
    """What one engine has counted since its process began.

    Args:
        decisions: (`allow` or the reason, source) → count.
        limited: changes by keys refused with 429, by limit.
        stages: durations of the stages of checks.
        propagation: durations from commit to the last acknowledgement.
        accepted_after_revocation: keys accepted although this process could know of the change.
        restores: how often the store was found restored from a backup.
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
