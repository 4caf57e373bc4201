"""Dashboards as Grafana's JSON, to import by hand, by a sidecar or by provisioning."""

from __future__ import annotations

from typing import Any

from dashboards.panels import Dashboard, Panel
from dashboards.queries import CLUSTER_LABEL, Query
from kvmesh.cluster.telemetry import table

SCHEMA_VERSION = 39
WIDTH = 24
HEIGHTS = {"stat": 4, "table": 5, "timeseries": 8}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# What lists the values of a variable, by the label that it chooses.
LISTED_BY = {"group": table.GROUP_UP, "tenant": table.TENANT_REQUESTS}


def to_json(dashboard: Dashboard) -> dict[str, Any]:
    """The model that Grafana imports."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in dashboard.rows.items():
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": []})
        panels[-1] |= {"id": len(panels), "gridPos": _place(0, y, WIDTH, 1)}
        y += 1
        # At most three next to each other, in lines of equal height.
        across = min(len(row), 4 if row[0].kind == "stat" else 3)
        for at in range(0, len(row), across):
            line = row[at : at + across]
            height = max(HEIGHTS[panel.kind] for panel in line)
            width = WIDTH // len(line)
            for number, panel in enumerate(line):
                place = _place(number * width, y, width, height)
                panels.append(_panel(panel, len(panels) + 1, place))
            y += height
    return {
        "uid": f"kvmesh-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["kvmesh"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards",
                "title": "kvmesh",
                "tags": ["kvmesh"],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {"list": _variables(dashboard)},
        "panels": panels,
    }


def _variables(dashboard: Dashboard) -> list[dict[str, Any]]:
    datasource = {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "current": {},
    }
    cluster = _choice("cluster", f"label_values({table.GROUP_UP.exported}, {CLUSTER_LABEL})")
    return [datasource, cluster, *map(_label_choice, dashboard.variables)]


def _label_choice(label: str) -> dict[str, Any]:
    listed = f'{LISTED_BY[label].exported}{{{CLUSTER_LABEL}=~"$cluster"}}'
    return _choice(label, f"label_values({listed}, {label})")


def _choice(name: str, query: str) -> dict[str, Any]:
    return {
        "type": "query",
        "name": name,
        "label": name.capitalize(),
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        # Matches series without the label as well.
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom = {"fillOpacity": 10, "showPoints": "never", "spanNulls": False}
    if panel.stacked:
        custom |= {"fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}}
    made: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [_target(x, at, panel.kind == "table") for at, x in enumerate(panel.queries)],
    }
    if panel.kind == "timeseries":
        made["fieldConfig"]["defaults"]["custom"] = custom
        made["options"] = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    if panel.kind == "stat":
        made["options"] = {
            "reduceOptions": {"calcs": ["lastNotNull"]},
            "textMode": "value_and_name",
        }
    if panel.kind == "table":
        made["transformations"] = [
            {"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}}}
        ]
    return made


def _target(query: Query, at: int, is_table: bool) -> dict[str, Any]:
    shown = {"format": "table", "instant": True} if is_table else {"range": True}
    return {
        "refId": chr(ord("A") + at),
        "datasource": DATASOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        **shown,
    }


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}
