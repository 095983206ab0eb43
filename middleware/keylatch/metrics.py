"""The numbers of engines for Prometheus, through the registry of whoever wants them.

    REGISTRY.register(Collector(engine))

Nothing is registered here, and nothing is counted here either: the numbers are `meter`'s and the
parts' own, read when somebody scrapes. Labels have few values, all of them named in the code.
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
from keylatch.telemetry.meter import Histogram

Samples = Iterable[tuple[tuple[str, ...], float | Histogram]]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its name, what it says, its labels, and where its values are."""

    kind: type[CounterMetricFamily] | type[GaugeMetricFamily] | type[HistogramMetricFamily]
    name: str
    says: str
    labels: tuple[str, ...]
    read: Callable[[Engine], Samples]


def _one(read: Callable[[Engine], float | None]) -> Callable[[Engine], Samples]:
    def samples(engine: Engine) -> Samples:
        value = read(engine)
        return [] if value is None else [((), value)]

    return samples


def _decisions(engine: Engine) -> Samples:
    return [((said, tier), count) for said, tier, count in engine.meter.decisions()]


def _stages(engine: Engine) -> Samples:
    return [((name,), histogram) for name, histogram in engine.meter.stages.items()]


def _cached(engine: Engine) -> Samples:
    keys, absences = engine._l1.sizes()
    return [
        (("keys",), keys),
        (("absences",), absences),
        (("tombstones",), engine._feed.tombstones),
    ]


def _parts(engine: Engine) -> Samples:
    return [
        ((part.name,), float(part.state == "ok")) for part in engine.parts() if part.state != "off"
    ]


def _lease(read: Callable[[Lease], float]) -> Callable[[Engine], Samples]:
    def of(engine: Engine) -> float | None:
        is_started = engine._check_keys is not None
        witness = engine._witness
        return read(witness) if is_started and isinstance(witness, Lease) else None

    return _one(of)


def _redis(read: Callable[..., float]) -> Callable[[Engine], Samples]:
    return _one(lambda engine: None if engine._l2 is None else read(engine._l2))


def _pools(read: Callable[[Engine], Mapping[str, int]]) -> Callable[[Engine], Samples]:
    return lambda engine: [((name,), under_way) for name, under_way in read(engine).items()]


def _store_errors(engine: Engine) -> Samples:
    return [
        (("read",), engine.store.condition.failures.value),
        (("change",), engine.store.failed_changes.value),
    ]


COUNTER, GAUGE, HISTOGRAM = CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

FAMILIES: Final = (
    Family(
        COUNTER,
        "keylatch_decisions_total",
        "Requests judged: `allow` or the reason of the refusal, and by what was known where.",
        ("verdict", "tier"),
        _decisions,
    ),
    Family(
        HISTOGRAM,
        "keylatch_stage_seconds",
        "What the stages of a check took: of L1 hits 64 every few seconds, of headers one in 16.",
        ("stage",),
        _stages,
    ),
    Family(
        GAUGE,
        "keylatch_cached",
        "What this process remembers: keys, absences, tombstones.",
        ("what",),
        _cached,
    ),
    Family(
        GAUGE,
        "keylatch_part_ok",
        "1 while a part is as it should be: store, lease, redis, hashing, usage.",
        ("part",),
        _parts,
    ),
    Family(
        GAUGE,
        "keylatch_lease_age_seconds",
        "Since the process asked for its lease (PostgreSQL).",
        (),
        _lease(lambda lease: lease.age_seconds),
    ),
    Family(
        GAUGE,
        "keylatch_lease_left_seconds",
        "How long the process may still trust its caches; 0: not at all (PostgreSQL).",
        (),
        _lease(lambda lease: lease.seconds_left),
    ),
    Family(
        COUNTER,
        "keylatch_lease_deaths_total",
        "How often the process was taken for dead and had to join again (PostgreSQL).",
        (),
        _lease(lambda lease: lease.deaths.value),
    ),
    Family(
        HISTOGRAM,
        "keylatch_propagation_seconds",
        "From the commit of a change made here until no process decides against it any more.",
        (),
        lambda engine: [((), engine.meter.settled)],
    ),
    Family(
        COUNTER,
        "keylatch_accepted_after_revocation_total",
        "Keys found to have been let in after a change that the process could know: must stay 0.",
        (),
        _one(lambda engine: engine.meter.late.value),
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
        "keylatch_hashes_under_way",
        "Hashes that are being computed or wait for it.",
        (),
        _one(lambda engine: engine.hasher.under_way),
    ),
    Family(
        GAUGE,
        "keylatch_hash_pool",
        "The same by what it is for: checks, imported (tokens), management, upgrades (of hashes).",
        ("pool",),
        _pools(lambda engine: engine.hasher.pools()),
    ),
    Family(
        COUNTER,
        "keylatch_hashes_rejected_total",
        "Hashes of checks refused because the queue was full; each of them is a 503.",
        (),
        _one(lambda engine: engine.hasher.condition.failures.value),
    ),
    Family(
        GAUGE,
        "keylatch_redis_breaker_open",
        "1 while Redis is not asked because it did not answer.",
        (),
        _redis(lambda shared: float(shared.breaker.is_open)),
    ),
    Family(
        COUNTER,
        "keylatch_redis_errors_total",
        "Calls to Redis that failed or took too long.",
        (),
        _redis(lambda shared: shared.breaker.condition.failures.value),
    ),
    Family(
        COUNTER,
        "keylatch_redis_forged_total",
        "Values in Redis that keylatch did not write, or not with this store's pepper.",
        (),
        _redis(lambda shared: shared.forged.value),
    ),
    Family(
        GAUGE,
        "keylatch_uses_waiting",
        "Keys whose last use is not stored yet.",
        (),
        _one(lambda engine: engine._usage.waiting),
    ),
    Family(
        COUNTER,
        "keylatch_uses_lost_total",
        "Uses that were not noted because too many keys waited.",
        (),
        _one(lambda engine: engine._usage.lost),
    ),
    Family(
        COUNTER,
        "keylatch_store_errors_total",
        "Questions and changes that the store did not answer.",
        ("kind",),
        _store_errors,
    ),
    Family(
        GAUGE,
        "keylatch_store_pool",
        "Work under way: checks, reads, writes (SQLite); checks, management (PostgreSQL).",
        ("pool",),
        _pools(lambda engine: engine.store.pools()),
    ),
    Family(
        COUNTER,
        "keylatch_changes_limited_total",
        "Changes by keys refused with 429: too many hashes at once, changes an hour, or keys.",
        ("limit",),
        lambda engine: [((name,), count.value) for name, count in engine.meter.limited.items()],
    ),
    Family(
        COUNTER,
        "keylatch_store_restored_total",
        "How often the store was found to be an older one: revoked keys may be alive again.",
        (),
        _one(lambda engine: engine.meter.restores.value),
    ),
    Family(
        GAUGE,
        "keylatch_connections_watched",
        "WebSockets that end with their key.",
        (),
        _one(lambda engine: engine._watch.watched),
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
            yield family.kind(family.name, family.says)

    def collect(self) -> Iterator[Metric]:
        """The numbers now."""
        for family in FAMILIES:
            metric: Any = family.kind(
                family.name, family.says, labels=(*self._label, *family.labels)
            )
            for name, engine in self._engines:
                for labels, value in family.read(engine):
                    if isinstance(value, Histogram):
                        buckets, total = value.read()
                        metric.add_metric([*name, *labels], buckets, total)
                    else:
                        metric.add_metric([*name, *labels], value)
            yield metric
