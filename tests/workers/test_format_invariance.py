"""Greedy output in every format does not depend on chunks, batch, cache or preemption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmesh.kernels.formats.registry import format_names
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.local import local_executor
from tests.model.cases import CASES
from tests.model.small import VOCAB_SIZE, make_small_model
from tests.workers.invariance import Invariance, generate

TOKENS = 12

# All to serve, and one of each encoding that is for comparison and needs no calibration.
EVERY_KIND = [*format_names(comparison=False), "kivi2", "turboquant-qjl"]
# Experts do not see pages.
ONE_OF_A_KIND = ["exact", "k4v2", "fp8"]
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen3NextForCausalLM": {
        "head_dim": 32,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "DeepseekV3ForCausalLM": CASES["deepseek-v3"][1],
    "Qwen3MoeForCausalLM": {
        "head_dim": 32,
        "num_hidden_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        architecture: make_small_model(
            architecture,
            tmp_path_factory.mktemp("small"),
            **{
                "hidden_size": 128,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                **overrides,
            },
        )
        for architecture, overrides in MODELS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *((name, "LlamaForCausalLM") for name in EVERY_KIND),
        *((name, "Qwen3MoeForCausalLM") for name in ONE_OF_A_KIND),
        ("k4v2", "Qwen3NextForCausalLM"),
        ("int8", "DeepseekV3ForCausalLM"),
    ],
)
def test_output_depends_only_on_the_prompt(
    name: str, architecture: str, models: dict[str, Path]
) -> None:
    """Pages of 16 tokens, prompts of up to 13 pages: most are sealed in every format."""
    model = models[architecture]
    config = EngineConfig(
        model=str(model),
        kv_format=name,
        kv_probe="off",
        page_size=16,
        dtype="float32",
        device="cpu",
        kv_memory_bytes=16 << 20,
        max_num_batched_tokens=64,
        prefix_cache=False,
        threads_per_rank=1,
    )
    numbers = np.random.default_rng(0)
    prompts = [numbers.integers(3, VOCAB_SIZE, length).tolist() for length in (200, 171, 96)]
    alone = Invariance(config, prompts, TOKENS)
    alone.check(generate(Engine(config, local_executor(config)), prompts, TOKENS))
    alone.check(alone.preempted(steps=(6, 14)))
    short_chunks = config.replace(max_num_batched_tokens=16)
    alone.check(alone.one_by_one(Engine(short_chunks, local_executor(short_chunks))))
    cached = config.replace(prefix_cache=True)
    engine = Engine(cached, local_executor(cached))
    alone.check(alone.one_by_one(engine))
    warm = alone.one_by_one(engine)
    if engine.info.prefix_cache:
        assert all(deltas[-1].usage and deltas[-1].usage.cached_tokens > 0 for deltas in warm)
    alone.check(warm)
