"""The dashboard, the alerts and the documents speak of metrics that exist, and of no others."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from keylatch.authentication.hashing import POOLS
from keylatch.caches.redis_client import CircuitBreaker
from keylatch.metrics import COUNTER, FAMILIES, HISTOGRAM
from keylatch.telemetry.counters import LIMITS, STAGES, Counters
from keylatch.telemetry.health import ComponentHealth

FOLDER = Path(__file__).parents[2] / "deploy/monitoring"
README = (FOLDER / "README.md").read_text()

_WORDS = {"rate", "increase", "sum", "min", "max", "by", "and"}
_WORDS |= {"histogram_quantile", "label_values"}
_OF_PROMETHEUS = {"job", "instance", "le", "worker"}
_SUFFIXES = ("_bucket", "_sum", "_count")


def names() -> set[str]:
    """Names of samples."""
    return {
        family.name + suffix
        for family in FAMILIES
        for suffix in (_SUFFIXES if family.kind is HISTOGRAM else ("",))
    }


def values() -> dict[str, set[str]]:
    """The labels, and the values that they can have."""
    decisions = list(Counters().decisions())
    return {
        "decision": {decision for decision, _, _ in decisions},
        "source": {source for _, source, _ in decisions},
        "stage": set(STAGES),
        "component": {"store", "lease", "redis", "notifier", "hashing", "usage"},
        "type": {"keys", "negative_entries", "tombstones"},
        "operation": {"read", "write"},
        "pool": {*POOLS, "checks", "reads", "writes"},
        "limit": set(LIMITS),
        "error": set(CircuitBreaker().refusals.counts()),
    }


def mistakes(expression: str) -> list[str]:
    """Names, labels and values in a PromQL expression that do not exist."""
    found = []
    for selector in re.findall(r"\{([^}]*)\}", expression):
        for label, value in re.findall(r'(\w+)\s*=~?\s*"([^"]*)"', selector):
            if label in _OF_PROMETHEUS:
                continue
            known = values().get(label)
            if known is None or not set(value.split("|")) <= known:
                found.append(f"{label}={value}")
    bare = re.sub(r'\{[^}]*\}|\[[^\]]*\]|"[^"]*"', "", expression)
    labels = set(values()) | _OF_PROMETHEUS
    for word in re.findall(r"[a-z_]\w*", bare):
        if word not in names() | _WORDS | labels:
            found.append(word)
    for rated in re.findall(r"(?:rate|increase)\((\w+)", expression):
        counters = {family.name for family in FAMILIES if family.kind is COUNTER}
        if rated not in counters and not rated.endswith(_SUFFIXES):
            found.append(f"rate of {rated}")
    return found


def rules() -> list[dict[str, Any]]:
    content = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


def expressions_of(panel: Any) -> Iterator[str]:
    """Every expression and query of the dashboard."""
    if isinstance(panel, dict):
        for name, value in panel.items():
            if name in ("expr", "query") and isinstance(value, str) and "keylatch" in value:
                yield value
            else:
                yield from expressions_of(value)
    elif isinstance(panel, list):
        for each in panel:
            yield from expressions_of(each)


def test_the_alerts_name_what_exists() -> None:
    """And say what is the matter."""
    for rule in rules():
        assert mistakes(rule["expr"]) == [], rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
    assert len({rule["alert"] for rule in rules()}) == len(rules())


@pytest.mark.parametrize(
    "metric",
    ["accepted_after_revocation_total", "lease_left_seconds", "redis_breaker_open"]
    + ["hashes_rejected_total", "usage_dropped_total", "store_restored_total"]
    + ['component_healthy{component="store"}'],
)
def test_every_urgent_condition_has_an_alert(metric: str) -> None:
    """There is an alert for every urgent condition."""
    assert any(f"keylatch_{metric}" in rule["expr"] for rule in rules())


def test_the_dashboard_names_what_exists() -> None:
    """Every panel; and every metric has a place on it."""
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    expressions = list(expressions_of(dashboard))
    assert len(expressions) > 20
    assert [mistake for expression in expressions for mistake in mistakes(expression)] == []
    shown = " ".join(expressions)
    assert [family.name for family in FAMILIES if family.name not in shown] == []
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "wrong",
    [
        "sum(keylatch_decision_total)",
        'keylatch_component_healthy{component="stores"}',
        "rate(keylatch_cache_entries[1m])",
    ]
    + ["sum by (tear) (keylatch_decisions_total)", 'keylatch_cache_entries{which="keys"}'],
)
def test_a_name_that_does_not_exist_would_be_noticed(wrong: str) -> None:
    """The twin: misspelled names, labels and values are found."""
    assert mistakes(wrong) != []


def test_the_documented_metrics_are_the_metrics() -> None:
    """Name, labels and meaning of each, and of no other."""
    rows = re.findall(r"^\| `(keylatch_\w+)` \| (.*?) ?\| (.*?) \|$", README, re.MULTILINE)
    assert rows == [
        (
            family.name,
            ", ".join(f"`{label}`" for label in family.labels),
            family.help.rstrip("."),
        )
        for family in FAMILIES
    ]
    metric_names = set(re.findall(r"`(keylatch_\w+)[`{]", README))
    assert metric_names <= {family.name for family in FAMILIES}
    for source in values()["source"]:
        assert f"`{source}`" in README


def test_parts_are_named_as_here() -> None:
    """The values of `component` are those of a real engine."""
    from keylatch.engine import Engine
    from keylatch.settings import Settings

    parts: list[ComponentHealth] = Engine(
        Settings.load(store="sqlite:////dev/null/x", redis="")
    ).components()
    assert {part.name for part in parts} == values()["component"]
