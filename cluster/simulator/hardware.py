"""The accelerators and models that groups can have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmesh.workers.model.architectures import ARCHITECTURES
from kvmesh.workers.model.facts import read_json
from kvmesh.workers.model.standard_keys import standard_keys
from kvmesh.workers.page_geometry import KVShape


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device's data sheet, and the shares of it that serving reaches.

    flops: dense bf16, per second; bandwidth: bytes per second; memory_bytes: total
    nvml_bytes: what nvidia-smi reports in all, which is more: a data sheet's 80 GB are 80 GiB
    prefill_share: of flops, in matrix products of prompts
    attention_share: of flops, in attention over prompts
    bandwidth_share: when weights and KV pages are read
    step_s: fixed time of a step: launch, scheduling, sampling
    """

    name: str
    flops: float
    bandwidth: float
    memory_bytes: int
    nvml_bytes: int
    prefill_share: float = 0.55
    attention_share: float = 0.40
    bandwidth_share: float = 0.75
    step_s: float = 0.002


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a decoder that determine its cost.

    params: those that a token is multiplied with
    layers: those with keys and values
    idle_params: besides, of experts that it is not sent to, and of embeddings
    values_in_keys: how many channels of a key are its value; 0 if values are of their own
    """

    name: str
    params: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_model_len: int
    idle_params: float = 0.0
    values_in_keys: int = 0

    @property
    def kv(self) -> KVShape:
        """What a token's keys and values are."""
        return KVShape(
            self.layers, self.kv_heads, self.head_dim, values_in_keys=self.values_in_keys
        )


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 989e12, 3.35e12, 80 * 10**9, 81559 << 20),
        Gpu("h200", 989e12, 4.8e12, 141 * 10**9, 143771 << 20),
        Gpu("a100-80g", 312e12, 2.0e12, 80 * 10**9, 81920 << 20),
        Gpu("a100-40g", 312e12, 1.55e12, 40 * 10**9, 40960 << 20),
        Gpu("l40s", 362e12, 0.864e12, 48 * 10**9, 46068 << 20),
        Gpu("l4", 121e12, 0.3e12, 24 * 10**9, 23034 << 20),
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
        # InternLM's first release; LMDeploy published its memory by batch.
        ModelShape("internlm-chat-7b", 6.9e9, 32, 32, 32, 128, 1 << 21, idle_params=0.42e9),
        ModelShape("smollm2-135m", 0.135e9, 30, 9, 3, 64, 8192),
    )
}


def model_shape(name: str) -> ModelShape:
    """A model by its name in MODELS, its directory, or its config.json.

    Raises ValueError if there is none, ConfigError if its configuration does not say what it costs.
    """
    path = Path(os.path.expanduser(name))
    if name in MODELS:
        return MODELS[name]
    if not path.exists():
        known = ", ".join(MODELS)
        raise ValueError(
            f"model must be a directory, a config.json or one of {known}; got {name!r}"
        )
    return _shape_of(path / "config.json" if path.is_dir() else path)


def _shape_of(file: Path) -> ModelShape:
    found = standard_keys(read_json(file), file)
    config: Mapping[str, Any] = found.get("text_config") or found

    def number(*keys: str, default: int | None = None) -> int:
        """The first of the keys that is there."""
        value = next((config[key] for key in keys if config.get(key)), default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{file}: {keys[0]} must be a number of at least 1, got {value!r}")
        return value

    if config.get("kv_lora_rank"):
        raise ValueError(f"{file}: latent attention (kv_lora_rank) is not modelled")
    hidden, layers = number("hidden_size"), number("num_hidden_layers")
    heads = number("num_attention_heads")
    kv_heads = number("num_key_value_heads", default=heads)
    head_dim = number("head_dim", default=hidden // heads)
    experts = number("num_local_experts", "num_experts", default=1)
    used = number("num_experts_per_tok", default=1)
    known = ARCHITECTURES.get((config.get("architectures") or [""])[0])
    dense = known.mlp_key(config) if known and not known.experts_in(config) else "intermediate_size"
    width = number("moe_intermediate_size", dense)
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    expert, embedding = 3 * hidden * width, hidden * number("vocab_size")
    untied = not config.get("tie_word_embeddings", False)
    recurrent = sum(known.recurrent_layers(config)) if known else 0
    return ModelShape(
        name=file.parent.resolve().name,
        params=float(layers * (attention + used * expert) + embedding),
        layers=layers - recurrent,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=1 << 21,
        idle_params=float(layers * (experts - used) * expert + untied * embedding),
    )
