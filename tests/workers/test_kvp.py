"""Pages dealt to ranks: greedy output equals that of one rank, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.workers.config import EngineConfig
from tests.model.cases import CASES
from tests.model.small import VOCAB_SIZE, make_small_model
from tests.workers.invariance import Invariance, generate
from tests.workers.thread_ranks import ThreadRanks

FORMATS = [name for name in format_names() if not get_format(name).needs_calibration]
LAYOUTS = [(1, 2), (1, 3), (2, 2), (1, 4), (2, 3), (2, 4), (1, 8)]

# Heads, channels and MLPs that 3, 4 and 8 ranks divide; a part of the channels may end in a head.
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 32, "sliding_window": 40},
    "Olmo2ForCausalLM": {},
    "GptOssForCausalLM": {
        "head_dim": 32,
        "sliding_window": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Llama4ForCausalLM": CASES["llama4"][1],
    "Qwen3NextForCausalLM": CASES["qwen3-next"][1],
    "RecurrentGemmaForCausalLM": CASES["recurrent-gemma"][1],
    "DeepseekV2ForCausalLM": {**CASES["deepseek-v2"][1], "num_attention_heads": 8},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        architecture: make_small_model(
            architecture,
            tmp_path_factory.mktemp("small"),
            **{
                "hidden_size": 192,
                "intermediate_size": 192,
                "num_hidden_layers": 1 if architecture == "LlamaForCausalLM" else 2,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                **overrides,
            },
        )
        for architecture, overrides in MODELS.items()
    }


def config_of(model: Path, **changes: Any) -> EngineConfig:
    settings: dict[str, Any] = {
        "kv_probe": "off",
        "page_size": 16,
        "dtype": "float32",
        "device": "cpu",
        "kv_memory_bytes": 16 << 20,
        "max_num_batched_tokens": 64,
        "threads_per_rank": 1,
    }
    return EngineConfig(model=str(model), **{**settings, **changes})


def prompts(*lengths: int) -> list[list[int]]:
    numbers = np.random.default_rng(0)
    return [numbers.integers(3, VOCAB_SIZE, length).tolist() for length in lengths]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"), [(name, LAYOUTS[i % len(LAYOUTS)]) for i, name in enumerate(FORMATS)]
)
def test_every_format_gives_the_tokens_of_one_rank(
    name: str, layout: tuple[int, int], models: dict[str, Path]
) -> None:
    """Together in chunks, and from the cache."""
    config = config_of(models["LlamaForCausalLM"], kv_format=name)
    alone = Invariance(config, prompts(130, 5), 8)
    tp, kvp = layout
    engine = alone.under(ThreadRanks, tp=tp, kvp=kvp).make_engine()
    alone.check(generate(engine, alone.prompts, alone.max_tokens))
    warm = generate(engine, alone.prompts, alone.max_tokens)
    assert warm[0][-1].usage and warm[0][-1].usage.cached_tokens > 100
    alone.check(warm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "layout"),
    [
        ("LlamaForCausalLM", (1, 8)),
        ("Gemma2ForCausalLM", (2, 3)),
        ("Olmo2ForCausalLM", (2, 2)),
        ("GptOssForCausalLM", (1, 4)),
        ("Llama4ForCausalLM", (2, 2)),
        ("Qwen3NextForCausalLM", (2, 2)),
        ("RecurrentGemmaForCausalLM", (1, 3)),
        ("DeepseekV2ForCausalLM", (2, 2)),
    ],
)
def test_windows_sinks_norms_states_and_preemption_change_no_token(
    architecture: str, layout: tuple[int, int], models: dict[str, Path]
) -> None:
    config = config_of(
        models[architecture], kv_format="int8", sink_pages=1, recent_pages=2, prefix_cache=False
    )
    alone = Invariance(config, prompts(120, 90, 70, 5), 12)
    tp, kvp = layout
    ranks = alone.under(ThreadRanks, tp=tp, kvp=kvp)
    alone.check(ranks.preempted((5, 12)))
    short = ranks.under(ThreadRanks, max_num_batched_tokens=24)
    alone.check(generate(short.make_engine(), alone.prompts, alone.max_tokens))
