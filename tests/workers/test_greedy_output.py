"""Greedy output of the embedded model: equal to transformers', and the same however it is run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.calibration.calibrate import calibrate
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.local import local_executor
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.model.source import resolve_model
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.request import EngineRequest, SequenceDelta, TokenLogprobs
from kvmesh.workers.sampling_params import SamplingParams

TOKENS = 64
INVARIANT_TOKENS = 40
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
    threads_per_rank=1,  # spinning threads make a shared machine crawl
)

# Logits of one token, computed in products of other shapes, were seen to differ by some 1e-4 with
# fp32 weights; sealed codes then differ by a step now and then, which moves logits by about 1e-2.
NOISE = 0.05


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model(EMBEDDED_NAME, progress=None).path)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]


@pytest.fixture(scope="module")
def reference(prompts: list[list[int]]) -> list[list[int]]:
    """transformers' generate in fp32."""
    path = resolve_model(EMBEDDED_NAME, progress=None).path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def generate(
    engine: Engine, prompts: list[list[int]], max_tokens: int = TOKENS
) -> list[list[SequenceDelta]]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=2)
    for index, prompt in enumerate(prompts):
        ids = np.array(prompt, np.int32)
        engine.add(EngineRequest(str(index), "test", ids, params))
    deltas: dict[str, list[SequenceDelta]] = {str(i): [] for i in range(len(prompts))}
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    engine.check_integrity()
    return list(deltas.values())


def tokens_of(deltas: list[SequenceDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("tp", [1, 3])
def test_exact_fp32_equals_transformers(
    tp: int, prompts: list[list[int]], reference: list[list[int]]
) -> None:
    config = dataclasses.replace(CONFIG, tp=tp, threads_per_rank=1)
    executor = local_executor(config)
    try:
        engine = Engine(config, executor)
        outputs = [tokens_of(deltas) for deltas in generate(engine, prompts)]
    finally:
        executor.close()
    assert outputs == reference


class Invariance:
    """Outputs of one configuration, against the same prompts run alone."""

    def __init__(self, config: EngineConfig, prompts: list[list[int]]) -> None:
        self.config = config
        self.prompts = prompts
        engine = Engine(config, local_executor(config))
        self.alone = self.one_by_one(engine)

    def one_by_one(self, engine: Engine) -> list[list[SequenceDelta]]:
        return [generate(engine, [prompt], INVARIANT_TOKENS)[0] for prompt in self.prompts]

    def check(self, outputs: list[list[SequenceDelta]]) -> None:
        """Equal, but for a rare token whose rival's logit lies within the noise."""
        differing = 0
        for alone, other in zip(self.alone, outputs, strict=True):
            pairs = list(zip(_flat(alone), _flat(other), strict=False))
            at = next((i for i, (a, b) in enumerate(pairs) if a[0] != b[0]), None)
            if at is None:
                assert len(_flat(alone)) == len(_flat(other))
                continue
            differing += 1
            for _, logprobs in pairs[at]:
                (_, best), (_, second) = logprobs.top
                assert best - second < NOISE, f"token {at} differs by more than noise"
        assert differing <= 1


def _flat(deltas: list[SequenceDelta]) -> list[tuple[int, TokenLogprobs]]:
    return [pair for delta in deltas for pair in zip(delta.token_ids, delta.logprobs, strict=True)]


FORMATS = [
    pytest.param({"kv_format": "int8"}, id="int8"),
    pytest.param({"kv_format": "int4"}, id="int4"),
    pytest.param({"kv_format": "int4", "sink_pages": 1, "recent_pages": 2}, id="int4-windows"),
    pytest.param({"kv_format": "nuq4"}, id="nuq4"),
]


@pytest.fixture(scope="module", params=FORMATS)
def invariance(
    request: pytest.FixtureRequest,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Invariance:
    preamble = tokenizer.encode(
        "You answer in plain words, from what you know, and say so when you do not know. " * 6,
        add_special_tokens=False,
    )
    options = dict(request.param)
    if get_format(options["kv_format"]).needs_calibration:
        file = tmp_path_factory.mktemp("calibration") / "file"
        text = " ".join(QUESTIONS) * 6
        found = calibrate(EMBEDDED_NAME, options["kv_format"], text, samples=2, context=128)
        found.save(file)
        options["calibration"] = str(file)
    config = dataclasses.replace(
        CONFIG, page_size=16, max_num_batched_tokens=64, prefix_cache=False, **options
    )
    return Invariance(config, [preamble + prompt for prompt in prompts[:3]])


@pytest.mark.parametrize("chunk", [16, 512])
def test_output_does_not_depend_on_chunking(invariance: Invariance, chunk: int) -> None:
    config = dataclasses.replace(
        invariance.config, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 16)
    )
    engine = Engine(config, local_executor(config))
    invariance.check(invariance.one_by_one(engine))


def test_output_does_not_depend_on_the_batch(invariance: Invariance) -> None:
    engine = Engine(invariance.config, local_executor(invariance.config))
    others = [prompt[7 * i :] for i, prompt in enumerate(invariance.prompts * 4, 1)]
    outputs = generate(engine, invariance.prompts + others + [[1, 2, 3]], INVARIANT_TOKENS)
    assert len(outputs) == 16
    invariance.check(outputs[: len(invariance.prompts)])


def test_output_does_not_depend_on_the_prefix_cache(invariance: Invariance) -> None:
    config = dataclasses.replace(invariance.config, prefix_cache=True)
    engine = Engine(config, local_executor(config))
    cold = invariance.one_by_one(engine)
    warm = invariance.one_by_one(engine)
    for deltas in warm:
        assert deltas[-1].usage is not None and deltas[-1].usage.cached_tokens > 0
    invariance.check(cold)
    invariance.check(warm)


def test_output_does_not_depend_on_preemption(invariance: Invariance) -> None:
    engine = Engine(invariance.config, local_executor(invariance.config))
    params = SamplingParams(temperature=0.0, max_tokens=INVARIANT_TOKENS, logprobs=2)
    deltas: dict[str, list[SequenceDelta]] = {}
    for index, prompt in enumerate(invariance.prompts):
        ids = np.array(prompt, np.int32)
        engine.add(EngineRequest(str(index), "test", ids, params))
        deltas[str(index)] = []
    for step in range(10_000):
        if not engine.has_work:
            break
        if step in (12, 30):  # in the midst of decoding, two at a time
            engine.scheduler.preempt_youngest()
            engine.scheduler.preempt_youngest()
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    assert sum(d[-1].usage.preemptions for d in deltas.values() if d[-1].usage) == 4
    invariance.check(list(deltas.values()))
