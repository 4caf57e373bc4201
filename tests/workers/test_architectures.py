"""Every architecture in the engine, with pages and chunks, against transformers' choices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.local import local_executor
from kvmesh.workers.request import EngineRequest, SequenceUsage
from kvmesh.workers.sampling_params import SamplingParams
from tests.model.cases import CASES, PROMPTS
from tests.model.small import first_choices, make_small_model, transformers_model

TOKENS = 24


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_engine_output_equals_transformers(case: str, tmp_path: Path) -> None:
    """Prompts in chunks of 16 tokens next to decoding ones, over several pages; with sequences
    that are preempted; and once more with prompts that are found in the cache."""
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, **overrides)
    config = EngineConfig(
        model=str(path),
        kv_format="exact",
        dtype="float32",
        device="cpu",
        page_size=16,
        kv_memory_bytes=32 << 20,
        max_num_batched_tokens=16,
        threads_per_rank=1,
    )
    engine = Engine(config, local_executor(config))
    outputs, usages = _generate(engine, preempt_at=(4, 20))
    assert sum(usage.preemptions for usage in usages) == 2
    again, usages = _generate(engine)
    cached = sum(usage.cached_tokens for usage in usages)
    assert cached >= 32 if engine.info.prefix_cache else cached == 0
    model = transformers_model(path)
    for index, prompt in enumerate(PROMPTS):
        assert len(outputs[index]) == TOKENS
        assert outputs[index] == first_choices(model, prompt, outputs[index])
        assert again[index] == outputs[index]


def _generate(
    engine: Engine, preempt_at: tuple[int, ...] = ()
) -> tuple[list[list[int]], list[SequenceUsage]]:
    """Outputs and usages of all prompts; before each of the steps, the youngest is preempted."""
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    for index, prompt in enumerate(PROMPTS):
        engine.add(EngineRequest(str(index), np.array(prompt, np.int32), params))
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(PROMPTS))}
    usages: list[SequenceUsage] = []
    step = 0
    while engine.has_work:
        if step in preempt_at:
            engine.scheduler.preempt_youngest()
        step += 1
        for delta in engine.step():
            outputs[delta.request_id].extend(delta.token_ids)
            usages += [delta.usage] if delta.usage else []
    engine.check_integrity()
    return list(outputs.values()), usages
