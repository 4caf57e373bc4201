"""Keys of config.json: real models load, and what kvmesh would ignore is refused by name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.architectures import ARCHITECTURES
from kvmesh.workers.model.config_keys import keys_not_implemented
from kvmesh.workers.model.facts import check_supported, read_facts
from kvmesh.workers.model.sizes import ModelSizes
from kvmesh.workers.model.standard_keys import standard_keys
from kvmesh.workers.model.stored import config_of as transformers_config
from kvmesh.workers.model.text_part import WRAPPERS
from kvmesh.workers.model.weight_counts import WeightCounts
from kvmesh.workers.rope_override import RopeOverride
from tests.model.small import change_config, make_small_model

# Configurations with the keys that those of published models have.
PUBLISHED: dict[str, str] = {
    "Llama-2-7b": """{"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures":
        ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,
        "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": true,
        "vocab_size": 32000}""",
    "vicuna-7b-v1.5": """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "max_sequence_length": 2048,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "tie_word_embeddings": false,
        "torch_dtype": "float16", "use_cache": true, "vocab_size": 32000}""",
    "Llama-3.2-1B": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0",
        "use_cache": true, "vocab_size": 128256, "unsloth_fixed": true}""",
    "SmolLM2-135M-Instruct": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version":
        "4.42.3", "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "use_cache": true, "vocab_size": 49152}""",
    "Mistral-7B-v0.1": """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version":
        "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}""",
    "Qwen1.5-7B-Chat": """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version":
        "4.37.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
    "Qwen2.5-0.5B": """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": true,
        "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}""",
    "Qwen3-4B": """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36,
        "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null,
        "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "gemma-2b": """{"architectures": ["GemmaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256,
        "hidden_act": "gelu", "hidden_activation": null, "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192,
        "model_type": "gemma", "num_attention_heads": 8, "num_hidden_layers": 18,
        "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": null,
        "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version":
        "4.38.0.dev0", "use_cache": true, "vocab_size": 256000}""",
    "gemma-2-9b": """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192,
        "model_type": "gemma2", "num_attention_heads": 16, "num_hidden_layers": 42,
        "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "sliding_window_size": 4096, "torch_dtype": "float32", "transformers_version":
        "4.42.0.dev0", "use_cache": true, "vocab_size": 256000}""",
    "OLMo-1.7-7B-hf": """{"architectures": ["OlmoForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "clip_qkv": 8.0, "eos_token_id": 50279, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "olmo", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 1,
        "pretraining_tp": 1, "rope_scaling": null, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "torch_dtype": "float32", "transformers_version":
        "4.40.0.dev0", "use_cache": true, "vocab_size": 50304}""",
    "OLMo-2-1124-7B": """{"architectures": ["Olmo2ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 500000,
        "tie_word_embeddings": false, "torch_dtype": "float32", "transformers_version":
        "4.47.0.dev0", "use_cache": false, "vocab_size": 100352}""",
    "c4ai-command-r-v01": """{"architectures": ["CohereForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 5, "eos_token_id": 255001,
        "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02,
        "intermediate_size": 22528, "layer_norm_eps": 1e-05, "logit_scale": 0.0625,
        "max_position_embeddings": 8192, "model_max_length": 131072, "model_type": "cohere",
        "num_attention_heads": 64, "num_hidden_layers": 40, "num_key_value_heads": 64,
        "pad_token_id": 0, "rope_theta": 8000000.0, "torch_dtype": "float16",
        "transformers_version": "4.38.2", "use_cache": true, "vocab_size": 256000}""",
    "stablelm-2-1_6b": """{"architectures": ["StableLmForCausalLM"], "bos_token_id": 100257,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5632, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 4096, "model_type": "stablelm", "num_attention_heads": 32,
        "num_hidden_layers": 24, "num_key_value_heads": 32, "partial_rotary_factor": 0.25,
        "rope_theta": 10000, "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.38.0", "use_cache": true, "use_qkv_bias": true,
        "vocab_size": 100352}""",
    "Mistral-Small-24B-Instruct-2501": """{"architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size":
        32768, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta":
        100000000.0, "sliding_window": null, "tie_word_embeddings": false, "torch_dtype":
        "bfloat16", "transformers_version": "4.49.0.dev0", "use_cache": true, "vocab_size":
        131072}""",
    "gemma-3-1b-it": """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_logit_softcapping": null, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": null,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps":
        1e-06, "rope_local_base_freq": 10000, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144}""",
    "Olmo-3-7B-Instruct": """{"architectures": ["Olmo3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "layer_types": ["sliding_attention",
        "sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
        "sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
        "sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
        "sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
        "sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
        "sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
        "sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
        "sliding_attention", "sliding_attention", "full_attention"], "max_position_embeddings":
        65536, "model_type": "olmo3", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling":
        {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn"}, "rope_theta": 500000,
        "sliding_window": 4096, "tie_word_embeddings": false, "transformers_version": "4.57.1",
        "use_cache": false, "vocab_size": 100278}""",
    "c4ai-command-r7b-12-2024": """{"architectures": ["Cohere2ForCausalLM"], "attention_bias":
        false, "attention_dropout": 0.0, "bos_token_id": 5, "cache_implementation": "hybrid",
        "eos_token_id": 255001, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "layer_norm_eps": 1e-05,
        "layer_switch": 4, "logit_scale": 0.25, "max_position_embeddings": 132096, "model_type":
        "cohere2", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "order_of_interleaved_layers": "local_attn_first", "pad_token_id": 0,
        "position_embedding_type": "rope_gptj", "rope_scaling": null, "rope_theta": 50000,
        "rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern": 4, "torch_dtype":
        "bfloat16", "transformers_version": "4.48.0.dev0", "use_cache": true,
        "use_embedding_sharing": true, "use_gated_activation": true, "use_parallel_block": true,
        "use_parallel_embedding": true, "vocab_size": 256000}""",
    "Phi-3-mini-128k-instruct": """{"_name_or_path": "Phi-3-mini-128k-instruct", "architectures":
        ["Phi3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "auto_map":
        {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM":
        "modeling_phi3.Phi3ForCausalLM"}, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id":
        32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "model_type": "phi3",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05, "rope_scaling": {"long_factor": [1.07, 1.07, 1.07, 1.07, 1.07, 1.07,
        1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07,
        1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07,
        1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07], "short_factor":
        [1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1,
        1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1,
        1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1], "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": true,
        "vocab_size": 32064}""",
    "Phi-4-mini-instruct": """{"architectures": ["Phi3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "bos_token_id": 199999,
        "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu",
        "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
        "interpolate_factor": 1, "lm_head_bias": false, "max_position_embeddings": 131072,
        "mlp_bias": false, "model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "pad_token_id": 199999,
        "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling":
        {"long_factor": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0,
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0,
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "short_factor":
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0,
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0,
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": true, "torch_dtype":
        "bfloat16", "transformers_version": "4.45.0", "use_cache": true, "vocab_size": 200064}""",
    "SmolLM3-3B": """{"architectures": ["SmolLM3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": null, "eos_token_id": 128012, "hidden_act":
        "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
        "layer_types": ["full_attention", "full_attention", "full_attention", "full_attention",
        "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
        "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
        "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
        "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
        "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
        "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
        "full_attention", "full_attention"], "max_position_embeddings": 65536, "max_window_layers":
        28, "mlp_bias": false, "model_type": "smollm3", "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0,
        1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0], "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps":
        1e-06, "rope_scaling": null, "rope_theta": 5000000.0, "sliding_window": null, "torch_dtype":
        "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": false, "use_sliding_window":
        false, "vocab_size": 128256}""",
    "granite-3.3-8b-instruct": """{"architectures": ["GraniteForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attention_multiplier": 0.0078125, "bos_token_id": 0,
        "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 12800, "logits_scaling": 16.0,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "granite",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 10000000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.49.0", "use_cache": true, "vocab_size": 49159}""",
    "glm-4-9b-chat-hf": """{"architectures": ["GlmForCausalLM"], "attention_bias": true,
        "attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338], "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size":
        13696, "max_position_embeddings": 131072, "model_type": "glm", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329, "rms_norm_eps":
        1.5625e-07, "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.47.0.dev0", "use_cache": true, "vocab_size": 151552}""",
    "GLM-4-9B-0414": """{"architectures": ["Glm4ForCausalLM"], "attention_bias": true,
        "attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338], "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size":
        13696, "max_position_embeddings": 32768, "model_type": "glm4", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version":
        "4.52.0.dev0", "use_cache": true, "vocab_size": 151552}""",
    "Seed-OSS-36B-Instruct": """{"architectures": ["SeedOssForCausalLM"], "attention_bias": true,
        "attention_dropout": 0.1, "attention_out_bias": false, "bos_token_id": 0, "eos_token_id": 2,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
        "intermediate_size": 27648, "max_position_embeddings": 524288, "mlp_bias": false,
        "model_type": "seed_oss", "num_attention_heads": 80, "num_hidden_layers": 64,
        "num_key_value_heads": 8, "pad_token_id": 1, "residual_dropout": 0.1, "rms_norm_eps": 1e-06,
        "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0, "tie_word_embeddings":
        false, "torch_dtype": "bfloat16", "transformers_version": "4.55.0", "use_cache": true,
        "vocab_size": 155136}""",
    "Ministral": """{"architectures": ["MinistralForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 1, "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 128, "hidden_act":
        "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention",
        "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
        "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
        "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
        "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
        "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
        "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
        "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
        "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
        "sliding_attention"], "max_position_embeddings": 131072, "model_type": "ministral",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 100000000.0, "sliding_window": 32768,
        "tie_word_embeddings": false, "use_cache": true, "vocab_size": 131072}""",
    "internlm2_5-7b-chat-1m": """{"architectures": ["InternLM2ForCausalLM"], "attn_implementation":
        "eager", "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}, "bias": false,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 262144,
        "model_type": "internlm2", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.5, "type": "dynamic"}, "rope_theta": 50000000,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.41.0",
        "use_cache": true, "vocab_size": 92544}""",
    "internlm3-8b-instruct": """{"architectures": ["InternLM3ForCausalLM"], "attention_dropout":
        0.0, "auto_map": {"AutoConfig": "configuration_internlm3.InternLM3Config", "AutoModel":
        "modeling_internlm3.InternLM3Model", "AutoModelForCausalLM":
        "modeling_internlm3.InternLM3ForCausalLM"}, "bias": false, "bos_token_id": 1,
        "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 10240, "max_position_embeddings": 32768,
        "model_type": "internlm3", "num_attention_heads": 32, "num_hidden_layers": 48,
        "num_key_value_heads": 2, "pad_token_id": 2, "qkv_bias": false, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "rope_theta": 50000000,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.47.1",
        "use_cache": true, "vocab_size": 128512}""",
    "Qwen3-30B-A3B": """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id":
        151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range":
        0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta":
        1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings":
        false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "Mixtral-8x7B-v0.1": """{"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": true,
        "vocab_size": 32000}""",
    # The part of Llama-4-Scout-17B-16E-Instruct that is text.
    "Llama-4-Scout": """{"architectures": ["Llama4ForCausalLM"], "attention_bias": false,
        "attention_chunk_size": 8192, "attention_dropout": 0.0, "attn_scale": 0.1,
        "attn_temperature_tuning": true, "bos_token_id": 200000, "eos_token_id": [200001, 200007,
        200008], "floor_scale": 8192, "for_llm_compressor": false, "head_dim": 128, "hidden_act":
        "silu", "hidden_size": 5120, "initializer_range": 0.02, "interleave_moe_layer_step": 1,
        "intermediate_size": 8192, "intermediate_size_mlp": 16384, "max_position_embeddings":
        10485760, "model_type": "llama4_text", "no_rope_layers": [], "num_attention_heads": 40,
        "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8,
        "num_local_experts": 16, "output_router_logits": false, "pad_token_id": 200018,
        "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
        "torch_dtype": "bfloat16", "use_cache": true, "use_qk_norm": true, "vocab_size": 202048}""",
    "recurrentgemma-2b": """{"_block_types": ["recurrent", "recurrent", "attention"],
        "architectures": ["RecurrentGemmaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attention_window_size": 2048, "bos_token_id": 2, "conv1d_width":
        4, "embeddings_scale_by_sqrt_dim": true, "eos_token_id": 1, "final_w_init_variance_scale":
        0.07692307692307693, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2560, "intermediate_size": 15360, "logits_soft_cap": 30.0, "lru_width": 2560,
        "model_type": "recurrent_gemma", "num_attention_heads": 10, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "pad_token_id": 0, "partial_rotary_factor": 0.5, "rms_norm_eps":
        1e-06, "rope_theta": 10000.0, "torch_dtype": "float32", "use_cache": true, "vocab_size":
        256000, "w_init_variance_scale": 0.01}""",
    "Qwen3-Next-80B-A3B-Instruct": """{"architectures": ["Qwen3NextForCausalLM"],
        "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id":
        151645, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size":
        2048, "initializer_range": 0.02, "intermediate_size": 5120, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
        "model_type": "qwen3_next", "moe_intermediate_size": 512, "norm_topk_prob": true,
        "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10,
        "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": false,
        "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta":
        10000000, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version":
        "4.57.0.dev0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
    # The parts of Qwen3.5-27B and Qwen3.5-35B-A3B that are text.
    "Qwen3.5-27B": """{"architectures": ["Qwen3_5ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_output_gate": true, "dtype": "bfloat16", "eos_token_id":
        248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size":
        5120, "initializer_range": 0.02, "intermediate_size": 17408, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 48,
        "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings":
        262144, "mlp_only_layers": [], "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": false, "num_attention_heads": 24, "num_hidden_layers": 64,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_parameters": {"mrope_interleaved":
        true, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25, "rope_theta": 10000000,
        "rope_type": "default"}, "use_cache": true, "vocab_size": 248320}""",
    "Qwen3.5-35B-A3B": """{"architectures": ["Qwen3_5MoeForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_output_gate": true, "dtype": "bfloat16", "eos_token_id":
        248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size":
        2048, "initializer_range": 0.02, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "model_type":
        "qwen3_5_moe_text", "moe_intermediate_size": 512, "mtp_num_hidden_layers": 1,
        "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8,
        "num_hidden_layers": 40, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_parameters": {"mrope_interleaved": true, "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default"},
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "use_cache": true,
        "vocab_size": 248320}""",
    "granite-4.0-h-350m": """{"architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias":
        false, "attention_dropout": 0.0, "attention_multiplier": 0.015625, "bos_token_id": 100257,
        "embedding_multiplier": 12, "eos_token_id": 100257, "hidden_act": "silu", "hidden_size":
        768, "initializer_range": 0.1, "intermediate_size": 2048, "layer_types": ["mamba", "mamba",
        "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "attention",
        "mamba", "mamba", "attention", "mamba", "mamba", "mamba", "attention", "mamba", "mamba",
        "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "attention", "mamba",
        "mamba", "mamba", "mamba"], "logits_scaling": 3, "mamba_chunk_size": 256,
        "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_head": 32, "mamba_d_state": 128,
        "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 48, "mamba_proj_bias": false,
        "max_position_embeddings": 32768, "model_type": "granitemoehybrid",
        "normalization_function": "rmsnorm", "num_attention_heads": 12, "num_experts_per_tok": 0,
        "num_hidden_layers": 32, "num_key_value_heads": 4, "num_local_experts": 0,
        "output_router_logits": false, "pad_token_id": 100256, "position_embedding_type": "nope",
        "residual_multiplier": 0.246, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta":
        10000, "router_aux_loss_coef": 0.0, "shared_intermediate_size": 2048,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size":
        100352}""",
    "Bamba-9B-v2": """{"architectures": ["BambaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_layer_indices": [9, 18, 27], "bos_token_id": 128000,
        "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range":
        0.02, "intermediate_size": 14336, "mamba_chunk_size": 256, "mamba_conv_bias": true,
        "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2,
        "mamba_n_groups": 1, "mamba_n_heads": 128, "mamba_proj_bias": false,
        "max_position_embeddings": 4096, "mlp_bias": false, "model_type": "bamba",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_logits_to_keep": 1, "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache":
        true, "vocab_size": 128256}""",
    "OLMoE-1B-7B-0924": """{"architectures": ["OlmoeForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "clip_qkv": null, "eos_token_id": 50279, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024,
        "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": false,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers":
        16, "num_key_value_heads": 16, "output_router_logits": false, "pad_token_id": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0, "router_aux_loss_coef":
        0.01, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version":
        "4.43.0.dev0", "use_cache": true, "vocab_size": 50304}""",
    "gpt-oss-20b": """{"architectures": ["GptOssForCausalLM"], "attention_bias": true,
        "attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
        "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": ["sliding_attention",
        "full_attention", "sliding_attention", "full_attention", "sliding_attention",
        "full_attention", "sliding_attention", "full_attention", "sliding_attention",
        "full_attention", "sliding_attention", "full_attention", "sliding_attention",
        "full_attention", "sliding_attention", "full_attention", "sliding_attention",
        "full_attention", "sliding_attention", "full_attention", "sliding_attention",
        "full_attention", "sliding_attention", "full_attention"], "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "output_router_logits": false, "pad_token_id": 199999, "quantization_config":
        {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
        "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"}, "rms_norm_eps": 1e-05,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
        "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false},
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit":
        7.0, "tie_word_embeddings": false, "transformers_version": "4.55.0.dev0", "use_cache": true,
        "vocab_size": 201088}""",
    "DeepSeek-V2-Lite": """{"architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "auto_map": {"AutoConfig":
        "configuration_deepseek.DeepseekV2Config", "AutoModel":
        "modeling_deepseek.DeepseekV2Model", "AutoModelForCausalLM":
        "modeling_deepseek.DeepseekV2ForCausalLM"}, "aux_loss_alpha": 0.001, "bos_token_id":
        100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts":
        64, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "pretraining_tp": 1, "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim":
        64, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor":
        40, "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
        "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func":
        "softmax", "seq_aux": true, "tie_word_embeddings": false, "topk_group": 1,
        "topk_method": "greedy", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 102400}""",
    "DeepSeek-V2": """{"architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "auto_map": {"AutoConfig":
        "configuration_deepseek.DeepseekV2Config", "AutoModel":
        "modeling_deepseek.DeepseekV2Model", "AutoModelForCausalLM":
        "modeling_deepseek.DeepseekV2ForCausalLM"}, "aux_loss_alpha": 0.001, "bos_token_id":
        100000, "eos_token_id": 100001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act":
        "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 12288,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
        "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts":
        160, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 128,
        "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128,
        "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim":
        64, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor":
        40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
        "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func":
        "softmax", "seq_aux": true, "tie_word_embeddings": false, "topk_group": 3,
        "topk_method": "group_limited_greedy", "torch_dtype": "bfloat16",
        "transformers_version": "4.39.3", "use_cache": true, "v_head_dim": 128, "vocab_size":
        102400}""",
    "DeepSeek-V3": """{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "auto_map": {"AutoConfig":
        "configuration_deepseek.DeepseekV3Config", "AutoModel":
        "modeling_deepseek.DeepseekV3Model", "AutoModelForCausalLM":
        "modeling_deepseek.DeepseekV3ForCausalLM"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
        "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size":
        2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
        "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method":
        "fp8", "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling":
        {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
        "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size":
        129280}""",
    "DeepSeek-R1": """{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "auto_map": {"AutoConfig":
        "configuration_deepseek.DeepseekV3Config", "AutoModel":
        "modeling_deepseek.DeepseekV3Model", "AutoModelForCausalLM":
        "modeling_deepseek.DeepseekV3ForCausalLM"}, "aux_loss_alpha": 0.001, "bos_token_id": 0,
        "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
        "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts":
        256, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config":
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast":
        32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
        "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype":
        "bfloat16", "transformers_version": "4.46.3", "use_cache": true, "v_head_dim": 128,
        "vocab_size": 129280}""",
    "GLM-4.7-Flash": """{"architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "dtype": "bfloat16", "eos_token_id": [154820, 154827, 154829],
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 10240, "kv_lora_rank": 512, "max_position_embeddings": 202752,
        "model_type": "glm4_moe_lite", "moe_intermediate_size": 1536, "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 20, "num_experts_per_tok": 4, "num_hidden_layers": 47,
        "num_key_value_heads": 20, "num_nextn_predict_layers": 1, "pad_token_id": 154820,
        "partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta":
        1000000, "routed_scaling_factor": 1.8, "tie_word_embeddings": false, "topk_group": 1,
        "topk_method": "noaux_tc", "transformers_version": "5.0.0rc0", "v_head_dim": 256,
        "vocab_size": 154880}""",
    "dbrx-base": """{"architectures": ["DbrxForCausalLM"], "attn_config": {"clip_qkv": 8,
        "kv_n_heads": 8, "model_type": "", "rope_theta": 500000}, "auto_map": {"AutoConfig":
        "configuration_dbrx.DbrxConfig", "AutoModelForCausalLM": "modeling_dbrx.DbrxForCausalLM"},
        "d_model": 6144, "emb_pdrop": 0.0, "ffn_config": {"ffn_hidden_size": 10752, "model_type":
        "", "moe_jitter_eps": 0.01, "moe_loss_weight": 0.05, "moe_num_experts": 16, "moe_top_k": 4},
        "initializer_range": 0.02, "max_seq_len": 32768, "model_type": "dbrx", "n_heads": 48,
        "n_layers": 40, "output_router_logits": false, "resid_pdrop": 0.0, "router_aux_loss_coef":
        0.05, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version":
        "4.40.0.dev0", "use_cache": true, "vocab_size": 100352}""",
}
HERE = Path("the model")


def config_of(name: str) -> dict[str, Any]:
    return standard_keys(json.loads(PUBLISHED[name]), HERE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_served(name: str) -> None:
    config = config_of(name)
    assert check_supported(config, HERE).name == config["architectures"][0]


def test_there_is_a_published_model_of_every_architecture() -> None:
    assert {config_of(name)["architectures"][0] for name in PUBLISHED} == {*ARCHITECTURES}


def with_images(text: str, model_type: str, name: str, **others: Any) -> dict[str, Any]:
    """The config.json of a checkpoint with images around a text model's."""
    config = json.loads(PUBLISHED[text])
    del config["architectures"]
    vision = {"hidden_size": 1408, "num_hidden_layers": 34}
    around = {"text_config": config, "vision_config": vision, "transformers_version": "4.51.0.dev0"}
    return {"architectures": [name], "model_type": model_type, **around, **others}


PUBLISHED_WITH_IMAGES = {
    "Llama-4-Scout-17B-16E-Instruct": with_images(
        "Llama-4-Scout",
        "llama4",
        "Llama4ForConditionalGeneration",
        boi_token_index=200080,
        eoi_token_index=200081,
        image_token_index=200092,
        torch_dtype="bfloat16",
    ),
    # It leaves most of its text model's keys to defaults.
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
    },
    "Mistral-Small-3.1-24B-Instruct-2503": with_images(
        "Mistral-Small-24B-Instruct-2501",
        "mistral3",
        "Mistral3ForConditionalGeneration",
        image_token_index=10,
        multimodal_projector_bias=False,
        projector_hidden_act="gelu",
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
    "Qwen3.5-27B": with_images(
        "Qwen3.5-27B",
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        image_token_id=248056,
        video_token_id=248057,
        vision_start_token_id=248053,
        vision_end_token_id=248054,
        tie_word_embeddings=False,
    ),
    "Qwen3.5-35B-A3B": with_images(
        "Qwen3.5-35B-A3B",
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        image_token_id=248056,
        video_token_id=248057,
        vision_start_token_id=248053,
        vision_end_token_id=248054,
        language_model_only=False,
        tie_word_embeddings=False,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_WITH_IMAGES)
def test_the_text_of_a_published_model_with_images_is_served(name: str) -> None:
    config = standard_keys(PUBLISHED_WITH_IMAGES[name], HERE)
    assert check_supported(config, HERE).name == config["architectures"][0]
    assert ModelSizes.of(config, HERE).layers >= 34


def test_gemma_3s_defaults_are_those_of_transformers() -> None:
    config = standard_keys(PUBLISHED_WITH_IMAGES["gemma-3-4b-it"], HERE)
    theirs = transformers.Gemma3Config.from_dict(PUBLISHED_WITH_IMAGES["gemma-3-4b-it"])
    for key, value in WRAPPERS["Gemma3ForConditionalGeneration"].defaults.items():
        assert config[key] == getattr(theirs.text_config, key), (key, value)
    counts = WeightCounts.of(ModelSizes.of(config, HERE), config, HERE)
    assert counts.tied
    assert 3.8e9 < counts.total < 4e9  # 4.3e9 with images


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whatever_transformers_writes_by_itself_is_known(name: str) -> None:
    classes = {
        "InternLM2ForCausalLM": transformers.LlamaConfig,  # its own is not in transformers
        "InternLM3ForCausalLM": transformers.InternLM3Config,
    }
    config_class = classes.get(name) or getattr(transformers, name).config_class
    config = config_class().to_dict()
    if name == "InternLM2ForCausalLM":
        del config["attention_bias"], config["mlp_bias"]
    config = standard_keys(config, HERE)
    assert [*keys_not_implemented(config, ARCHITECTURES[name])] == []


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        (
            "Llama-3.2-1B",
            {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
            "dual_chunk_attention_config",
        ),
        ("Qwen2.5-0.5B", {"use_mrope": True}, "use_mrope"),
        ("Qwen1.5-7B-Chat", {"use_logn_attn": True}, "use_logn_attn"),
        ("Llama-3.2-1B", {"attention_chunk_size": 8192}, "attention_chunk_size"),
        ("Llama-3.2-1B", {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
        ("Llama-3.2-1B", {"no_rope_layer_interval": 4}, "no_rope_layer_interval"),
        ("Llama-3.2-1B", {"layer_types": ["sliding_attention"] * 16}, "layer_types"),
        ("Llama-3.2-1B", {"sliding_window": 4096}, "sliding_window"),
        ("Llama-3.2-1B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("Llama-3.2-1B", {"num_experts": 8}, "num_experts"),
        ("Llama-3.2-1B", {"num_experts": 1}, "num_experts"),
        ("Llama-3.2-1B", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ("Llama-3.2-1B", {"use_qk_norm": True}, "use_qk_norm"),
        ("Llama-3.2-1B", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("SmolLM2-135M-Instruct", {"rope_interleaved": True}, "rope_interleaved"),
        ("gemma-2-9b", {"sliding_window_size": 512}, "sliding_window_size"),
        ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("c4ai-command-r7b-12-2024", {"layer_switch": 5}, "layer_switch"),
        ("c4ai-command-r7b-12-2024", {"use_parallel_block": False}, "use_parallel_block"),
        ("Phi-4-mini-instruct", {"full_attn_mod": 2}, "full_attn_mod"),
        ("gpt-oss-20b", {"experts_per_token": 2}, "experts_per_token"),
        ("recurrentgemma-2b", {"_block_types": ["attention"]}, "_block_types"),
        ("recurrentgemma-2b", {"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by"),
        ("gpt-oss-20b", {"initial_context_length": 8192}, "initial_context_length"),
        ("DeepSeek-V2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("DeepSeek-V2-Lite", {"topk_method": "noaux_tc"}, "topk_method"),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func"),
        ("DeepSeek-R1", {"index_topk": 2048}, "index_topk"),
        ("GLM-4.7-Flash", {"first_k_dense_replace": 2}, "first_k_dense_replace"),
        ("Mixtral-8x7B-v0.1", {"shared_expert_intermediate_size": 64}, "shared_expert"),
        ("Qwen3-30B-A3B", {"n_shared_experts": 1}, "n_shared_experts"),
        ("Qwen3-4B", {"text_config": {"hidden_size": 2}}, "text_config"),
        (
            "Qwen3-4B",
            {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
            "rope_scaling.mrope_section",
        ),
        (
            "Qwen3-4B",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor",
        ),
        ("granite-4.0-h-350m", {"position_embedding_type": "alibi"}, "position_embedding_type"),
        ("granite-4.0-h-350m", {"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        ("granite-4.0-h-350m", {"mamba_proj_bias": True}, "mamba_proj_bias"),
        ("Bamba-9B-v2", {"partial_rotary_factor": 1.0}, "partial_rotary_factor"),
        ("Qwen3.5-27B", {"attn_output_gate": False}, "attn_output_gate"),
        ("Qwen3.5-27B", {"output_gate_type": "sigmoid"}, "output_gate_type"),
        ("Mistral-7B-v0.1", {"a_key_of_tomorrow": "x"}, "a_key_of_tomorrow"),
    ],
)
def test_a_key_that_would_be_ignored_refuses_the_model(
    name: str, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        check_supported({**config_of(name), **changes}, HERE)
    assert caught.value.field == "model"
    assert re.search(rf": {key}\w* in its config.json", caught.value.message)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, 1.0, [], {}, ""])
def test_a_neutral_value_changes_nothing(value: object) -> None:
    check_supported({**config_of("Qwen3-4B"), "a_key_of_tomorrow": value}, HERE)


def test_all_keys_are_named_at_once() -> None:
    changes = {"use_logn_attn": True, "attention_chunk_size": 8192}
    with pytest.raises(UnsupportedModelError, match="attention_chunk_size, use_logn_attn in"):
        check_supported({**config_of("Qwen3-4B"), **changes}, HERE)


@pytest.mark.parametrize("limit", [[0.0, math.inf], [0.0, {"__float__": "Infinity"}]])
def test_infinity_is_read_in_all_its_forms(limit: list[object]) -> None:
    config = {**config_of("granite-4.0-h-350m"), "time_step_limit": limit}
    name = check_supported(config, HERE).name
    assert transformers_config(name, config, HERE).time_step_limit == (0.0, math.inf)


def test_a_number_that_meant_yes_in_early_llama_4_is_read() -> None:
    config = {**config_of("Llama-4-Scout"), "attn_temperature_tuning": 4}
    name = check_supported(config, HERE).name
    assert transformers_config(name, config, HERE).attn_temperature_tuning is True


def test_llamas_without_windows_are_served() -> None:
    changes = {"layer_types": ["full_attention"] * 16, "sliding_window": 4096}
    config = {**config_of("Llama-3.2-1B"), **changes, "use_sliding_window": False}
    check_supported(config, HERE)


@pytest.mark.parametrize(
    ("section", "changes", "reason"),
    [
        ("ffn_config", {"moe_normalize_expert_weights": 2.0}, "moe_normalize_expert_weights"),
        ("ffn_config", {"hidden_size": 64}, "hidden_size"),
        ("ffn_config", {"shared_experts": 2}, "shared_experts"),
        ("attn_config", {"qk_ln": True}, "qk_ln"),
        (None, {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
    ],
)
def test_what_sections_of_dbrx_say_is_not_ignored(
    section: str | None, changes: dict[str, Any], reason: str
) -> None:
    config = json.loads(PUBLISHED["dbrx-base"])
    (config if section is None else config[section]).update(changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        check_supported(standard_keys(config, HERE), HERE)


def test_what_a_recurrent_or_chunked_model_cannot_compute_is_named(tmp_path: Path) -> None:
    path = make_small_model("RecurrentGemmaForCausalLM", tmp_path / "r")
    with pytest.raises(ConfigError, match="no scaling 'linear'") as caught:
        read_facts(path, RopeOverride(type="linear", factor=2.0))
    assert caught.value.field == "rope"
    assert read_facts(path, RopeOverride(type="ntk", factor=2.0)).max_model_len == 512
    granite: dict[str, Any] = {"mamba_n_heads": 8, "layer_types": ["mamba", "attention", "mamba"]}
    nope = make_small_model("GraniteMoeHybridForCausalLM", tmp_path / "g", **granite)
    with pytest.raises(ConfigError, match="has no RoPE to scale") as caught:
        read_facts(nope, RopeOverride(type="ntk", factor=2.0))
    assert caught.value.field == "rope"
    for key, value in (("mamba_n_heads", 0), ("mamba_d_state", "many"), ("mamba_n_groups", 3)):
        change_config(nope, **{key: value})
        with pytest.raises(ConfigError, match=f"{key} must"):
            read_facts(nope)
        change_config(nope, mamba_n_heads=8, mamba_d_state=256, mamba_n_groups=1)
    change_config(path, block_types=["recurrent"])
    with pytest.raises(UnsupportedModelError, match="none of its layers has keys"):
        read_facts(path)
    overrides: dict[str, Any] = {"num_hidden_layers": 1, "head_dim": 16, "num_local_experts": 2}
    path = make_small_model("Llama4ForCausalLM", tmp_path / "l", **overrides)
    change_config(path, attention_chunk_size=0)
    with pytest.raises(ConfigError, match="attention_chunk_size must be a positive"):
        read_facts(path)


def test_dual_chunk_attention_is_served_within_its_first_chunk(tmp_path: Path) -> None:
    path = make_small_model("Qwen2ForCausalLM", tmp_path, num_hidden_layers=1)
    chunks = {"chunk_size": 100, "local_size": 20, "original_max_position_embeddings": 100}
    change_config(path, dual_chunk_attention_config=chunks)
    assert read_facts(path).max_model_len == 80
    assert read_facts(path, RopeOverride(type="linear", factor=2.0)).max_model_len == 160
    change_config(path, dual_chunk_attention_config={**chunks, "chunk_size": 1000})
    assert read_facts(path).max_model_len == 256
    change_config(path, dual_chunk_attention_config={"chunk_size": 100})
    with pytest.raises(ConfigError, match="local_size"):
        read_facts(path)
