"""`engine.deterministic`: bitwise the same log-probabilities however a prompt is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.deal import PageDeal
from kvmesh.workers.engine import Engine
from kvmesh.workers.errors import ConfigError, ConfigErrors
from kvmesh.workers.local import local_executor
from kvmesh.workers.request import EngineRequest, SampledLogprobs
from kvmesh.workers.sampling_params import SamplingParams
from tests.exercised import Exercised
from tests.model.small import VOCAB_SIZE, make_small_model
from tests.workers.thread_ranks import ThreadRanks

# More than a page, so that tokens that were generated are sealed.
TOKENS = 20
SHAPE: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
# Norms and linears of kvmesh, and of torch: LayerNorm without weights, one norm of all heads.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "CohereForCausalLM": {},
    "Qwen3MoeForCausalLM": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 3},
}
Output = list[tuple[int, SampledLogprobs]]
SEEN = Exercised(
    "deterministic", {"chunks": 10, "preemptions": 1, "cached tokens": 10, "sequences at a time": 8}
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: make_small_model(name, folder / name, max_position_embeddings=512, **SHAPE, **more)
        for name, more in ARCHITECTURES.items()
    }


def config_of(model: Path, **changes: object) -> EngineConfig:
    base = EngineConfig(
        model=str(model),
        kv_format="k4v2",
        kv_probe="off",
        page_size=16,
        device="cpu",
        kv_memory_bytes=8 << 20,
        threads_per_rank=2,
        deterministic=True,
    )
    return base.replace(**changes)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCAB_SIZE, length)]


def generated(
    engine: Engine, prompts: list[list[int]], preempt_at: int | None = None
) -> list[Output]:
    """All prompts at the same time."""
    found: dict[str, Output] = {str(number): [] for number in range(len(prompts))}
    for name, prompt in zip(found, prompts, strict=True):
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=3, ignore_eos=True)
        engine.add(EngineRequest(name, np.array(prompt, np.int32), params))
    step = 0
    while engine.has_work:
        if step == preempt_at:
            engine.scheduler.preempt_youngest()
        for delta in engine.step():
            found[delta.request_id] += zip(delta.token_ids, delta.logprobs, strict=True)
            if delta.usage is not None:
                SEEN.add("cached tokens", delta.usage.cached_tokens)
                SEEN.add("preemptions", delta.usage.preemptions)
        step += 1
    return list(found.values())


@pytest.fixture(scope="module")
def engines(models: dict[str, Path]) -> Callable[..., Engine]:
    """Engines by their settings, which keep their caches."""

    @cache
    def engine(architecture: str, kv_format: str, **changes: object) -> Engine:
        config = config_of(models[architecture], kv_format=kv_format, **changes)
        return Engine(config, local_executor(config))

    return engine


@pytest.mark.slow
@SEEN.required
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=2, max_size=3),
    chunk=st.sampled_from([5, 33]),
    preempt_at=st.none() | st.integers(2, 12),
    alike=st.integers(0, 64),
)
def test_bits_do_not_depend_on_batches_chunks_cache_or_preemption(
    lengths: list[int],
    chunk: int,
    preempt_at: int | None,
    alike: int,
    engines: Callable[..., Engine],
) -> None:
    """Prompts that begin alike are together in an engine, in chunks; in another, one by one."""
    prompts = [
        prompt_of(alike)[:length] + prompt_of(max(0, length - alike), seed)
        for seed, length in enumerate(lengths, 1)
    ]
    SEEN.add("sequences at a time", len(prompts))
    SEEN.add("chunks", sum(len(prompt) // chunk for prompt in prompts))
    engine = engines("LlamaForCausalLM", "k4v2", max_num_batched_tokens=chunk, max_num_seqs=4)
    together = generated(engine, prompts, preempt_at)
    alone = engines("LlamaForCausalLM", "k4v2", prefix_cache=False)
    for prompt, output in zip(prompts, together, strict=True):
        assert output == generated(alone, [prompt])[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kv_format"),
    [
        *(("LlamaForCausalLM", name) for name in ("exact", "fp8")),
        ("Olmo2ForCausalLM", "k4v2"),
        ("CohereForCausalLM", "int8"),
        ("Qwen3MoeForCausalLM", "int8"),
        ("MixtralForCausalLM", "k4v4"),
    ],
)
def test_models_and_formats(
    architecture: str, kv_format: str, engines: Callable[..., Engine]
) -> None:
    prompts = [prompt_of(75, 1), prompt_of(40, 2), prompt_of(33, 3)]
    small = engines(architecture, kv_format, max_num_batched_tokens=23, max_num_seqs=3)
    together = generated(small, prompts)
    alone = engines(architecture, kv_format)
    assert together == [generated(alone, [prompt])[0] for prompt in prompts]


@pytest.mark.slow
def test_pages_that_are_dealt_to_ranks(models: dict[str, Path]) -> None:
    """Ranks are merged in the order of a sequence's pages, whichever of them has the first. What a
    sequence begins with decides on that, so another engine may deal its pages in another way."""
    config = config_of(models["LlamaForCausalLM"], kvp=4, threads_per_rank=1)
    prompts = [prompt_of(n, n) for n in (9, 75, 40)]
    engine = Engine(config.replace(max_num_batched_tokens=23, max_num_seqs=3), ThreadRanks(config))
    together = generated(engine, prompts)
    config = config.replace(prefix_cache=False)  # equal contents must be on one rank
    alone = Engine(config, ThreadRanks(config))
    for prompt, output in zip(prompts, together, strict=True):
        for offset in (1, 3):
            with mock.patch.object(PageDeal, "of", lambda kvp, _, at=offset: PageDeal(kvp, at)):
                assert generated(alone, [prompt])[0] == output


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kv_format": "kivi2"}, "kv_format"),
        ({"cuda_graphs": True}, "cuda_graphs"),
    ],
)
def test_settings_that_it_cannot_hold_with_are_named(
    changes: dict[str, object], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(Path("model"), **changes)
    assert caught.value.field == field
    with pytest.raises(ConfigErrors):
        config_of(Path("model"), kv_format="kivi2", cuda_graphs=True)


@pytest.mark.parametrize(
    ("architecture", "overrides", "changes", "reason"),
    [
        (
            "GptOssForCausalLM",
            {"num_local_experts": 4, "num_experts_per_tok": 2},
            {},
            "is for Mixtral, OLMoE and Qwen3-MoE; got",
        ),
        ("LlamaForCausalLM", {}, {"dtype": "bfloat16"}, "float32 on CPUs"),
    ],
)
def test_models_that_it_cannot_hold_for_are_refused(
    architecture: str,
    overrides: dict[str, Any],
    changes: dict[str, object],
    reason: str,
    tmp_path: Path,
) -> None:
    model = make_small_model(architecture, tmp_path, **overrides)
    with pytest.raises(ConfigError, match=reason) as caught:
        local_executor(config_of(model, **changes))
    assert caught.value.field == "deterministic"


def test_graphs_are_off() -> None:
    config = config_of(Path("model"))
    assert not config.limits("cuda", 80 << 30).cuda_graphs
    assert config.replace(deterministic=False).limits("cuda", 80 << 30).cuda_graphs
