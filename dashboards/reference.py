"""docs/metrics.md, from the tables of metrics and alerts and the text in metrics.md.in."""

from __future__ import annotations

from pathlib import Path

from dashboards.alerts import ALERTS
from kvmesh.cluster.telemetry.table import METRICS, Metric

TEXT = Path(__file__).parent / "metrics.md.in"
TITLES = {"ingress": "Ingress", "router": "Router", "engine": "Engine"}


def page() -> str:
    return (
        TEXT.read_text("utf-8")
        .replace("@METRICS@", "\n".join(map(_section, TITLES)))
        .replace("@ALERTS@", _alerts())
    )


def _section(part: str) -> str:
    rows = "\n".join(_row(x) for x in METRICS if x.part.split(",")[0] == part)
    head = "| metric | kind | labels | what it is |\n|---|---|---|---|"
    return f"### {TITLES[part]}\n\n{head}\n{rows}\n"


def _row(metric: Metric) -> str:
    labels = "<br>".join(f"`{name}`: {text}" for name, text in (metric.labels or {}).items())
    text = metric.help
    if metric.buckets:
        text += f" (buckets from {metric.buckets[0]:g} to {metric.buckets[-1]:g})"
    return f"| `{metric.exported}` | {metric.kind.value} | {labels} | {text} |"


def _alerts() -> str:
    rows = [
        f"| {x.name} | {x.severity} | {x.hold} | {_plain(x.summary)} | {x.action} |" for x in ALERTS
    ]
    head = "| alert | severity | for | meaning | what to do |\n|---|---|---|---|---|"
    return "\n".join([head, *rows])


def _plain(text: str) -> str:
    """Without Prometheus' templates."""
    for template in ("{{ $labels.group }}", "{{ $labels.process }}"):
        text = text.replace(template, "…")
    return text.replace("{{ $value | humanizeDuration }}", "long")
