"""A tiny model with random weights, and LLMs of it."""

from __future__ import annotations

from typing import Any

from kvmesh import LLM, SamplingParams
from tests.workers.structured.tiny import model_path

ENGINE: dict[str, Any] = {
    "kv_format": "exact",
    "page_size": 16,
    "kv_memory_bytes": "32MiB",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "threads_per_rank": 1,
    "kv_probe": "off",
}
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def tiny_llm(**settings: Any) -> LLM:
    return LLM(model_path(), **{**ENGINE, **settings})
