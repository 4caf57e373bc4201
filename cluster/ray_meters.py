"""Meters that Ray exports; they work only in a Serve replica."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve import metrics


def _keys(tags: Sequence[str]) -> Any:
    # Ray's annotation says one key, but Ray takes any number.
    return tuple(tags)


class _Counter:
    def __init__(self, meter: metrics.Counter) -> None:
        self._meter = meter

    def inc(self, value: float, tags: Mapping[str, str]) -> None:
        self._meter.inc(value, tags=dict(tags))


class _Gauge:
    def __init__(self, meter: metrics.Gauge) -> None:
        self._meter = meter

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        self._meter.set(value, tags=dict(tags))


class _Histogram:
    def __init__(self, meter: metrics.Histogram) -> None:
        self._meter = meter

    def observe(self, value: float, tags: Mapping[str, str]) -> None:
        self._meter.observe(value, tags=dict(tags))


class RayMeterFactory:
    """A `metrics.MeterFactory` over ray.serve.metrics."""

    def counter(self, name: str, description: str, tags: Sequence[str]) -> _Counter:
        return _Counter(metrics.Counter(name, description=description, tag_keys=_keys(tags)))

    def gauge(self, name: str, description: str, tags: Sequence[str]) -> _Gauge:
        return _Gauge(metrics.Gauge(name, description=description, tag_keys=_keys(tags)))

    def histogram(
        self, name: str, description: str, tags: Sequence[str], buckets: Sequence[float]
    ) -> _Histogram:
        return _Histogram(
            metrics.Histogram(
                name, description=description, boundaries=list(buckets), tag_keys=_keys(tags)
            )
        )
