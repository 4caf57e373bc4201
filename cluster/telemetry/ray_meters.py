"""Meters that Ray exports; they work only in a Serve replica."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.serve import metrics

from kvmesh.cluster.telemetry.meters import Instrument
from kvmesh.cluster.telemetry.table import Kind, Metric


class _RayMeter:
    def __init__(self, record: Callable[..., None]) -> None:
        self._record = record

    def record(self, value: float, labels: Mapping[str, str]) -> None:
        self._record(value, tags=dict(labels))


def ray_meter(metric: Metric) -> Instrument:
    """A `InstrumentFactory` over ray.serve.metrics."""
    # Ray's annotation of tag_keys says one key, but Ray takes any number.
    about: Any = {"description": metric.help, "tag_keys": metric.label_names}
    match metric.kind:
        case Kind.COUNTER:
            return _RayMeter(metrics.Counter(metric.name, **about).inc)
        case Kind.GAUGE:
            return _RayMeter(metrics.Gauge(metric.name, **about).set)
        case Kind.HISTOGRAM:
            made = metrics.Histogram(metric.name, boundaries=list(metric.buckets), **about)
            return _RayMeter(made.observe)
