"""The model architectures that kvmesh serves, and defaults their configurations leave out.

An allow-list: each was checked against transformers' own output with random
weights, see tests/model/. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Architecture:
    """A causal language model of transformers.

    model_type: its name in config.json
    kv_heads: default if the configuration has no `num_key_value_heads`; None for as many as heads
    head_dim: default if it has no `head_dim`; None for hidden_size // num_attention_heads
    interleaved_rope: RoPE's pairs are neighbouring channels, not the two halves of a head
    sliding: which layers attend through a sliding window, one of the names in `_SLIDING`
    """

    name: str
    model_type: str
    kv_heads: int | None = None
    head_dim: int | None = None
    interleaved_rope: bool = False
    sliding: str = "none"

    def sliding_windows(self, config: Mapping[str, Any]) -> tuple[int | None, ...]:
        """Each layer's window in tokens, including the query; None for the whole context."""
        return _SLIDING[self.sliding](config)


def _no_layer(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    return (None,) * int(config["num_hidden_layers"])


def _every_layer(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    return (config.get("sliding_window", 4096),) * int(config["num_hidden_layers"])


def _by_layer_types(config: Mapping[str, Any], types: list[str]) -> tuple[int | None, ...]:
    window = config.get("sliding_window", 4096)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _upper_layers(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Qwen2 and Qwen3: the layers from `max_window_layers` on, if enabled."""
    if not config.get("use_sliding_window", False):
        return _no_layer(config)
    first = int(config.get("max_window_layers", 28))
    types = config.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    return _by_layer_types(config, types)


def _even_layers(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Gemma 2: every other layer, starting with the first."""
    types = config.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    return _by_layer_types(config, types)


_SLIDING = {
    "none": _no_layer,
    "every layer": _every_layer,
    "upper layers": _upper_layers,
    "even layers": _even_layers,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("LlamaForCausalLM", "llama"),
        Architecture("MistralForCausalLM", "mistral", kv_heads=8, sliding="every layer"),
        Architecture("Qwen2ForCausalLM", "qwen2", kv_heads=32, sliding="upper layers"),
        Architecture(
            "Qwen3ForCausalLM", "qwen3", kv_heads=32, head_dim=128, sliding="upper layers"
        ),
        Architecture("GemmaForCausalLM", "gemma", kv_heads=16, head_dim=256),
        Architecture(
            "Gemma2ForCausalLM", "gemma2", kv_heads=4, head_dim=256, sliding="even layers"
        ),
        Architecture("OlmoForCausalLM", "olmo"),
        Architecture("Olmo2ForCausalLM", "olmo2"),
        Architecture("CohereForCausalLM", "cohere", interleaved_rope=True),
        Architecture("StableLmForCausalLM", "stablelm", kv_heads=32),
    )
}
