"""The configurations of well-known models, to plan for one that is not on this machine.

Each is what its config.json on the hub says, as far as a plan depends on it. A directory or a
config.json that is given takes precedence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class KnownModel:
    """hub: its name on Hugging Face's hub; config: of its config.json"""

    hub: str
    config: Mapping[str, Any]


_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_LLAMA_7B = _LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
_LLAMA_3_8B = _LLAMA_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
_LLAMA_3_70B = _LLAMA_3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
_LLAMA_3_1 = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN_2_5_7B_1M = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 1010000,
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    },
}
_QWEN_3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
_DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
}

KNOWN_MODELS: Mapping[str, KnownModel] = {
    "llama-7b": KnownModel("huggyllama/llama-7b", _LLAMA_7B | {"max_position_embeddings": 2048}),
    "llama-2-7b": KnownModel("NousResearch/Llama-2-7b-hf", _LLAMA_7B),
    "llama-3-8b": KnownModel("meta-llama/Meta-Llama-3-8B", _LLAMA_3_8B),
    "llama-3.1-8b": KnownModel("meta-llama/Llama-3.1-8B", _LLAMA_3_8B | _LLAMA_3_1),
    # Trained on with another RoPE base; its sizes are those of Llama 3.
    "llama-3-8b-1048k": KnownModel(
        "gradientai/Llama-3-8B-Instruct-Gradient-1048k",
        _LLAMA_3_8B | {"max_position_embeddings": 1048576},
    ),
    "llama-3-70b": KnownModel("meta-llama/Meta-Llama-3-70B", _LLAMA_3_70B),
    "llama-3-70b-1048k": KnownModel(
        "gradientai/Llama-3-70B-Instruct-Gradient-1048k",
        _LLAMA_3_70B | {"max_position_embeddings": 1048576},
    ),
    "llama-3.1-70b": KnownModel("meta-llama/Llama-3.1-70B", _LLAMA_3_70B | _LLAMA_3_1),
    "qwen2.5-7b-1m": KnownModel("Qwen/Qwen2.5-7B-Instruct-1M", _QWEN_2_5_7B_1M),
    "qwen2.5-14b-1m": KnownModel(
        "Qwen/Qwen2.5-14B-Instruct-1M",
        _QWEN_2_5_7B_1M
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
        },
    ),
    "qwen3-4b": KnownModel(
        "Qwen/Qwen3-4B",
        _QWEN_3_8B | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    ),
    "qwen3-8b": KnownModel("Qwen/Qwen3-8B", _QWEN_3_8B),
    "qwen3-30b-a3b": KnownModel(
        "Qwen/Qwen3-30B-A3B",
        _QWEN_3_8B
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
        },
    ),
    "deepseek-v2-lite": KnownModel("deepseek-ai/DeepSeek-V2-Lite", _DEEPSEEK_V2_LITE),
    "deepseek-v3": KnownModel(
        "deepseek-ai/DeepSeek-V3",
        _DEEPSEEK_V2_LITE
        | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 3,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "q_lora_rank": 1536,
            "vocab_size": 129280,
        },
    ),
    "smollm2-135m-instruct": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        _LLAMA
        | {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
}
