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
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
# transformers chooses the factors by each prompt's length; test_rope.py tests the choice here.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.2, 3.0],
    "long_factor": [1.2, 3.0],
    "original_max_position_embeddings": 16,
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
BY_LAYER_TYPE = {
    "full_attention": YARN,
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}

_LATENT = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}

# name -> (architecture, overrides)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("LlamaForCausalLM", {"head_dim": 16}),
    "llama-llama3-rope": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "llama-linear-rope": ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "llama-dynamic-rope": ("LlamaForCausalLM", {"rope_parameters": DYNAMIC}),
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
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": 7,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3-yarn": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": BY_LAYER_TYPE,
        },
    ),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo-clip": ("OlmoForCausalLM", {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {"num_hidden_layers": 4, "sliding_window": 7}),
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.25}),
    "cohere-qk-norm": ("CohereForCausalLM", {"use_qk_norm": True, "attention_bias": True}),
    "cohere2": (
        "Cohere2ForCausalLM",
        {"num_hidden_layers": 4, "sliding_window": 7, "logit_scale": 0.25},
    ),
    "stablelm": ("StableLmForCausalLM", {"rope_parameters": PARTIAL}),
    "stablelm-norms": (
        "StableLmForCausalLM",
        {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    ),
    "phi3": ("Phi3ForCausalLM", {}),
    "phi3-sliding-partial": (
        "Phi3ForCausalLM",
        {"sliding_window": 7, "rope_parameters": PARTIAL},
    ),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {"num_hidden_layers": 4}),
    "smollm3-sliding": (
        "SmolLM3ForCausalLM",
        {
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 7,
            "mlp_bias": True,
            "attention_bias": True,
        },
    ),
    "granite": (
        "GraniteForCausalLM",
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "logits_scaling": 1.5,
            "residual_multiplier": 0.7,
        },
    ),
    "glm": ("GlmForCausalLM", {"head_dim": 16}),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 16, "attention_bias": False}),
    "seed-oss": ("SeedOssForCausalLM", {"head_dim": 16, "attention_out_bias": True}),
    "ministral": (
        "MinistralForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "internlm2": ("InternLM2ForCausalLM", {"bias": True, "rope_parameters": DYNAMIC}),
    "internlm3": ("InternLM3ForCausalLM", {"head_dim": 16, "rope_parameters": DYNAMIC}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-sliding": (
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
    ),
    "dbrx": (
        "DbrxForCausalLM",
        {
            "d_model": 64,
            "n_heads": 8,
            "n_layers": 3,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 4, "clip_qkv": 0.5, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "layer_types": [*("linear_attention",) * 2, "full_attention", "linear_attention"],
            "rms_norm_eps": 1e-3,  # norms of small outputs enlarge rounding
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [1],
        },
    ),
    "recurrent-gemma": (
        "RecurrentGemmaForCausalLM",
        {
            "num_hidden_layers": 4,
            "attention_window_size": 7,
            "block_types": ["recurrent", "attention"],
            "logits_soft_cap": 3.0,
        },
    ),
    "qwen3.5": (
        "Qwen3_5ForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "layer_types": [*("linear_attention",) * 2, "full_attention", "linear_attention"],
            "rms_norm_eps": 1e-3,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
    ),
    "qwen3.5-moe": (
        "Qwen3_5MoeForCausalLM",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "rms_norm_eps": 1e-3,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "granite-hybrid": (
        "GraniteMoeHybridForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": [*("mamba",) * 2, "attention", "mamba"],
            "mamba_n_heads": 16,
            "mamba_d_head": 8,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,  # a norm over all ranks' channels
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "logits_scaling": 1.5,
            "residual_multiplier": 0.7,
            "intermediate_size": 32,
            "shared_intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "granite-hybrid-dense": (
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": ["mamba", "attention", "attention"],
            "position_embedding_type": "rope",
            "mamba_n_heads": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 2,
            "mamba_conv_bias": False,
            "shared_intermediate_size": 96,
            "num_local_experts": 0,
        },
    ),
    "bamba": (
        "BambaForCausalLM",
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 4,
            "mamba_d_conv": 3,
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "intermediate_size": 32,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 24,
            "floor_scale": 8,
            "attn_scale": 0.5,
        },
    ),
    "llama4-all-experts": (
        "Llama4ForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": 2,
            "intermediate_size": 32,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
            "attn_temperature_tuning": False,
            "use_qk_norm": False,
            "attention_bias": True,
        },
    ),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        {
            **_LATENT,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5},
        },
    ),
    "deepseek-v2-groups": (
        "DeepseekV2ForCausalLM",
        {
            **_LATENT,
            "attention_bias": True,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {
            **_LATENT,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_group": 3,
            "topk_group": 2,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "glm4-moe-lite": (
        "Glm4MoeLiteForCausalLM",
        {**_LATENT, "n_shared_experts": 1, "norm_topk_prob": False, "rope_interleave": False},
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.5},
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "swiglu_limit": 0.5,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
}

PROMPTS = [
    [(7 * i + 3) % 131 for i in range(41)],
    [(11 * i + 5) % 131 for i in range(3)],
    [(5 * i * i + 1) % 131 for i in range(23)],
]
