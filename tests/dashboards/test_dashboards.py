"""Dashboards and alerts say the same as the table of metrics, and as what is committed."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest
import yaml

from dashboards.__main__ import ROOT, made
from dashboards.alerts import ALERTS, rules
from dashboards.grafana import SCHEMA_VERSION, to_json
from dashboards.panels import DASHBOARDS, Dashboard
from dashboards.queries import CLUSTER_LABEL, RELEASE_LABELS, selector
from kvmesh.cluster.telemetry import table
from kvmesh.cluster.telemetry.table import METRICS, RAY_LABELS, Metric
from tests.dashboards.promql import groupings, parse, selectors

BY_SAMPLE = {sample: metric for metric in METRICS for sample in metric.samples}
EXPRESSIONS = {
    f"{dashboard.name}: {panel.title} {number}": query.expr
    for dashboard in DASHBOARDS
    for panel in dashboard.panels
    for number, query in enumerate(panel.queries)
}
ADDED_UP = (
    table.GROUP_WANTED,
    table.LEASES,
    table.QUEUE_REQUESTS,
    table.TENANT_BYTES,
    table.TENANT_LIVE,
)
ALERTED = {alert.name: alert.expr for alert in ALERTS}


def labels_of(metric: Metric) -> set[str]:
    bucket = {"le"} if metric.buckets else set()
    return {*metric.label_names, *RAY_LABELS, CLUSTER_LABEL, *RELEASE_LABELS, *bucket}


@pytest.mark.parametrize("name", made(), ids=str)
def test_the_committed_files_are_current(name: Any) -> None:
    assert (ROOT / name).read_text("utf-8") == made()[name], "run `make dashboards`"


def test_there_are_no_other_files() -> None:
    found = {path.relative_to(ROOT) for path in (ROOT / "helm/kvmesh/files").glob("*/*.*")}
    assert found == {path for path in made() if path.parts[0] == "helm"}


@pytest.mark.parametrize("expr", (EXPRESSIONS | ALERTED).values(), ids=EXPRESSIONS | ALERTED)
def test_expressions_use_metrics_and_labels_of_the_table(expr: str) -> None:
    tree = parse(expr)
    found = list(selectors(tree))
    assert found
    for series in found:
        metric = BY_SAMPLE[series.name]
        used = {matcher.name for matcher in series.matchers.matchers}
        assert used <= labels_of(metric), f"{series.name} has no labels {used - labels_of(metric)}"
    for aggregation, kept in groupings(tree):
        for series in selectors(aggregation.expr):
            assert set(kept) <= labels_of(BY_SAMPLE[series.name])


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_in_a_panel(metric: Metric) -> None:
    shown = {series.name for expr in EXPRESSIONS.values() for series in selectors(parse(expr))}
    assert shown & set(metric.samples)


def test_a_label_that_a_metric_does_not_have_is_noticed() -> None:
    with pytest.raises(AssertionError, match="has no labels"):
        selector(table.LEASES, table.LEASES.exported, group="g")
    with pytest.raises(ValueError, match="unclosed"):
        parse("sum by (group (x)")


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_panels_can_be_imported(dashboard: Dashboard) -> None:
    model = json.loads(json.dumps(to_json(dashboard)))
    assert model["schemaVersion"] == SCHEMA_VERSION >= 39
    assert "id" not in model, "Grafana gives it"
    names = [variable["name"] for variable in model["templating"]["list"]]
    assert names == ["datasource", "cluster", *dashboard.variables]
    panels = model["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["type"] for panel in panels} <= {"row", "timeseries", "stat", "table"}
    for panel in panels:
        for target in panel.get("targets", ()):
            assert set(re.findall(r"\$(?!__)(\w+)", target["expr"])) <= {*names}
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            kept = {label for _, kept in groupings(parse(target["expr"])) for label in kept}
            assert legend <= kept, "a legend that is empty"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_panels_do_not_overlap(dashboard: Dashboard) -> None:
    places = [panel["gridPos"] for panel in to_json(dashboard)["panels"]]
    for place in places:
        assert place["x"] + place["w"] <= 24
    for a, b in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


@pytest.mark.parametrize("metric", ADDED_UP, ids=lambda metric: metric.name)
def test_what_routers_count_is_added_up_over_clusters(metric: Metric) -> None:
    """Groups of two clusters have the same names: a maximum would take two for one."""
    seen = 0
    for expr in EXPRESSIONS.values():
        for aggregation, kept in groupings(parse(expr)):
            about = {series.name for series in selectors(aggregation.expr)}
            if str(aggregation.op) == "max" and metric.exported in about:
                assert CLUSTER_LABEL in kept, expr
                seen += 1
    assert seen


def test_alerts_are_about_releases_whose_clusters_change_with_upgrades() -> None:
    for expr in ALERTED.values():
        for _, kept in groupings(parse(expr)):
            assert {*RELEASE_LABELS} <= {*kept} and CLUSTER_LABEL not in kept


def test_alerts_say_what_to_do() -> None:
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)
    for rule in rules()["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
        named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        kept = {x for _, kept in groupings(parse(rule["expr"])) for x in kept}
        assert named <= kept, "a summary that names nothing"


def test_the_rules_are_yaml_that_says_the_same() -> None:
    (text,) = [text for path, text in made().items() if path.suffix == ".yaml"]
    assert yaml.safe_load(text) == rules()
