"""The comparison with simple rules: what a cell says, and its plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.routing_families import Cell, curves, measure
from kvmesh.cluster.simulator.plots import plot_families


def test_a_cell_says_whether_the_router_is_within_both_bounds() -> None:
    cell = measure("decode-smooth-private", 0.5, 30, ("dynamo", "vllm-dp", "kvmesh"))
    assert cell.holds
    own = cell.summaries["kvmesh"]

    def with_own(**changes: object) -> Cell:
        changed = replace(own, **changes)  # type: ignore[arg-type]
        return Cell(cell.family, cell.load, {**cell.summaries, "kvmesh": changed})

    less = with_own(attainment=0.9)
    assert not less.holds
    assert str(less).endswith("BEYOND A BOUND")
    later = with_own(ttft_s={**own.ttft_s, "p99": 2.5})
    assert not later.holds
    assert later.p99_ratio > 1.1
    assert with_own(ttft_s={**own.ttft_s, "p99": 1.9}).holds, "within the objective all the same"


def test_a_rule_that_lets_requests_wait_for_long_is_not_compared_with() -> None:
    cell = measure("decode-smooth-private", 0.5, 30, ("dynamo", "kvmesh"))
    own, rule = cell.summaries["kvmesh"], cell.summaries["dynamo"]
    slow = {
        "kvmesh": replace(own, attainment=0.5, ttft_s={**own.ttft_s, "p99": 20.0}),
        "dynamo": replace(rule, attainment=0.4, ttft_s={**rule.ttft_s, "p99": 20.0}),
        "vllm-dp": replace(rule, attainment=0.9, ttft_s={**rule.ttft_s, "p99": 90.0}),
    }
    greedy = Cell(cell.family, cell.load, slow)
    assert greedy.goodput_ratio == 1.25
    assert greedy.any_goodput_ratio < 1.0
    assert greedy.holds


def test_curves_are_drawn_for_each_workload(tmp_path: Path) -> None:
    cells = [measure("kv-smooth-private", load, 20, ("dynamo", "kvmesh")) for load in (0.5, 1.0)]
    points = curves(cells)["kv-smooth-private"]
    assert [point["load"] for point in points["dynamo"]] == [0.5, 1.0]
    assert all(point["goodput"] <= 1.0 for point in points["kvmesh"])
    plot_families(curves(cells), tmp_path)
    assert (tmp_path / "routing-kv.png").read_bytes().startswith(b"\x89PNG")
