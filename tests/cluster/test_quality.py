"""The quality floor: one order of KV formats, by measured divergence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmesh.cluster.ingress.quality import DIVERGENCE_NATS, groups_below
from kvmesh.cluster.reports import ClusterStatus, EngineReport
from kvmesh.cluster.routing.errors import ExceedsEveryGroupError
from kvmesh.cluster.routing.outcome import RouterStatus
from kvmesh.kernels.formats.registry import format_names
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.loads import EngineInfo, EngineLoads
from kvmesh.workers.sizes import PageGeometry, PageNeed

RESULTS = Path(__file__).parents[2] / "benchmarks/results/kv_formats.json"
ROUTER = RouterStatus(1, True, 0, 1, 0, 0, (), 0, 0, 0, {})
GEOMETRY = PageGeometry(64, 0, 0, 100, 10)


def cluster(*formats: str) -> ClusterStatus:
    """One group for each format, named after it."""
    infos = {
        name: EngineInfo("e", "m", "0", name, "f", 1, GEOMETRY, PageNeed(4, 9), 800, 50, 4)
        for name in formats
    }
    reports = {name: EngineReport(info, EngineLoads()) for name, info in infos.items()}
    return ClusterStatus(ROUTER, reports, frozenset(formats))


@pytest.mark.parametrize(
    ("floor", "below"),
    [
        ("", set()),
        ("exact", {"int8", "k4v4", "int4", "k2v2"}),
        ("int8", {"k4v4", "int4", "k2v2"}),
        # At least as many bits as k4v4, but less faithful.
        ("k4v4", {"int4", "k2v2"}),
        ("int4", {"k2v2"}),
        ("4", {"k2v2"}),  # LMDeploy's name of int4
        ("kivi2", set()),
    ],
)
def test_groups_are_below_a_floor_by_measured_divergence(floor: str, below: set[str]) -> None:
    status = cluster("exact", "int8", "k4v4", "int4", "k2v2")
    assert groups_below(floor, status, DIVERGENCE_NATS) == below


def test_configured_divergences_override_the_table() -> None:
    status = cluster("exact", "k4v4")
    assert groups_below("int4", status, {**DIVERGENCE_NATS, "k4v4": 0.5}) == {"k4v4"}


def test_a_format_without_a_divergence_meets_only_its_own_floor() -> None:
    assert "int8-static" not in DIVERGENCE_NATS
    status = cluster("exact", "int8-static")
    assert groups_below("int8-static", status, DIVERGENCE_NATS) == {"exact"}
    assert groups_below("k2v2", status, DIVERGENCE_NATS) == {"int8-static"}
    assert not groups_below("k2v2", status, {**DIVERGENCE_NATS, "int8-static": 0.001})


def test_floors_that_cannot_be_met_are_errors() -> None:
    with pytest.raises(InvalidFieldError, match="min_kv_format"):
        groups_below("int9", cluster("int8"), DIVERGENCE_NATS)
    with pytest.raises(ExceedsEveryGroupError, match="int4 is less faithful than int8"):
        groups_below("int8", cluster("int4"), DIVERGENCE_NATS)


def test_the_table_has_the_measured_divergences() -> None:
    measured = json.loads(RESULTS.read_text("utf-8"))["perplexity"]["formats"]
    for row in measured:
        name, kl_nats = row["kv_format"], row["kl_nats"]
        assert DIVERGENCE_NATS[name] == pytest.approx(kl_nats, rel=0.05, abs=1e-5)
    assert DIVERGENCE_NATS.keys() <= set(format_names())
