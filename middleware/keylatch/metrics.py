"""A Prometheus collector for the metrics of one or several engines.

    REGISTRY.register(Collector(engine))

Nothing is registered here, and nothing is counted here: the numbers come from `Counters` and the
components, read at each scrape. Labels have few values, all of them named in the code.
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

from keylatch.engine import Engine
from keylatch.revocation.lease import Lease
from keylatch.telemetry.counters import Histogram

Samples = Iterable[tuple[tuple[str, ...], float | Histogram]]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its name, what it says, its labels, and where its values are."""

    kind: type[CounterMetricFamily] | type[GaugeMetricFamily] | type[HistogramMetricFamily]
    name: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[Engine], Samples]


def _one(read: Callable[[Engine], float | None]) -> Callable[[Engine], Samples]:
    def samples(engine: Engine) -> Samples:
        value = read(engine)
        return [] if value is None else [((), value)]

    return samples


def _decisions(engine: Engine) -> Samples:
    return [((decision, source), count) for decision, source, count in engine.counters.decisions()]


def _stages(engine: Engine) -> Samples:
    return [((name,), histogram) for name, histogram in engine.counters.stages.items()]


def _cache_entries(engine: Engine) -> Samples:
    keys, negative_entries = engine._l1.sizes()
    return [
        (("keys",), keys),
        (("negative_entries",), negative_entries),
        (("tombstones",), engine._invalidations.tombstone_count),
    ]


def _components(engine: Engine) -> Samples:
    return [
        ((component.name,), float(component.state == "ok"))
        for component in engine.components()
        if component.state != "off"
    ]


def _lease(read: Callable[[Lease], float]) -> Callable[[Engine], Samples]:
    def read_if_started(engine: Engine) -> float | None:
        is_started = engine._mac_keys is not None
        freshness = engine._freshness
        return read(freshness) if is_started and isinstance(freshness, Lease) else None

    return _one(read_if_started)


def _redis(read: Callable[..., float]) -> Callable[[Engine], Samples]:
    return _one(lambda engine: None if engine._l2 is None else read(engine._l2))


def _pools(read: Callable[[Engine], Mapping[str, int]]) -> Callable[[Engine], Samples]:
    return lambda engine: [((name,), in_progress) for name, in_progress in read(engine).items()]


def _store_errors(engine: Engine) -> Samples:
    return [
        (("read",), engine.store.health.failures.value),
        (("write",), engine.store.failed_writes.value),
    ]


COUNTER, GAUGE, HISTOGRAM = CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

FAMILIES: Final = (
    Family(
        COUNTER,
        "keylatch_decisions_total",
        "Decisions on requests: `allow` or the reason for refusal, and the source of the decision.",
        ("decision", "source"),
        _decisions,
    ),
    Family(
        HISTOGRAM,
        "keylatch_stage_seconds",
        "Duration of each stage of a check; sampled: 64 L1 hits every few seconds, 1 header in 16.",
        ("stage",),
        _stages,
    ),
    Family(
        GAUGE,
        "keylatch_cache_entries",
        "Entries in this process's caches: keys, negative entries, tombstones.",
        ("type",),
        _cache_entries,
    ),
    Family(
        GAUGE,
        "keylatch_component_healthy",
        "1 while a component is healthy: store, lease, redis, hashing, usage.",
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
        "Time until the lease expires and its caches may not be used; 0: expired (PostgreSQL).",
        (),
        _lease(lambda lease: lease.seconds_left),
    ),
    Family(
        COUNTER,
        "keylatch_lease_membership_lost_total",
        "Times another process removed this process's lease membership (PostgreSQL).",
        (),
        _lease(lambda lease: lease.memberships_lost.value),
    ),
    Family(
        HISTOGRAM,
        "keylatch_propagation_seconds",
        "Time from the commit of a change made in this process until every process applies it.",
        (),
        lambda engine: [((), engine.counters.propagation)],
    ),
    Family(
        COUNTER,
        "keylatch_accepted_after_revocation_total",
        "Keys accepted after a revocation or change that this process could know of: must stay 0.",
        (),
        _one(lambda engine: engine.counters.accepted_after_revocation.value),
    ),
    Family(
        GAUGE,
        "keylatch_hashes_waiting",
        "Hashes in the queue.",
        (),
        _one(lambda engine: engine.hasher.waiting),
    ),
    Family(
        GAUGE,
        "keylatch_hashes_in_progress",
        "Hashes being computed or queued.",
        (),
        _one(lambda engine: engine.hasher.in_flight),
    ),
    Family(
        GAUGE,
        "keylatch_hash_pool_in_progress",
        "Hashes computed or queued, by pool: checks, imported (tokens), management, upgrades.",
        ("pool",),
        _pools(lambda engine: engine.hasher.in_flight_by_pool()),
    ),
    Family(
        COUNTER,
        "keylatch_hashes_rejected_total",
        "Checks rejected with 503 because the hash queue was full.",
        (),
        _one(lambda engine: engine.hasher.health.failures.value),
    ),
    Family(
        GAUGE,
        "keylatch_redis_breaker_open",
        "1 while the circuit breaker for Redis is open.",
        (),
        _redis(lambda shared: float(shared.breaker.is_open)),
    ),
    Family(
        COUNTER,
        "keylatch_redis_errors_total",
        "Calls to Redis that failed or timed out.",
        (),
        _redis(lambda shared: shared.breaker.health.failures.value),
    ),
    Family(
        COUNTER,
        "keylatch_redis_forged_total",
        "Values in Redis without a valid MAC of this store.",
        (),
        _redis(lambda shared: shared.forged.value),
    ),
    Family(
        GAUGE,
        "keylatch_usage_pending",
        "Keys whose usage is not stored yet.",
        (),
        _one(lambda engine: engine._usage.pending),
    ),
    Family(
        COUNTER,
        "keylatch_usage_dropped_total",
        "Uses that were not counted because too many keys were pending.",
        (),
        _one(lambda engine: engine._usage.dropped),
    ),
    Family(
        COUNTER,
        "keylatch_store_errors_total",
        "Reads and writes that the store did not answer.",
        ("operation",),
        _store_errors,
    ),
    Family(
        GAUGE,
        "keylatch_store_pool_in_progress",
        "Operations in progress: checks, reads, writes (SQLite); checks, management (PostgreSQL).",
        ("pool",),
        _pools(lambda engine: engine.store.pools()),
    ),
    Family(
        COUNTER,
        "keylatch_changes_limited_total",
        "Changes by keys refused with 429: too many hashes at once, changes an hour, or keys.",
        ("limit",),
        lambda engine: [((name,), count.value) for name, count in engine.counters.limited.items()],
    ),
    Family(
        COUNTER,
        "keylatch_store_restored_total",
        "Times the store was found restored from a backup: revoked keys may be active again.",
        (),
        _one(lambda engine: engine.counters.restores.value),
    ),
    Family(
        GAUGE,
        "keylatch_open_websockets",
        "Open WebSockets that are closed when their key is revoked.",
        (),
        _one(lambda engine: engine._open_connections.count),
    ),
)


class Collector(_Collector):
    """For a registry of `prometheus_client`.

    One of them per registry: several engines are told apart by the label `engine`.

        Collector(api=engine, console=other)

    Args:
        engine: whose numbers they are.
        named: several engines by name.
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
        """The names alone: whoever registers two of them is told at once."""
        for family in FAMILIES:
            yield family.kind(family.name, family.help)

    def collect(self) -> Iterator[Metric]:
        """The numbers now."""
        for family in FAMILIES:
            metric: Any = family.kind(
                family.name, family.help, labels=(*self._label, *family.labels)
            )
            for name, engine in self._engines:
                for labels, value in family.read(engine):
                    if isinstance(value, Histogram):
                        buckets, total = value.read()
                        metric.add_metric([*name, *labels], buckets, total)
                    else:
                        metric.add_metric([*name, *labels], value)
            yield metric
