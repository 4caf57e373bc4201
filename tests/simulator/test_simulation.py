"""Complete runs on a small synthetic trace."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.simulator.cli import app
from kvmesh.cluster.simulator.hardware import GPUS, MODELS
from kvmesh.cluster.simulator.metrics import Objective, summarize
from kvmesh.cluster.simulator.policies import POLICIES
from kvmesh.cluster.simulator.service_time import EngineShape, ServiceTime
from kvmesh.cluster.simulator.simulation import Scenario, simulate
from kvmesh.cluster.simulator.trace import TraceRequest, inject_long
from kvmesh.kernels.formats.registry import get_format


def make_trace(count: int, per_s: float) -> list[TraceRequest]:
    """Conversations that grow turn by turn from a common prefix; skewed lengths."""
    chance = random.Random(7)
    now, block, requests = 0.0, 1, []
    conversations: list[tuple[int, ...]] = [(0,)]
    for index in range(count):
        now += chance.expovariate(per_s)
        history = chance.choice(conversations) if chance.random() < 0.5 else (0,)
        added = 1 + min(int(chance.lognormvariate(2.0, 1.0)), 100)
        blocks = history + tuple(range(block, block + added))
        block += added
        conversations.append(blocks)
        tokens = len(blocks) * 512 + chance.randrange(512)
        output = 1 + min(int(chance.lognormvariate(5.0, 1.0)), 1500)
        requests.append(TraceRequest(f"r{index}", now, tokens, output, blocks, f"t{index % 3}"))
    return requests


SHAPE = EngineShape(GPUS["a100-40g"], MODELS["llama-3-8b"], get_format("exact"))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_and_no_page_is_left_in_use(policy: str) -> None:
    requests = make_trace(150, per_s=6.0)
    scenario = Scenario([SHAPE] * 3, requests, 1600, router=RouterConfig(queue_limit=10_000))
    run = simulate(scenario, policy)
    for seq in run.sequences:
        assert not seq.refused
        assert seq.request.arrival_s <= seq.started_at < seq.first_token_at <= seq.finished_at
        assert seq.emitted == seq.request.output_tokens
    assert all(engine.pool.used_pages == 0 for engine in run.engines)
    if policy in ("kvmesh", "clairvoyant", "fifo-worst-case"):
        assert sum(seq.preemptions for seq in run.sequences) == 0
    summary = summarize(run, ServiceTime.of(SHAPE), 2048, Objective())
    assert 0.0 < summary.attainment <= 1.0
    assert 0.0 < summary.kv_used_share < 1.0
    assert 1 / 3 <= summary.fairness <= 1.0


def test_a_run_repeats_exactly() -> None:
    scenario = Scenario([SHAPE] * 2, make_trace(100, per_s=5.0), 1600)
    one, two = simulate(scenario, "kvmesh"), simulate(scenario, "kvmesh")
    assert [x.finished_at for x in one.sequences] == [x.finished_at for x in two.sequences]


def test_what_fits_nowhere_is_refused_and_what_fits_one_format_goes_there() -> None:
    small = EngineShape(GPUS["a100-40g"], MODELS["llama-3-8b"], get_format("int4"))
    requests = inject_long(make_trace(60, per_s=2.0), 1, 400_000)
    scenario = Scenario([SHAPE, small], requests, 1600)
    run = simulate(scenario, "kvmesh")
    (long,) = [seq for seq in run.sequences if seq.request.injected]
    assert long.group == 1
    assert not math.isnan(long.finished_at)
    for policy in ("kvmesh", "dynamo"):
        alone = simulate(Scenario([SHAPE], requests, 1600), policy)
        (refused,) = [seq for seq in alone.sequences if seq.refused]
        assert refused.request.injected
    with pytest.raises(ValueError, match="policy"):
        simulate(scenario, "none")


def test_the_command_prints_json_and_draws(tmp_path: Path) -> None:
    path, plot = tmp_path / "trace.jsonl", tmp_path / "plot.png"
    rows = [
        {
            "timestamp": int(request.arrival_s) * 1000,
            "input_length": request.prompt_tokens,
            "output_length": request.output_tokens,
            "hash_ids": list(request.blocks),
        }
        for request in make_trace(40, per_s=2.0)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--trace", str(path), "--groups", "2"]
    more = ["--policy", "random,kvmesh", "--json", "--plot", str(plot), "--tenants", "2"]
    result = CliRunner().invoke(app, [*common, *more, "--inject-long", "1@300000"])
    assert result.exit_code == 0, result.output
    summaries = json.loads(result.output)
    assert [summary["policy"] for summary in summaries] == ["random", "kvmesh"]
    assert all(len(summary["long_ttft_s"]) == 1 for summary in summaries)
    assert plot.stat().st_size > 0


def test_a_bounded_step_keeps_running_streams_fluent() -> None:
    """A long prompt comes while a short request decodes, on a small GPU."""
    l4 = EngineShape(GPUS["l4"], MODELS["llama-3-8b"], get_format("int4"))
    requests = [TraceRequest("runs", 0.0, 100, 60), TraceRequest("comes", 1.0, 20_000, 10)]
    between_tokens_s, whole_s = {}, {}
    for limit_s in (None, 0.15):
        shape = dataclasses.replace(l4, max_step_s=limit_s)
        runs, comes = simulate(Scenario([shape], requests, 100), "kvmesh").sequences
        between_tokens_s[limit_s] = (runs.finished_at - runs.first_token_at) / 59
        whole_s[limit_s] = comes.finished_at - comes.request.arrival_s
    assert between_tokens_s[0.15] <= 0.15 < between_tokens_s[None]
    assert whole_s[None] < whole_s[0.15], "the prompt is what pays"
