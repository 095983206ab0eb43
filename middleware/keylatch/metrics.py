"""A Prometheus collector for the metrics of one or several engines.

    REGISTRY.register(Collector(engine))

This module registers and counts nothing: it reads `Engine.stats()` at each scrape. Labels have few
values, all of them named in the code.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector as _Collector

from keylatch._stats import HistogramReading, LeaseStats, RedisStats, Stats
from keylatch.engine import Engine

Samples = Iterable[tuple[tuple[str, ...], float | HistogramReading]]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its type, name, help text and label names, and how its samples are read."""

    kind: type[CounterMetricFamily] | type[GaugeMetricFamily] | type[HistogramMetricFamily]
    name: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[Stats], Samples]


def _one(read: Callable[[Stats], float | None]) -> Callable[[Stats], Samples]:
    def samples(stats: Stats) -> Samples:
        value = read(stats)
        return [] if value is None else [((), value)]

    return samples


def _by_label(
    read: Callable[[Stats], Mapping[str, int] | Mapping[str, HistogramReading]],
) -> Callable[[Stats], Samples]:
    return lambda stats: [((label,), value) for label, value in read(stats).items()]


def _components(stats: Stats) -> Samples:
    return [
        ((component.name,), float(component.state == "ok"))
        for component in stats.components
        if component.state != "off"
    ]


def _lease(read: Callable[[LeaseStats], float]) -> Callable[[Stats], Samples]:
    return _one(lambda stats: None if stats.lease is None else read(stats.lease))


def _redis(read: Callable[[RedisStats], float]) -> Callable[[Stats], Samples]:
    return _one(lambda stats: None if stats.redis is None else read(stats.redis))


def _refusals(stats: Stats) -> Samples:
    refusals = {} if stats.redis is None else stats.redis.refusals
    return [((error,), value) for error, value in refusals.items()]


COUNTER, GAUGE, HISTOGRAM = CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

FAMILIES: Final = (
    Family(
        COUNTER,
        "keylatch_decisions_total",
        "Decisions on requests: `allow` or the reason for refusal, and the source of the decision.",
        ("decision", "source"),
        lambda stats: stats.decisions.items(),
    ),
    Family(
        HISTOGRAM,
        "keylatch_stage_seconds",
        "Duration of each stage of a check; sampled: 64 L1 hits every few seconds, 1 header in 16.",
        ("stage",),
        _by_label(lambda stats: stats.stages),
    ),
    Family(
        GAUGE,
        "keylatch_cache_entries",
        "Entries in this process's caches: keys, negative entries, tombstones.",
        ("type",),
        _by_label(lambda stats: stats.cached),
    ),
    Family(
        GAUGE,
        "keylatch_component_healthy",
        "1 while a component is healthy: store, lease, redis, notifier, hashing, usage.",
        ("component",),
        _components,
    ),
    Family(
        GAUGE,
        "keylatch_lease_age_seconds",
        "Time since the process requested its latest lease (PostgreSQL).",
        (),
        _lease(lambda lease: lease.age_seconds),
    ),
    Family(
        GAUGE,
        "keylatch_lease_left_seconds",
        "Time until the lease and with it the use of caches ends; 0: expired (PostgreSQL).",
        (),
        _lease(lambda lease: lease.seconds_left),
    ),
    Family(
        COUNTER,
        "keylatch_lease_membership_lost_total",
        "Times another process removed this process's lease membership (PostgreSQL).",
        (),
        _lease(lambda lease: lease.memberships_lost),
    ),
    Family(
        HISTOGRAM,
        "keylatch_propagation_seconds",
        "Time from the commit of a change made in this process until every process applies it.",
        (),
        lambda stats: [((), stats.propagation)],
    ),
    Family(
        COUNTER,
        "keylatch_accepted_after_revocation_total",
        "Keys accepted after a revocation or change that this process could know of: must stay 0.",
        (),
        _one(lambda stats: stats.accepted_after_revocation),
    ),
    Family(
        GAUGE,
        "keylatch_hashes_waiting",
        "Hashes that wait for a thread.",
        (),
        _one(lambda stats: stats.hashes_waiting),
    ),
    Family(
        GAUGE,
        "keylatch_hashes_in_progress",
        "Hashes computed or queued, by pool: checks, imported (tokens), management, upgrades.",
        ("pool",),
        _by_label(lambda stats: stats.hashes_in_progress),
    ),
    Family(
        COUNTER,
        "keylatch_hashes_rejected_total",
        "Checks rejected with 503 because the hash queue was full.",
        (),
        _one(lambda stats: stats.hashes_rejected),
    ),
    Family(
        GAUGE,
        "keylatch_redis_breaker_open",
        "1 while the circuit breaker for Redis is open.",
        (),
        _redis(lambda redis: float(redis.breaker_is_open)),
    ),
    Family(
        COUNTER,
        "keylatch_redis_errors_total",
        "Calls to Redis that failed or timed out.",
        (),
        _redis(lambda redis: redis.errors),
    ),
    Family(
        COUNTER,
        "keylatch_redis_refusals_total",
        "Commands that Redis answered with an error, by the first word of the reply.",
        ("error",),
        _refusals,
    ),
    Family(
        COUNTER,
        "keylatch_redis_forged_total",
        "Values read from Redis that had no valid MAC of this store, and were ignored.",
        (),
        _redis(lambda redis: redis.forged),
    ),
    Family(
        GAUGE,
        "keylatch_usage_pending",
        "Keys whose usage counts are not stored yet.",
        (),
        _one(lambda stats: stats.usage_pending),
    ),
    Family(
        COUNTER,
        "keylatch_usage_dropped_total",
        "Uses that were not counted because too many keys were pending.",
        (),
        _one(lambda stats: stats.usage_dropped),
    ),
    Family(
        COUNTER,
        "keylatch_store_errors_total",
        "Reads and writes that the store did not answer.",
        ("operation",),
        _by_label(lambda stats: stats.store_errors),
    ),
    Family(
        GAUGE,
        "keylatch_store_pool_in_progress",
        "Operations in progress: checks, reads, writes (SQLite); checks, management (PostgreSQL).",
        ("pool",),
        _by_label(lambda stats: stats.store_pools),
    ),
    Family(
        COUNTER,
        "keylatch_changes_limited_total",
        "Changes by keys refused with 429: too many hashes at once, changes an hour, or keys.",
        ("limit",),
        _by_label(lambda stats: stats.limited),
    ),
    Family(
        COUNTER,
        "keylatch_store_restored_total",
        "Times the store was found to have lost changes, by a failover or a restore from a backup.",
        (),
        _one(lambda stats: stats.restores),
    ),
    Family(
        GAUGE,
        "keylatch_open_websockets",
        "Open WebSockets that are closed when their key is revoked.",
        (),
        _one(lambda stats: stats.open_websockets),
    ),
)


class Collector(_Collector):
    """For a registry of `prometheus_client`, one per registry.

        Collector(engine)
        Collector(api=engine, console=other)

    Args:
        engine: its numbers are exported.
        named: several engines; the label `engine` has their names.
    """

    def __init__(self, engine: Engine | None = None, /, **named: Engine) -> None:
        if (engine is None) == (not named):
            raise ValueError("either one engine, or several by name")
        self._label = ("engine",) if named else ()
        self._engines: list[tuple[tuple[str, ...], Engine]] = [
            ((name,), each) for name, each in named.items()
        ]
        if engine is not None:
            self._engines.append(((), engine))

    def describe(self) -> Iterator[Metric]:
        """The names alone, so that the registry refuses a second collector at once."""
        for family in FAMILIES:
            yield family.kind(family.name, family.help)

    def collect(self) -> Iterator[Metric]:
        """The numbers now."""
        stats = [(name, engine.stats()) for name, engine in self._engines]
        for family in FAMILIES:
            metric: Any = family.kind(
                family.name, family.help, labels=(*self._label, *family.labels)
            )
            for name, each in stats:
                for labels, value in family.read(each):
                    values = value if isinstance(value, tuple) else (value,)
                    metric.add_metric([*name, *labels], *values)
            yield metric
