"""The configurations that are compared with transformers, one for each possible difference."""

from __future__ import annotations

from typing import Any

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

# name -> (architecture, overrides)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("LlamaForCausalLM", {"head_dim": 16}),
    "llama-llama3-rope": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "llama-linear-rope": ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-sliding": ("MistralForCausalLM", {"sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-sliding": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "qwen3-tied-sliding": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    ),
    "gemma": ("GemmaForCausalLM", {"head_dim": 16}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo-clip": ("OlmoForCausalLM", {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.25}),
    "cohere-qk-norm": ("CohereForCausalLM", {"use_qk_norm": True, "attention_bias": True}),
    "stablelm": (
        "StableLmForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "stablelm-norms": (
        "StableLmForCausalLM",
        {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    ),
}

PROMPTS = [
    [(7 * i + 3) % 131 for i in range(41)],
    [(11 * i + 5) % 131 for i in range(3)],
    [(5 * i * i + 1) % 131 for i in range(23)],
]
