"""The real tools take what is in `deploy/monitoring`.

promtool reads the alerts and says of each when it comes; a Prometheus that is configured as the
README says scrapes a real sidecar, and has an answer to whatever dashboard and alerts ask.
"""

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.project.test_monitoring import FOLDER, README, expressions_of, rules
from tests.support.proxies import SidecarProcess, auth_header
from tests.support.raw_http import send
from tests.support.servers import (
    PostgresServer,
    PrometheusServer,
    RedisServer,
    eventually,
    free_port,
    require_program,
)

pytestmark = pytest.mark.long
Rule = dict[str, Any]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())


class Workers(SidecarProcess):
    """Two of them, with PostgreSQL and Redis, so that there is no metric that they lack."""

    def __init__(self, folder: Path, metrics_port: int, **settings: str) -> None:
        self._metrics_port = metrics_port
        self.metrics = f"127.0.0.1:{metrics_port}"
        super().__init__(folder, None, **settings)

    def _listen_arguments(self) -> list[str]:
        return [
            *super()._listen_arguments(),
            "--metrics-port",
            str(self._metrics_port),
            "--workers",
            "2",
        ]

    def page(self) -> str:
        return send(f"http://{self.metrics}", b"GET /metrics").body.decode()


class Watched:
    """A sidecar, its Redis, and the Prometheus that watches it."""

    def __init__(self, sidecar: Workers, redis: RedisServer, prometheus: PrometheusServer) -> None:
        self.sidecar = sidecar
        self.redis = redis
        self.prometheus = prometheus
        self._known = auth_header(sidecar.create())

    def use(self) -> None:
        """Ask with a key that was used before."""
        assert self.sidecar.decision(self._known).status == 200

    def use_another(self) -> None:
        """Send a request with a new key, uncached in all workers: it needs Redis and the store."""
        assert self.sidecar.decision(auth_header(self.sidecar.create())).status == 200

    def series(self, expression: str) -> list[dict[str, str]]:
        """Of what Grafana asks for this job and this instance, with other variables' values."""
        escaped = re.escape(self.sidecar.metrics).replace("\\", "\\\\")
        values = {"$__rate_interval": "1m", "$job": "keylatch", "$instance": escaped}
        for variable, value in values.items():
            expression = expression.replace(variable, value)
        return self.prometheus.series(expression)

    def has_labels(self, expression: str, labels: set[str]) -> bool:
        """Whether there are series, and all have these labels."""
        series = self.series(expression)
        return bool(series) and all(labels <= set(each) for each in series)

    def alerts(self, part: str) -> dict[str, str]:
        """By name: each rule's `health` or `state`."""
        groups = self.prometheus.query("rules")["groups"]
        return {rule["name"]: rule[part] for group in groups for rule in group["rules"]}


def configuration(target: str) -> dict[str, Any]:
    """The README's, for another target and in a hurry."""
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block
    assert block[1].count("127.0.0.1:8702") == 1
    hurry = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    return {"global": hurry, **yaml.safe_load(block[1].replace("127.0.0.1:8702", target))}


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer
) -> Iterator[Watched]:
    """One for all tests here. Prometheus looks for its targets 5 s after its start, however short
    the intervals are, so promtool has its turn meanwhile."""
    require_program(shutil.which("prometheus"), "prometheus")
    folder = tmp_path_factory.mktemp("watched")
    shutil.copy(FOLDER / "alerts.yaml", folder)
    with contextlib.ExitStack() as stack:
        redis = RedisServer(folder)
        stack.callback(redis.kill)
        port = free_port()
        prometheus = PrometheusServer(folder, configuration(f"127.0.0.1:{port}"))
        stack.callback(prometheus.kill)
        given = {"STORE": postgres.new_database(), "REDIS": redis.url}
        sidecar = Workers(folder, port, HASHER="argon2id", **given)  # or Redis is never used
        stack.callback(sidecar.close)
        stack.callback(sidecar.stop)
        yield Watched(sidecar, redis, prometheus)


@pytest.fixture(scope="module")
def watched(started: Watched) -> Watched:
    """Prometheus has seen the sidecar."""
    eventually(lambda: started.series("up == 1") != [])
    return started


# promtool


def promtool(*words: str | Path, text: str = "") -> tuple[int, str]:
    """How it ends, and all that it says."""
    program = require_program(shutil.which("promtool"), "prometheus")
    done = subprocess.run([program, *words], input=text, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_promtool_takes_the_page(started: Watched) -> None:
    """Of all workers, and without a word; a name against Prometheus' rules it would mention."""
    eventually(lambda: 'worker="1"' in started.sidecar.page())
    page = started.sidecar.page()
    assert promtool("check", "metrics", text=page) == (0, "")
    wrong = page.replace("keylatch_redis_errors_total", "keylatch_redis_errors")
    code, said = promtool("check", "metrics", text=wrong)
    assert (code, 'counter metrics should have "_total" suffix' in said) == (3, True), said


def measured_by(rule: Rule) -> list[str]:
    """What an alert compares with its limits."""
    compared = [part.rsplit(" ", 2) for part in rule["expr"].split(" and ")]
    assert all(sign in ("==", ">") for _, sign, _ in compared)
    return [measured for measured, _, _ in compared]


WRONG: dict[str, tuple[str, Callable[[Rule], Any]]] = {
    "never comes": ("expr", lambda rule: "vector(0) > 1"),
    "always comes": ("expr", lambda rule: " and ".join(measured_by(rule))),
    "comes at once": ("for", lambda rule: "0s"),
    "comes too late": ("for", lambda rule: "1h"),
    "says something else": ("annotations", lambda rule: {"summary": "Something."}),
}
"""What can be wrong with an alert: which part of its rule, and how that reads then."""


def failed_cases(folder: Path, part: str, change: Callable[[Rule], Any]) -> set[str]:
    """The alerts whose cases fail when every rule that has this part has another."""
    content = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            if part in rule:
                rule[part] = change(rule)
    (folder / "alerts.yaml").write_text(yaml.safe_dump(content))
    shutil.copy(FOLDER / "alerts_test.yaml", folder)
    _, said = promtool("test", "rules", folder / "alerts_test.yaml")
    return set(re.findall(r"alertname: (\w+), time:", said))


def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    """And finds nothing to criticise; an expression that it cannot read, it would."""
    alerts = FOLDER / "alerts.yaml"
    code, said = promtool("check", "rules", "--lint=all", "--lint-fatal", alerts)
    assert (code, f"SUCCESS: {len(rules())} rules found" in said) == (0, True), said
    broken = tmp_path / "alerts.yaml"
    broken.write_text(alerts.read_text().replace("sum by (job, instance)", "sum by job"))
    code, said = promtool("check", "rules", broken)
    assert (code, "could not parse expression" in said) == (1, True), said


def test_alerts_come_and_go_as_their_cases_say() -> None:
    """Those in `alerts_test.yaml`, which operators can run as well."""
    code, said = promtool("test", "rules", FOLDER / "alerts_test.yaml")
    assert (code, "SUCCESS" in said) == (0, True), said


@pytest.mark.parametrize("wrong", WRONG)
def test_no_alert_is_without_its_cases(wrong: str, tmp_path: Path) -> None:
    """The twin: break all alerts, and a case fails for each of them; a new one needs its own."""
    part, change = WRONG[wrong]
    broken = {rule["alert"] for rule in rules() if part in rule}
    assert len(broken) > 4
    assert failed_cases(tmp_path, part, change) == broken


# Prometheus


def spoken_of(text: str) -> set[str]:
    """The labels in a legend or an annotation."""
    return set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", text))


def queries() -> dict[str, set[str]]:
    """What panels show and alerts measure, and the labels that they speak of."""
    targets = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    shown = {target["expr"]: spoken_of(target["legendFormat"]) for target in targets}
    assert {each for each in expressions_of(DASHBOARD) if "label_values" not in each} == set(shown)
    measured = {
        part: spoken_of(str(rule["annotations"])) for rule in rules() for part in measured_by(rule)
    }
    return shown | measured


def test_whatever_is_asked_has_an_answer(watched: Watched) -> None:
    """Each panel and each alert reads series of a sidecar, with the labels that it speaks of."""
    left = queries()

    def are_answered() -> bool:
        watched.use()  # a rate above 0 takes uses between two scrapes
        for expression, labels in list(left.items()):
            if watched.has_labels(expression, labels):
                del left[expression]
        return not left

    with contextlib.suppress(AssertionError):  # what is left says more
        eventually(are_answered)
    assert left == {}


def test_a_wrong_query_would_have_no_series(watched: Watched) -> None:
    """The twin: a label, a value or a name that does not exist; a legend that has no label."""
    right = 'sum by (source) (rate(keylatch_decisions_total{job=~"$job",source="l1"}[5m]))'
    eventually(lambda: watched.has_labels(right, {"source"}))
    for old, new in {
        "job=": "jobb=",
        '"l1"': '"l11"',
        "ons_t": "on_t",
        "(source)": "(tear)",
    }.items():
        assert not watched.has_labels(right.replace(old, new), {"source"}), new
    with pytest.raises(pytest.fail.Exception, match="parse error"):
        watched.series(right.replace("[5m]", "[5 m"))


def test_the_dashboard_offers_what_can_be_chosen(watched: Watched) -> None:
    """Its variables have the values that the README's configuration makes."""
    offered = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            query = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert query
            matched = {"match[]": query[1].replace("$job", "keylatch")}
            offered[variable["name"]] = watched.prometheus.query(
                f"label/{query[2]}/values", **matched
            )
    assert offered == {"job": ["keylatch"], "instance": [watched.sidecar.metrics]}


def test_prometheus_evaluates_the_alerts(watched: Watched) -> None:
    """All of them, without an error; a healthy sidecar fires no alert."""
    names = {rule["alert"] for rule in rules()}
    eventually(lambda: set(watched.alerts("health").values()) == {"ok"})
    assert watched.alerts("health").keys() == names
    assert "firing" not in watched.alerts("state").values()
    for rule in rules():
        watched.series(rule["expr"])


def test_a_redis_that_dies_is_seen(watched: Watched) -> None:
    """From the sidecar's breaker to the alert, which waits its minute; and back."""

    def state() -> str:
        watched.use_another()
        return watched.alerts("state")["KeylatchRedisBreakerOpen"]

    eventually(lambda: state() == "inactive")
    watched.redis.kill()
    eventually(lambda: state() == "pending")
    watched.redis.start()
    eventually(lambda: state() == "inactive")
