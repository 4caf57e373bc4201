"""Which groups' KV formats a request accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmesh.cluster.errors import NoAllowedFormatError
from kvmesh.cluster.ingress.quality import DIVERGENCE_NATS, divergence_of, refused_groups
from kvmesh.cluster.reports import ClusterStatus, EngineReport
from kvmesh.cluster.routing.outcome import RouterStatus
from kvmesh.kernels.formats.registry import format_names
from kvmesh.v1 import kvmesh_pb2 as pb
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


def refused(status: ClusterStatus, configured: Mapping[str, float], **fields: Any) -> set[str]:
    return set(refused_groups(pb.GenerateRequest(**fields), status, configured))


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({}, {"exact", "int8", "k4v4", "int4", "k2v2"}),
        ({"allowed_kv_formats": ["exact"]}, {"exact"}),
        ({"allowed_kv_formats": ["int8", "4"]}, {"int8", "int4"}),  # LMDeploy's name of int4
        # A bound on bits would have admitted int8 and int4 with k4v4.
        ({"max_kv_divergence_nats": 0.0023}, {"exact", "k4v4"}),
        ({"max_kv_divergence_nats": 0}, {"exact"}),
        ({"allowed_kv_formats": ["k4v4", "k2v2"], "max_kv_divergence_nats": 0.01}, {"k4v4"}),
    ],
)
def test_groups_are_refused_by_format(fields: Mapping[str, Any], left: set[str]) -> None:
    status = cluster("exact", "int8", "k4v4", "int4", "k2v2")
    assert status.reports.keys() - refused(status, {}, **fields) == left


def test_configured_divergences_override_the_table() -> None:
    status = cluster("exact", "k4v4")
    assert refused(status, {"k4v4": 0.5}, max_kv_divergence_nats=0.1) == {"k4v4"}


def test_what_a_group_measured_on_its_model_comes_before_other_models() -> None:
    status = cluster("k4v4", "int4")
    report = status.reports["int4"]
    info = replace(report.info, kv_divergence_nats=1.34)
    measured = replace(status, reports={**status.reports, "int4": replace(report, info=info)})
    assert not refused(status, {}, max_kv_divergence_nats=1.0)
    assert refused(measured, {}, max_kv_divergence_nats=1.0) == {"int4"}
    nothing = replace(report, info=replace(report.info, kv_divergence_nats=math.nan))
    broken = replace(status, reports={**status.reports, "int4": nothing})
    assert refused(broken, {}, max_kv_divergence_nats=1e9) == {"int4"}
    assert divergence_of(info, {}) == 1.34
    assert divergence_of(info, {"int4": 0.3, "k4v4": 0.1}) == 0.3, "the operator knows best"
    assert divergence_of(replace(info, kv_format="4"), {"int4": 0.3}) == 0.3, "LMDeploy's name"


def test_a_format_without_a_divergence_has_to_be_named() -> None:
    assert "int8-static" not in DIVERGENCE_NATS
    status = cluster("exact", "int8-static")
    assert refused(status, {}, max_kv_divergence_nats=9) == {"int8-static"}
    assert refused(status, {}, allowed_kv_formats=["int8-static"]) == {"exact"}
    assert not refused(status, {"int8-static": 0.001}, max_kv_divergence_nats=0.01)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"allowed_kv_formats": ["int8", "int9"]}, "allowed_kv_formats[1]"),
        ({"max_kv_divergence_nats": -1e-9}, "max_kv_divergence_nats"),
        ({"max_kv_divergence_nats": math.nan}, "max_kv_divergence_nats"),
        ({"max_kv_divergence_nats": math.inf}, "max_kv_divergence_nats"),
    ],
)
def test_wrong_names_and_bounds_are_refused(fields: Mapping[str, Any], field: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        refused(cluster("int8"), {}, **fields)
    assert caught.value.field == field


def test_a_request_that_no_group_may_serve_says_why() -> None:
    with pytest.raises(NoAllowedFormatError) as caught:
        refused(cluster("int4", "int8"), {}, max_kv_divergence_nats=1e-6)
    assert caught.value.reasons == {
        name: f"its format {name} diverges by {DIVERGENCE_NATS[name]:g} nats"
        for name in ("int4", "int8")
    }


def test_the_table_has_each_formats_divergence_on_the_model_where_it_is_worst() -> None:
    results = json.loads(RESULTS.read_text("utf-8"))
    worst: dict[str, float] = {}
    for report in (*results["perplexity"], results["every_format"]):
        for row in report["formats"]:
            name = row["kv_format"]
            worst[name] = max(worst.get(name, 0.0), row["kl_nats"])
    for name, kl_nats in worst.items():
        assert DIVERGENCE_NATS[name] == pytest.approx(kl_nats, rel=0.05, abs=1e-5), name
    assert DIVERGENCE_NATS.keys() <= set(format_names())
