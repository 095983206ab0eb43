"""The real tools take the alerts: promtool reads them, and says of each when it comes."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from servers import needs
from test_monitoring import FOLDER, rules

Rule = dict[str, Any]


def promtool(*words: str | Path, text: str = "") -> tuple[int, str]:
    """How it ends, and all that it says."""
    program = needs(shutil.which("promtool"), "prometheus")
    done = subprocess.run([program, *words], input=text, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def measured_by(rule: Rule) -> str:
    """What an alert compares with its limit."""
    measured, sign, _ = rule["expr"].rsplit(" ", 2)
    assert sign in ("==", ">")
    return str(measured)


WRONG: dict[str, tuple[str, Callable[[Rule], Any]]] = {
    "never comes": ("expr", lambda rule: "vector(0) > 1"),
    "always comes": ("expr", lambda rule: measured_by(rule)),
    "comes at once": ("for", lambda rule: "0s"),
    "comes too late": ("for", lambda rule: "1h"),
    "says something else": ("annotations", lambda rule: {"summary": "Something."}),
}
"""What can be wrong with an alert: which part of its rule, and how that reads then."""


def failed_cases(folder: Path, part: str, spelled: Callable[[Rule], Any]) -> set[str]:
    """The alerts whose cases fail when every rule that has this part has another."""
    content = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            if part in rule:
                rule[part] = spelled(rule)
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
    part, spelled = WRONG[wrong]
    broken = {rule["alert"] for rule in rules() if part in rule}
    assert len(broken) > 4
    assert failed_cases(tmp_path, part, spelled) == broken
