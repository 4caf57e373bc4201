"""Plans against the engine that would carry them out, and what is recommended."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from kvmesh.cluster.planner.layout import Layout, layouts
from kvmesh.cluster.planner.memory import CONTEXT_BYTES
from kvmesh.cluster.planner.model import PlannedModel, planned_model
from kvmesh.cluster.planner.plan import (
    DEFAULTS,
    Limit,
    Plan,
    Target,
    make_plans,
    recommend,
    serve_command,
)
from kvmesh.cluster.simulator.hardware import GPUS
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.errors import ConfigError, PoolCapacityError
from kvmesh.workers.executor import Allocation
from kvmesh.workers.local import InProcessExecutor
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.request_check import check_request
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import PageNeed
from tests.model.small import make_small_model

# What is left for KV is some 24 MiB, less the activations.
STEPS_BYTES = 88 << 20  # results of parts of attention
SMALL_GPU = dataclasses.replace(
    GPUS["h100"], nvml_bytes=round((CONTEXT_BYTES + STEPS_BYTES + (24 << 20)) / 0.9)
)
POSITIONS = 1 << 22


class _WithoutPages(InProcessExecutor):
    """A rank that is never run: compiling its loops would take seconds."""

    def allocate(self, allocation: Allocation) -> None:
        """Allocates nothing."""


def plan_for(model: PlannedModel, kv_format: str, target: Target, gpus: int = 1) -> Plan:
    return make_plans(model, SMALL_GPU, gpus, [get_format(kv_format)], target)[0]


@pytest.mark.parametrize("kv_format", ["exact", "int8", "k2v2"])
def test_an_engine_with_that_memory_has_the_planned_pages(kv_format: str, tmp_path: Path) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path, max_position_embeddings=POSITIONS)
    plan = plan_for(planned_model(str(path)), kv_format, Target(4096))
    engine = Engine(
        config := EngineConfig(
            model=str(path),
            kv_format=kv_format,
            dtype="bfloat16",
            kv_memory_bytes=plan.memory.kv_bytes,
            max_num_seqs=plan.limits.max_num_seqs,
            max_num_batched_tokens=plan.limits.max_num_batched_tokens,
            max_hot_share=DEFAULTS.hot_share("cuda"),
            kv_probe="off",
        ),
        _WithoutPages(config),
    )
    assert plan.pool is not None
    assert plan.geometry == engine.geometry
    assert engine.info.capacity == PageNeed(plan.pool.hot_pages, plan.pool.sealed_pages)
    need = engine.geometry.bytes_of(engine.geometry.need(4096))
    assert plan.sequence_bytes == need
    check_request(request_of(plan.longest), engine.info)
    with pytest.raises(PoolCapacityError):
        check_request(request_of(plan.longest + 1), engine.info)
    fitting = plan.pool.sealed_pages // engine.geometry.peak_need(4096).sealed
    assert plan.sequences == min(fitting, engine.info.max_num_seqs) > 0


def request_of(tokens: int) -> EngineRequest:
    """One that writes that many tokens."""
    prompt = np.ones(tokens - 1, dtype=np.int32)
    return EngineRequest(str(tokens), prompt, SamplingParams(max_tokens=1))


def test_layouts_divide_heads_and_widths() -> None:
    qwen = planned_model("qwen2.5-7b-1m").sizes  # 28 heads, 4 KV heads
    found = layouts(qwen, 8)
    assert {(x.groups, x.tp, x.kvp) for x in found if x.ranks == 8} == {
        (1, 4, 2),
        (1, 2, 4),
        (1, 1, 8),
    }
    assert all(x.groups * x.ranks == 8 for x in found)
    assert [str(x) for x in found[:3]] == ["8 × tp 1", "4 × tp 2", "4 × tp 1 kvp 2"]
    for gpus in (0, 3, 12):
        with pytest.raises(ConfigError, match=f"power of two.*got {gpus}") as caught:
            layouts(qwen, gpus)
        assert caught.value.field == "gpus"


def test_what_is_served_is_recommended_first() -> None:
    model = planned_model("qwen3-8b")
    formats = [get_format(name) for name in ("int8", "k4v4")]
    target = Target(40_000, concurrency=8)
    plans = make_plans(model, GPUS["h100"], 8, formats, target)
    best = recommend(plans, target, all_formats=True)
    assert best is not None and best.is_served
    assert (best.layout, best.kv_format) == (Layout(8, 1), "k4v4"), "int8 is worse on some models"
    # One sequence is computed soonest by all GPUs together.
    alone = Target(40_000)
    best = recommend(make_plans(model, GPUS["h100"], 8, formats, alone), alone, all_formats=True)
    assert best is not None and best.layout == Layout(1, 8)


def test_pages_are_dealt_where_kv_heads_are_few() -> None:
    model, target = planned_model("qwen2.5-7b-1m"), Target(1_000_000)
    plans = make_plans(model, GPUS["h100"], 8, [get_format("int8")], target)
    best = recommend(plans, target, all_formats=False)
    assert best is not None and best.layout == Layout(1, 4, 2)
    assert "--tp 4 --kvp 2 --groups 1" in serve_command(model, best, target)
    # All ranks together hold the pages of a sequence once.
    whole = next(plan for plan in plans if plan.layout == Layout(2, 4))
    assert best.sequence_bytes == whole.sequence_bytes


def test_only_a_smaller_format_holds_more() -> None:
    model, target = planned_model("llama-3-8b-1048k"), Target(1 << 20)
    plans = make_plans(model, GPUS["h100"], 1, [get_format("int8"), get_format("k4v4")], target)
    assert [plan.fits(target) for plan in plans] == [False, True]
    assert plans[0].limit is Limit.MEMORY and plans[0].ttft_s is None
    assert plans[1].limit is Limit.MODEL
    best = recommend(plans, target, all_formats=True)
    assert best is plans[1]


def test_a_model_that_does_not_fit_leaves_no_kv_memory() -> None:
    model, target = planned_model("llama-3-70b"), Target(1000)
    plan = make_plans(model, GPUS["l4"], 1, [get_format("int8")], target)[0]
    assert plan.limit is Limit.WEIGHTS
    assert (plan.pool, plan.longest, plan.sequences, plan.ttft_s) == (None, 0, 0, None)
    assert recommend([plan], target, all_formats=True) is None


def test_experts_take_memory_all_together_and_time_as_they_are_used() -> None:
    model = planned_model("qwen3-30b-a3b")
    assert model.counts.total == pytest.approx(30.5e9, rel=0.01)  # as its name says
    assert model.counts.multiplied == pytest.approx(3.0e9, rel=0.1)
    assert model.numbers_read(1) == model.counts.multiplied
    assert model.numbers_read(10_000) == pytest.approx(
        model.counts.multiplied + model.counts.idle, rel=1e-6
    )
    plan = make_plans(model, GPUS["h200"], 1, [get_format("int8")], Target(1000))[0]
    assert plan.memory.weight_bytes == 2 * model.counts.total
    assert plan.is_served


def test_times_are_those_of_the_service_model() -> None:
    """Recomputed from the formulas in docs and data sheets, for one GPU."""
    model, context = planned_model("llama-3-8b-1048k"), 100_000
    plan = make_plans(model, GPUS["h100"], 1, [get_format("int8")], Target(context, 3))[0]
    kv_bytes = 32 * 8 * 2 * 128 * 8.25 / 8  # of a token
    bandwidth = 3.35e12 * 0.75
    weights_s = 2 * model.counts.multiplied / bandwidth
    assert plan.tpot_s == pytest.approx(
        0.002 + weights_s + 3 * context * kv_bytes / (bandwidth * 0.9)
    )
    pairs_s = 4 * 32 * 32 * 128 * context * context / 2 / (989e12 * 0.40)
    linear_s = 2 * model.counts.multiplied * context / (989e12 * 0.55)
    steps = context / 8192
    assert plan.ttft_s == pytest.approx(pairs_s + linear_s + 0.002 * steps, rel=0.01)


def test_a_hub_name_is_found_where_it_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    config = make_small_model("LlamaForCausalLM", tmp_path / "model") / "config.json"
    (snapshot / "config.json").write_text(config.read_text())
    monkeypatch.setattr(
        "huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path), raising=False
    )
    assert planned_model("someone/some-model").sizes.layers == 3
    with pytest.raises(ConfigError, match="got 'someone/other'"):
        planned_model("someone/other")


def test_a_configuration_that_is_not_served_is_planned_with_the_reason(tmp_path: Path) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"no_rope_layers": [1, 0, 1]}))
    model = planned_model(str(path / "config.json"))
    assert model.obstacle is not None and "no_rope_layers" in model.obstacle
    assert model.name == str(path)
