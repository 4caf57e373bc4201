"""The router against simple rules, on families of made-up traces, at several loads.

The whole comparison is `python -m benchmarks.routing_families`; these are short traces.
"""

from __future__ import annotations

import pytest

from benchmarks.routing_families import measure
from kvmesh.cluster.simulator.synthetic import FAMILIES

REQUESTS = 300
LOADS = (0.8, 1.1, 1.4)
RULES = ("round-robin", "power-of-two", "vllm-dp", "prefix-tree", "dynamo")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_simple_rule_is_better_at_any_load(family: str) -> None:
    for load in LOADS:
        cell = measure(family, load, REQUESTS, (*RULES, "kvmesh"))
        assert cell.holds, str(cell)
