"""Quantiles by nearest rank, of the latest values and of all."""

from __future__ import annotations

import pytest

from kvmesh.cluster.routing.rolling import RollingQuantile, nearest_rank
from kvmesh.cluster.telemetry.meters import summarise


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101, 1000])
@pytest.mark.parametrize("percent", [1, 7, 50, 90, 99, 100])
def test_as_few_values_as_possible_are_not_above(percent: int, count: int) -> None:
    rank = nearest_rank(percent / 100, count)
    assert rank * 100 < percent * count <= (rank + 1) * 100


def test_the_latest_values_count() -> None:
    window = RollingQuantile(2)
    for value in (9.0, 1.0, 2.0):
        window.add(value)
    assert [window.quantile(share) for share in (0.0, 0.5, 0.51, 1.0)] == [1.0, 1.0, 2.0, 2.0]


def test_latencies_are_summarised_by_nearest_rank() -> None:
    found = summarise([float(value) for value in range(100, 0, -1)])
    assert (found.count, found.mean_s) == (100, 50.5)
    assert (found.p50_s, found.p90_s, found.p99_s) == (50.0, 90.0, 99.0)
    assert summarise([1.0, 2.0]).p50_s == 1.0
    assert summarise([3.0]).p99_s == 3.0
