"""PromQL over the table of metrics, with Grafana's variables where the user chooses."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.cluster.telemetry.table import Kind, Metric

# KubeRay's label; without Kubernetes there is none, which `.*` matches as well.
CLUSTER_LABEL = "ray_io_cluster"
# A release of the chart, which outlives its clusters: an upgrade makes a second one.
NAME_LABEL = "kvmesh_io_name"
RELEASE_LABELS = ("namespace", NAME_LABEL)
CHOOSABLE = ("group", "tenant")
RATE_INTERVAL = "$__rate_interval"
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Query:
    """legend: in Grafana's notation, e.g. {{group}}"""

    expr: str
    legend: str


def selector(metric: Metric, sample: str, **labels: str) -> str:
    """The metric's series in the chosen cluster, groups and tenants, with these labels."""
    unknown = labels.keys() - set(metric.label_names)
    assert not unknown, f"{metric.name} has no labels {unknown}"
    matchers = [f'{CLUSTER_LABEL}=~"$cluster"']
    matchers += [f'{x}=~"${x}"' for x in CHOOSABLE if x in metric.label_names and x not in labels]
    matchers += [f'{name}="{value}"' for name, value in labels.items()]
    return f"{sample}{{{', '.join(matchers)}}}"


def value(
    metric: Metric,
    *,
    agg: str = "sum",
    by: str = "",
    legend: str = "",
    **labels: str,
) -> Query:
    """A gauge. by: labels to tell apart"""
    assert metric.kind is Kind.GAUGE, metric.name
    expr = f"{agg}{_by(by)} ({selector(metric, metric.exported, **labels)})"
    return Query(expr, legend or _legend(by))


def count(metric: Metric, *, by: str = "", of: str = "", legend: str = "") -> Query:
    """A gauge of the router, added up over clusters: each has one router, but may export two while
    it is replaced. by: labels to tell apart; of: further ones, to add up as well"""
    assert metric.kind is Kind.GAUGE, metric.name
    kept = ", ".join(label for label in (CLUSTER_LABEL, by, of) if label)
    expr = f"max{_by(kept)} ({selector(metric, metric.exported)})"
    return Query(f"sum{_by(by)} ({expr})", legend or _legend(by))


def rate(
    metric: Metric,
    *,
    by: str = "",
    sample: str = "",
    legend: str = "",
    **labels: str,
) -> Query:
    """A counter's growth, or that of a histogram's `sample` (sum or count)."""
    assert metric.kind is not Kind.GAUGE, metric.name
    name = f"{metric.exported}_{sample}" if sample else metric.exported
    assert name in metric.samples
    found = f"rate({selector(metric, name, **labels)}[{RATE_INTERVAL}])"
    return Query(f"sum{_by(by)} ({found})", legend or _legend(by))


def total(metric: Metric, *, by: str) -> Query:
    """A counter of rare events, as it stands: growth is not seen in a series that is new."""
    assert metric.kind is Kind.COUNTER, metric.name
    return Query(f"sum{_by(by)} ({selector(metric, metric.exported)})", _legend(by))


def quantiles(metric: Metric, by: str = "") -> tuple[Query, ...]:
    """Of a histogram."""
    assert metric.kind is Kind.HISTOGRAM, metric.name
    labels = f"{by}, le" if by else "le"
    buckets = f"{selector(metric, metric.exported + '_bucket')}[{RATE_INTERVAL}]"
    return tuple(
        Query(
            f"histogram_quantile({q}, sum{_by(labels)} (rate({buckets})))",
            f"{_legend(by)} {name}".strip(),
        )
        for name, q in QUANTILES.items()
    )


def ratio(part: Query, whole: Query, by: str, legend: str = "") -> Query:
    return Query(f"{part.expr} / {whole.expr}", legend or _legend(by))


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def _legend(by: str) -> str:
    return ", ".join(f"{{{{{name}}}}}" for name in by.split(", ") if name)
