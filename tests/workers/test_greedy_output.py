"""Greedy output of the embedded model: equal to transformers', and independent of how it is run.

Once it is whole; otherwise it is without most of its layers, which are all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.executor import Executor
from kvmesh.workers.local import local_executor
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.model.facts import eos_token_ids
from kvmesh.workers.model.source import resolve_model
from kvmesh.workers.model.tokenizer import Tokenizer
from tests.model.shallow import make_shallow, shallow_path
from tests.model.small import first_choices
from tests.workers.invariance import INVARIANT_TOKENS, Invariance, generate, tokens_of
from tests.workers.thread_ranks import ThreadRanks

pytestmark = pytest.mark.slow

TOKENS = 64
QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain to a child why the sky is blue.",
    "List five animals that live in the sea and say one thing about each.",
    "def fibonacci(n):",
]

CONFIG = EngineConfig(
    model=EMBEDDED_NAME,
    kv_format="exact",
    dtype="float32",
    device="cpu",
    kv_memory_bytes=400 << 20,
    kv_probe="off",
    threads_per_rank=1,  # spinning threads slow a shared machine down
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model(EMBEDDED_NAME, progress=None).path)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]


@pytest.fixture(scope="module")
def shallow() -> str:
    make_shallow()
    return str(shallow_path())


def by_engine(
    config: EngineConfig,
    prompts: list[list[int]],
    make_executor: Callable[[EngineConfig], Executor] = local_executor,
) -> list[list[int]]:
    executor = make_executor(config)
    try:
        engine = Engine(config, executor)
        return [tokens_of(deltas) for deltas in generate(engine, prompts, TOKENS)]
    finally:
        executor.close()


def check_greedy(path: Path, prompts: list[list[int]], outputs: list[list[int]]) -> None:
    """Against transformers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ends = eos_token_ids(path)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == TOKENS or output[-1] in ends
        assert output == first_choices(model, prompt, output)


def test_the_whole_model_equals_that_of_transformers(
    tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    outputs = by_engine(CONFIG, prompts)
    assert tokenizer.decode(outputs[0]).startswith("The capital of France is Paris")
    check_greedy(resolve_model(EMBEDDED_NAME).path, prompts, outputs)


@pytest.mark.parametrize(("tp", "kvp"), [(3, 1), (1, 3)])
def test_three_ranks_give_the_tokens_of_transformers(
    tp: int, kvp: int, shallow: str, prompts: list[list[int]]
) -> None:
    """Of 9 heads and 3 KV heads, or with every third page."""
    config = CONFIG.replace(model=shallow, tp=tp, kvp=kvp, page_size=16)
    check_greedy(shallow_path(), prompts, by_engine(config, prompts, ThreadRanks))


FORMATS = [
    pytest.param({"kv_format": "int8"}, id="int8"),
    pytest.param({"kv_format": "int4"}, id="int4"),
    pytest.param({"kv_format": "int4", "sink_pages": 1, "recent_pages": 2}, id="int4-windows"),
]


@pytest.fixture(scope="module", params=FORMATS)
def invariance(
    request: pytest.FixtureRequest, shallow: str, tokenizer: Tokenizer, prompts: list[list[int]]
) -> Invariance:
    preamble = tokenizer.encode(
        "You answer in plain words, from what you know, and say so when you do not know. " * 6,
        add_special_tokens=False,
    )
    config = CONFIG.replace(
        model=shallow,
        page_size=16,
        max_num_batched_tokens=64,
        prefix_cache=False,
        **request.param,
    )
    return Invariance(config, [preamble + prompt for prompt in prompts[:3]])


@pytest.mark.parametrize("chunk", [16, 512])
def test_output_does_not_depend_on_chunking(invariance: Invariance, chunk: int) -> None:
    config = invariance.config.replace(max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 16))
    engine = Engine(config, local_executor(config))
    invariance.check(invariance.one_by_one(engine))


def test_output_does_not_depend_on_the_batch(invariance: Invariance) -> None:
    engine = Engine(invariance.config, local_executor(invariance.config))
    others = [prompt[7 * i :] for i, prompt in enumerate(invariance.prompts * 4, 1)]
    outputs = generate(engine, invariance.prompts + others + [[1, 2, 3]], INVARIANT_TOKENS)
    assert len(outputs) == 16
    invariance.check(outputs[: len(invariance.prompts)])


def test_output_does_not_depend_on_the_prefix_cache(invariance: Invariance) -> None:
    config = invariance.config.replace(prefix_cache=True)
    engine = Engine(config, local_executor(config))
    cold = invariance.one_by_one(engine)
    warm = invariance.one_by_one(engine)
    for deltas in warm:
        assert deltas[-1].usage is not None and deltas[-1].usage.cached_tokens > 0
    invariance.check(cold)
    invariance.check(warm)


def test_output_does_not_depend_on_preemption(invariance: Invariance) -> None:
    invariance.check(invariance.preempted(steps=(12, 30)))
