"""Every architecture in the engine, with pages and chunks, against transformers' generate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.local import local_executor
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams
from tests.model.cases import CASES, PROMPTS
from tests.model.small import make_small_model, transformers_model

TOKENS = 24


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_engine_output_equals_transformers(case: str, tmp_path: Path) -> None:
    """Prompts in chunks of 16 tokens next to decoding ones, over several pages."""
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
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    for index, prompt in enumerate(PROMPTS):
        ids = np.array(prompt, np.int32)
        engine.add(EngineRequest(str(index), ids, params))
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(PROMPTS))}
    while engine.has_work:
        for delta in engine.step():
            outputs[delta.request_id].extend(delta.token_ids)
    engine.check_integrity()
    model = transformers_model(path)
    for prompt, output in zip(PROMPTS, outputs.values(), strict=True):
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        assert output == generated[0, len(prompt) :].tolist()
