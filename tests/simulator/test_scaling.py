"""Groups that come and go in a simulation: what is asked of the autoscaler that production runs."""

from __future__ import annotations

import math

import pytest

from kvmesh.cluster.routing.autoscaling import AutoscalingPolicy
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.simulator.metrics import Objective, summarize
from kvmesh.cluster.simulator.scaling import Autoscaling
from kvmesh.cluster.simulator.service_time import ServiceTime
from kvmesh.cluster.simulator.simulation import Run, Scenario, simulate
from kvmesh.cluster.simulator.synthetic import synthetic_trace, workload_of
from kvmesh.cluster.simulator.trace import TraceRequest, at_rate, with_tide

GROUPS = 4
START_S = 60.0


def runs(family: str, count: int, *, down_after_s: float = 300.0) -> tuple[Run, Run]:
    """With all groups, and with those that the load asks for: it is low, high, and low again."""
    requests = at_rate(synthetic_trace(family, count, 0, GROUPS), 0.5)
    requests = with_tide(requests, requests[-1].arrival_s, 0.9)
    scenario = Scenario(
        [workload_of(family).shape] * GROUPS,
        requests,
        max(request.output_tokens for request in requests),
        RouterConfig(queue_limit=len(requests)),
    )
    scaling = Autoscaling(AutoscalingPolicy(1, down_after_s=down_after_s), START_S)
    scaled = Scenario(
        scenario.shapes, requests, scenario.max_tokens, scenario.router, scaling=scaling
    )
    return simulate(scenario, "kvmesh"), simulate(scaled, "kvmesh")


@pytest.mark.parametrize(
    ("family", "count"),
    [
        ("decode-smooth-private", 3000),
        pytest.param("kv-smooth-shared", 900, marks=pytest.mark.slow),
    ],
)
def test_fewer_groups_serve_a_tide_nearly_as_well(family: str, count: int) -> None:
    every, scaled = runs(family, count)
    shape = workload_of(family).shape
    service, chunk = ServiceTime.of(shape), shape.max_num_batched_tokens
    before, after = (summarize(x, service, chunk, Objective()) for x in (every, scaled))
    assert all(not math.isnan(seq.finished_at) for seq in scaled.sequences)
    assert scaled.group_s < 0.85 * every.group_s
    assert after.attainment > before.attainment - 0.08
    # All of them ran at the top of the tide.
    assert all(engine.busy_s > 0 for engine in scaled.engines)


def test_a_tide_moves_requests_and_loses_none() -> None:
    requests = [TraceRequest(f"r{i}", float(i), 1, 1) for i in range(1000)]
    moved = with_tide(requests, 500.0, 1.0)
    times = [request.arrival_s for request in moved]
    assert times == sorted(times) and len(times) == 1000
    assert times[500] == pytest.approx(500.0, abs=1.0)
    thinnest, fullest = (sum(at <= x < at + 50 for x in times) for at in (475, 225))
    assert thinnest < 10 < 90 < fullest
    with pytest.raises(ValueError, match="swing"):
        with_tide(requests, 500.0, 1.5)
    with pytest.raises(ValueError, match="period"):
        with_tide(requests, 0.0, 0.5)
