"""Which groups' KV formats a request accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from kvmesh.cluster.divergence import DIVERGENCE_NATS, divergence_of
from kvmesh.cluster.ingress.quality import accepted_formats
from kvmesh.kernels.formats.registry import format_names
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError
from tests.routing.groups import make_info

RESULTS = Path(__file__).parents[2] / "benchmarks/results/kv_formats.json"


def refused(
    formats: Iterable[str],
    configured: Mapping[str, float],
    *,
    measured: Mapping[str, float] = MappingProxyType({}),
    **fields: Any,
) -> dict[str, str]:
    """Why not, of those formats that a request does not accept.

    measured: by groups, on their model
    """
    accepts = accepted_formats(pb.GenerateRequest(**fields))
    reasons = {}
    for name in formats:
        info = replace(make_info(kv_format=name), kv_divergence_nats=measured.get(name))
        known = replace(info, kv_divergence_nats=divergence_of(info, configured))
        if reason := accepts.why_not(known):
            reasons[name] = reason
    return reasons


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
    formats = {"exact", "int8", "k4v4", "int4", "k2v2"}
    assert formats - refused(formats, {}, **fields).keys() == left


def test_configured_divergences_override_the_table() -> None:
    left = refused(["exact", "k4v4"], {"k4v4": 0.5}, max_kv_divergence_nats=0.1)
    assert left.keys() == {"k4v4"}


def test_what_a_group_measured_on_its_model_comes_before_other_models() -> None:
    formats = ["k4v4", "int4"]
    assert not refused(formats, {}, max_kv_divergence_nats=1.0)
    for measured, bound in ((1.34, 1.0), (math.nan, 1e9)):
        found = refused(formats, {}, measured={"int4": measured}, max_kv_divergence_nats=bound)
        assert found.keys() == {"int4"}
    info = replace(make_info(kv_format="int4"), kv_divergence_nats=1.34)
    assert divergence_of(info, {}) == 1.34
    assert divergence_of(info, {"int4": 0.3, "k4v4": 0.1}) == 0.3, "the operator knows best"
    assert divergence_of(replace(info, kv_format="4"), {"int4": 0.3}) == 0.3, "LMDeploy's name"


def test_a_format_without_a_divergence_has_to_be_named() -> None:
    assert "int8-static" not in DIVERGENCE_NATS
    formats = ["exact", "int8-static"]
    assert refused(formats, {}, max_kv_divergence_nats=9).keys() == {"int8-static"}
    assert refused(formats, {}, allowed_kv_formats=["int8-static"]).keys() == {"exact"}
    assert not refused(formats, {"int8-static": 0.001}, max_kv_divergence_nats=0.01)


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
        accepted_formats(pb.GenerateRequest(**fields))
    assert caught.value.field == field


def test_a_format_that_is_refused_says_why() -> None:
    formats = ("int4", "int8")
    assert refused(formats, {}, max_kv_divergence_nats=1e-6) == {
        name: f"its format {name} diverges by {DIVERGENCE_NATS[name]:g} nats" for name in formats
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
