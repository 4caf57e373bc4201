"""The table of docs/planning.md, cell by cell."""

from __future__ import annotations

from functools import cache

import pytest

from kvmesh.cluster.cli.plan_view import human_tokens
from kvmesh.cluster.planner.model import PlannedModel, planned_model
from kvmesh.cluster.planner.plan import (
    BY_ACCURACY,
    Plan,
    Target,
    default_formats,
    make_plans,
    recommend,
)
from kvmesh.cluster.simulator.hardware import GPUS
from tests.repo.imports import ROOT

PAGE = ROOT / "docs/planning.md"
MODELS = (
    "llama-7b",
    "llama-3-8b",
    "llama-3-70b",
    "qwen2.5-7b-1m",
    "qwen3-30b-a3b",
)
GPUS_SHOWN = ("h100", "h200", "a100-80g")
COUNTS = (1, 4, 8)
CONTEXT = 1 << 20


@cache
def model_named(name: str) -> PlannedModel:
    return planned_model(name)


def plans_of(name: str, gpu: str, gpus: int, context: int) -> list[Plan]:
    model = model_named(name)
    formats = default_formats(model, 64)
    return make_plans(model, GPUS[gpu], gpus, formats, Target(context))


def cell(name: str, gpu: str, gpus: int) -> str:
    """Format, longest context, TTFT and TPOT of what would be recommended for a million tokens
    if the model's own context were longer; else the longest context in the smallest format."""
    plans = plans_of(name, gpu, gpus, CONTEXT)
    best = recommend(plans, Target(CONTEXT), all_formats=True)
    if best is not None:
        assert best.ttft_s is not None and best.tpot_s is not None
        times = f"{best.ttft_s / 60:.1f} min, {best.tpot_s * 1000:.0f} ms"
        return f"{best.kv_format}, {human_tokens(best.longest)}; {times}"
    smallest = [plan for plan in plans if plan.kv_format == BY_ACCURACY[-1]]
    longest = max(plan.longest for plan in smallest)
    return f"*{BY_ACCURACY[-1]}, {human_tokens(longest)}*" if longest else "*weights do not fit*"


def rows() -> list[list[str]]:
    lines = PAGE.read_text("utf-8").splitlines()
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines if "|" in line]


@pytest.mark.parametrize("name", MODELS)
def test_the_documented_rows_are_what_is_planned(name: str) -> None:
    documented = {row[1]: row[2:] for row in rows() if row[0] == name}
    assert documented == {
        str(gpus): [cell(name, gpu, gpus) for gpu in GPUS_SHOWN] for gpus in COUNTS
    }


@pytest.mark.parametrize(
    ("name", "gpu", "gpus", "kv_format", "layout", "documented"),
    [
        ("llama-7b", "a100-80g", 1, "k2v2", "tp 1", "holds 683k on one A100"),
        ("llama-7b", "a100-80g", 8, "k2v2", "tp 8", "and 6.79M on eight"),
        ("llama-7b", "h200", 1, "k2v2", "tp 1", "one H200 holds 1.32M"),
        ("llama-7b", "h200", 8, "k2v2", "tp 8", "eight hold 12.80M"),
        ("qwen2.5-7b-1m", "h100", 8, "int8", "2 × tp 4", "one sequence of 8.97M tokens"),
        ("qwen2.5-7b-1m", "h100", 8, "int8", "tp 4 kvp 2", "18.40M with"),
        ("llama-3-8b", "h100", 8, "int8", "tp 8", "8.06M with tp 8"),
        ("llama-3-8b", "h100", 8, "int8", "tp 4 kvp 2", "7.97M with tp 4 × kvp 2"),
    ],
)
def test_contexts_in_the_text_are_what_is_planned(
    name: str, gpu: str, gpus: int, kv_format: str, layout: str, documented: str
) -> None:
    (plan,) = (
        plan
        for plan in plans_of(name, gpu, gpus, CONTEXT)
        if plan.kv_format == kv_format and str(plan.layout) == layout
    )
    assert human_tokens(plan.longest) in documented
    assert documented in " ".join(PAGE.read_text("utf-8").split())
