"""The alerts, by Prometheus' own tool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.__main__ import FILES, ROOT
from dashboards.alerts import ALERTS, Alert

RULES = ROOT / FILES / "alerts/kvmesh.yaml"
CASES = Path(__file__).with_name("alerts.yaml")
BY_NAME = {alert.name: alert for alert in ALERTS}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="needs promtool: apt install prometheus"
)


def cases() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(CASES.read_text("utf-8"))
    return found


def filled(alert: Alert, labels: dict[str, str]) -> dict[str, str]:
    """As Prometheus fills them in. A hung step is tested after a minute and a half."""
    summary = alert.summary.replace("{{ $value | humanizeDuration }}", "1m 30s")
    for name, value in labels.items():
        summary = summary.replace(f"{{{{ $labels.{name} }}}}", value)
    return {"summary": summary, "description": alert.action}


def promtool(*arguments: str | Path) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_rules_are_valid() -> None:
    promtool("check", "rules", RULES)


@needs_promtool
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    tests = cases() | {"rule_files": [str(RULES)]}
    for case in tests["tests"]:
        for expected in case["alert_rule_test"]:
            alert = BY_NAME[expected["alertname"]]
            for firing in expected["exp_alerts"]:
                firing["exp_annotations"] = filled(alert, firing["exp_labels"])
    path = tmp_path / "alerts.yaml"
    path.write_text(yaml.safe_dump(tests))
    promtool("test", "rules", path)


def test_each_alert_is_seen_to_fire_and_to_keep_quiet() -> None:
    fired: set[str] = set()
    quiet: set[str] = set()
    for case in cases()["tests"]:
        for expected in case["alert_rule_test"]:
            (fired if expected["exp_alerts"] else quiet).add(expected["alertname"])
    assert fired == quiet == BY_NAME.keys()
