"""The accelerators and models that groups can have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device's data sheet, and the shares of it that serving reaches.

    flops: dense bf16, per second; bandwidth: bytes per second; memory_bytes: total
    prefill_share: of flops, in matrix products of prompts
    attention_share: of flops, in attention over prompts
    bandwidth_share: when weights and KV pages are read
    step_s: fixed time of a step: launch, scheduling, sampling
    """

    name: str
    flops: float
    bandwidth: float
    memory_bytes: int
    prefill_share: float = 0.55
    attention_share: float = 0.40
    bandwidth_share: float = 0.75
    step_s: float = 0.002


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a decoder that determine its cost.

    params: those that a token is multiplied with
    """

    name: str
    params: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_model_len: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 989e12, 3.35e12, 80 * 10**9),
        Gpu("h200", 989e12, 4.8e12, 141 * 10**9),
        Gpu("a100-80g", 312e12, 2.0e12, 80 * 10**9),
        Gpu("a100-40g", 312e12, 1.55e12, 40 * 10**9),
        Gpu("l40s", 362e12, 0.864e12, 48 * 10**9),
        Gpu("l4", 121e12, 0.3e12, 24 * 10**9),
    )
}

# Contexts are longer than the models': the simulator does not compute positions.
MODELS = {
    model.name: model
    for model in (
        ModelShape("llama-3-8b", 8.0e9, 32, 32, 8, 128, 1 << 21),
        ModelShape("llama-3-70b", 70.6e9, 80, 64, 8, 128, 1 << 21),
        ModelShape("qwen2.5-7b", 7.6e9, 28, 28, 4, 128, 1 << 21),
        ModelShape("qwen2.5-14b", 14.8e9, 48, 40, 8, 128, 1 << 21),
        ModelShape("llama-2-7b", 6.7e9, 32, 32, 32, 128, 1 << 21),
        ModelShape("smollm2-135m", 0.135e9, 30, 9, 3, 64, 8192),
    )
}
