"""The config.json of a model in a GGUF file, from the file's metadata. Torch-free.

The keys are those that llama.cpp writes for an architecture. Whatever is not read here might
change what the model computes, so it is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvmesh.workers.model.gguf_metadata import GGUFMetadata

_REQUIRED = (
    ("attention.head_count", "num_attention_heads"),
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
)


Config = dict[str, Any]


def config_of_gguf(metadata: GGUFMetadata) -> Config:
    """The config.json. Raises UnsupportedModelError for what it cannot express."""
    build = _ARCHITECTURES.get(metadata.architecture)
    if build is None:
        raise metadata.refused(
            f"GGUF files of architecture {metadata.architecture!r} are not supported, only of"
            f" {', '.join(_ARCHITECTURES)}"
        )
    config = build(metadata, _common(metadata))
    metadata.check_all_read()
    return config


def _common(metadata: GGUFMetadata) -> Config:
    config: Config = {theirs: metadata.number(ours) for ours, theirs in _REQUIRED}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = metadata.number("attention.head_count_kv", heads)
    head_dim = config["hidden_size"] // heads
    config["head_dim"] = metadata.take("attention.key_length") or head_dim
    epsilon = metadata.take("attention.layer_norm_rms_epsilon")
    if epsilon is not None:
        config["rms_norm_eps"] = epsilon
    if "token_embd.weight" not in metadata.shapes:
        raise metadata.refused("it has no tensor token_embd.weight")
    config["vocab_size"] = metadata.shapes["token_embd.weight"][0]
    metadata.expect("vocab_size", config["vocab_size"], "vocabulary")
    if len(metadata.tokens) > config["vocab_size"]:
        raise metadata.refused(
            f"its tokenizer has {len(metadata.tokens):,} tokens, but its vocabulary"
            f" {config['vocab_size']:,}"
        )
    config["tie_word_embeddings"] = "output.weight" not in metadata.shapes
    config |= {"eos_token_id": metadata.stop_tokens() or None, "pad_token_id": None}
    return config


def _whole_heads(metadata: GGUFMetadata, config: Config) -> None:
    """RoPE on all channels of heads."""
    for name in ("attention.value_length", "rope.dimension_count"):
        metadata.expect(name, config["head_dim"], "head_dim")


def _drop_head_dim(metadata: GGUFMetadata, config: Config) -> None:
    """For architectures whose heads divide the hidden size."""
    if config.pop("head_dim") * config["num_attention_heads"] != config["hidden_size"]:
        raise metadata.refused("its heads do not divide its hidden size")


def _theta(metadata: GGUFMetadata, default: float = 10000.0) -> float:
    return metadata.real("rope.freq_base", default)


def _llama(metadata: GGUFMetadata, config: Config) -> Config:
    if not metadata.take("attention.key_length"):  # older files have only the other one
        config["head_dim"] = metadata.take("rope.dimension_count") or config["head_dim"]
    _whole_heads(metadata, config)
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config["attention_bias"] = "blk.0.attn_q.bias" in metadata.shapes
    config["mlp_bias"] = "blk.0.ffn_up.bias" in metadata.shapes
    theta = _theta(metadata)
    config["rope_parameters"] = _llama3_rope(metadata, theta, config["head_dim"])
    return config


def _llama3_rope(metadata: GGUFMetadata, theta: float, head_dim: int) -> Config:
    """Llama 3 scaling, which llama.cpp stores as the divisors of all frequencies."""
    divisors = metadata.take_factors("rope_freqs.weight")
    if divisors is None:
        return {"rope_type": "default", "rope_theta": theta}
    factor = max(divisors)
    scaled = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        smooth = min(max((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if len(divisors) != len(expected) or not np.allclose(divisors, expected, rtol=1e-4):
        raise metadata.refused("rope_freqs.weight is not the RoPE scaling of Llama 3")
    return scaled


def _qwen2(metadata: GGUFMetadata, config: Config) -> Config:
    _whole_heads(metadata, config)
    _drop_head_dim(metadata, config)
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return config | {"rope_theta": _theta(metadata)}


def _qwen3(metadata: GGUFMetadata, config: Config) -> Config:
    _whole_heads(metadata, config)
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return config | {"rope_theta": _theta(metadata)}


def _qwen3_moe(metadata: GGUFMetadata, config: Config) -> Config:
    _whole_heads(metadata, config)
    config |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    config |= {
        "moe_intermediate_size": metadata.number("expert_feed_forward_length"),
        "norm_topk_prob": True,  # as llama.cpp computes them
        "num_experts": metadata.number("expert_count"),
        "num_experts_per_tok": metadata.number("expert_used_count"),
    }
    return config | {"rope_theta": _theta(metadata)}


def _gemma2(metadata: GGUFMetadata, config: Config) -> Config:
    _whole_heads(metadata, config)
    config |= {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    config |= _windows(metadata, config, period=2, default=4096)
    config |= {
        "attn_logit_softcapping": metadata.take("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.take("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=46),
    }
    return config | {"rope_theta": _theta(metadata)}


def _gemma3(metadata: GGUFMetadata, config: Config) -> Config:
    _whole_heads(metadata, config)
    config |= {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    config |= _windows(metadata, config, period=6, default=1024)
    config |= {
        "final_logit_softcapping": metadata.take("final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=62),
        "rope_parameters": {
            "full_attention": _linear_rope(metadata, _theta(metadata, 1e6)),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": metadata.real("rope.freq_base_swa", 10000.0),
            },
        },
    }
    return config


def _query_scalar(config: Config, layers_of_27b: int) -> int:
    """GGUF does not say it: llama.cpp knows the models of 27B, which differ, by their layers."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _linear_rope(metadata: GGUFMetadata, theta: float) -> Config:
    kind = metadata.take("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind != "linear":
        raise metadata.refused(f"its RoPE scaling {kind!r} is not supported here, only 'linear'")
    factor = metadata.real("rope.scaling.factor")
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _windows(metadata: GGUFMetadata, config: Config, *, period: int, default: int) -> Config:
    """The window, and which layers have it: all but the last of each `period`, unless said."""
    pattern = metadata.take("attention.sliding_window_pattern", period)
    layers = config["num_hidden_layers"]
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
    if len(pattern) != layers:
        raise metadata.refused("attention.sliding_window_pattern is not of its layers")
    kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    window = metadata.number("attention.sliding_window", default)
    return {"sliding_window": window, "layer_types": kinds}


def _olmo2(metadata: GGUFMetadata, config: Config) -> Config:
    """OLMo 2, or OLMo 3, which has windows."""
    _whole_heads(metadata, config)
    _drop_head_dim(metadata, config)
    theta = _theta(metadata)
    if metadata.take("attention.sliding_window") is None:
        config |= {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
        return config | {"rope_theta": theta}
    config |= {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"}
    config |= _windows(metadata, config, period=4, default=4096)
    plain = {"rope_type": "default", "rope_theta": theta}
    scaled = plain
    kind = metadata.take("rope.scaling.type", "none")
    if kind == "yarn":
        scaled = plain | {
            "rope_type": "yarn",
            "factor": metadata.real("rope.scaling.factor"),
            "attention_factor": metadata.real("rope.scaling.attn_factor"),
            "original_max_position_embeddings": metadata.number(
                "rope.scaling.original_context_length"
            ),
        }
    elif kind != "none":
        raise metadata.refused(f"its RoPE scaling {kind!r} is not supported here, only 'yarn'")
    config["rope_parameters"] = {"full_attention": scaled, "sliding_attention": plain}
    return config


def _phi3(metadata: GGUFMetadata, config: Config) -> Config:
    metadata.expect("attention.value_length", config["head_dim"], "head_dim")
    head_dim = config["head_dim"]
    _drop_head_dim(metadata, config)
    config |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    rope: Config = {"rope_type": "default", "rope_theta": _theta(metadata)}
    rotary = metadata.number("rope.dimension_count", head_dim)
    if rotary != head_dim:
        rope["partial_rotary_factor"] = rotary / head_dim
    positions = config["max_position_embeddings"]
    original = metadata.number("rope.scaling.original_context_length", positions)
    config["original_max_position_embeddings"] = original
    long, short = (
        metadata.take_factors(f"rope_factors_{kind}.weight") for kind in ("long", "short")
    )
    if long is not None and short is not None:
        rope |= {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        rope["original_max_position_embeddings"] = original
        attention = metadata.take("rope.scaling.attn_factor")
        if attention is not None:
            rope["attention_factor"] = float(attention)
    config["rope_parameters"] = rope
    config["sliding_window"] = metadata.take("attention.sliding_window") or None
    return config


_ARCHITECTURES: Mapping[str, Callable[[GGUFMetadata, Config], Config]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
}
