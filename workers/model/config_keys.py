"""Which keys of a config.json kvmesh implements, or knows to be harmless: an allow-list.

Any other key may change what the model computes, as `attention_chunk_size` or
`no_rope_layers` do, and what is computed without it would be wrong, perhaps only in long
contexts. So the model is refused by the name of the key, unless its value is neutral.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvmesh.workers.model.architectures import Architecture

# Implemented by transformers' modules of every architecture, and by our attention.
_COMMON = frozenset(
    {
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "compression_config",
        "quantization_config",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)
_SLIDING = frozenset({"layer_types", "sliding_window"})
_SLIDING_IF_ENABLED = _SLIDING | {"max_window_layers", "use_sliding_window"}
_RMS_NORM = frozenset({"rms_norm_eps"})
_QWEN = _RMS_NORM | _SLIDING_IF_ENABLED | {"dual_chunk_attention_config"}
_LLAMA = _RMS_NORM | {"attention_bias", "mlp_bias"}
_GEMMA = _RMS_NORM | {"attention_bias", "hidden_activation"}
_INTERNLM = _RMS_NORM | {"bias"}
_LATENT = _RMS_NORM | {
    "attention_bias",
    "kv_lora_rank",
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "num_mtp_layers",  # as num_nextn_predict_layers: of layers that are not used
    "num_nextn_predict_layers",
    "q_lora_rank",
    "qk_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "routed_scaling_factor",
    "topk_group",
    "v_head_dim",
}
_GRANITE = _LLAMA | {
    "attention_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
}
_DELTA_NET = _RMS_NORM | {
    "attention_bias",
    "full_attention_interval",
    "layer_types",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "partial_rotary_factor",
}
# Positions of text are the same in all three sections of its RoPE.
_QWEN3_5 = _DELTA_NET | {"mrope_interleaved", "mrope_section"}
_QWEN3_5_VALUES: Mapping[str, tuple[object, ...]] = {
    "attn_output_gate": (True,),
    "mamba_ssm_dtype": ("float32",),
    "output_gate_type": ("swish",),
}
_MAMBA2 = frozenset(
    {
        "mamba_conv_bias",
        "mamba_d_conv",
        "mamba_d_head",
        "mamba_d_state",
        "mamba_expand",
        "mamba_n_groups",
        "mamba_n_heads",
    }
)
_BY_MODEL_TYPE: Mapping[str, frozenset[str]] = {
    "llama": _LLAMA,
    "mistral": _RMS_NORM | {"sliding_window"},
    "ministral": _RMS_NORM | _SLIDING,
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"attention_bias"},
    "gemma": _GEMMA,
    "gemma2": _GEMMA
    | _SLIDING
    | {"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"},
    # transformers reads its attn_logit_softcapping and does not apply it, so neither is it here.
    "gemma3_text": _GEMMA
    | _SLIDING
    | {
        "_sliding_window_pattern",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "sliding_window_pattern",
    },
    "olmo": frozenset({"attention_bias", "clip_qkv"}),
    "olmo2": _RMS_NORM | {"attention_bias"},
    "olmo3": _RMS_NORM | _SLIDING | {"attention_bias"},
    "cohere": frozenset({"attention_bias", "layer_norm_eps", "logit_scale", "use_qk_norm"}),
    "cohere2": _SLIDING
    | {"attention_bias", "layer_norm_eps", "logit_scale", "sliding_window_pattern"},
    "stablelm": frozenset(
        {
            "layer_norm_eps",
            "partial_rotary_factor",
            "qk_layernorm",
            "use_parallel_residual",
            "use_qkv_bias",
        }
    ),
    "phi3": _RMS_NORM | {"partial_rotary_factor", "sliding_window"},
    "smollm3": _LLAMA | _SLIDING_IF_ENABLED | {"no_rope_layer_interval", "no_rope_layers"},
    "granite": _GRANITE,
    "granitemoehybrid": (_GRANITE - {"mlp_bias"})
    | _MAMBA2
    | {
        "layer_types",
        "layers_block_type",
        "num_experts_per_tok",
        "num_local_experts",
        "shared_intermediate_size",
    },
    "bamba": _LLAMA
    | _MAMBA2
    | {"attn_layer_indices", "layers_block_type", "partial_rotary_factor"},
    "glm": _RMS_NORM | {"attention_bias", "partial_rotary_factor"},
    "glm4": _RMS_NORM | {"attention_bias", "partial_rotary_factor"},
    "seed_oss": _LLAMA | {"attention_out_bias"},
    "internlm2": _INTERNLM,
    "internlm3": _INTERNLM | {"attention_bias", "mlp_bias", "qkv_bias"},
    "qwen3_moe": _QWEN
    | {
        "attention_bias",
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
    },
    "llama4_text": _RMS_NORM
    | {
        "attention_bias",
        "attention_chunk_size",
        "attn_scale",
        "attn_temperature_tuning",
        "floor_scale",
        "interleave_moe_layer_step",
        "intermediate_size_mlp",
        "layer_types",
        "moe_layers",
        "no_rope_layer_interval",
        "no_rope_layers",
        "num_experts_per_tok",
        "num_local_experts",
        "use_qk_norm",
    },
    "qwen3_next": _DELTA_NET
    | {
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "shared_expert_intermediate_size",
    },
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5
    | {
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "shared_expert_intermediate_size",
    },
    "recurrent_gemma": _RMS_NORM
    | {
        "attention_bias",
        "attention_window_size",
        "block_types",
        "conv1d_width",
        "hidden_activation",
        "logits_soft_cap",
        "lru_width",
        "partial_rotary_factor",
    },
    "mixtral": _RMS_NORM | {"num_experts_per_tok", "num_local_experts", "sliding_window"},
    "dbrx": frozenset({"clip_qkv", "num_experts_per_tok", "num_local_experts"}),
    # Without norm_topk_prob, which transformers does not read.
    "deepseek_v2": _LATENT | {"first_k_dense_replace", "mlp_bias"},
    "deepseek_v3": _LATENT | {"first_k_dense_replace", "norm_topk_prob", "rope_interleave"},
    "glm4_moe_lite": _LATENT | {"mlp_layer_types", "norm_topk_prob", "rope_interleave"},
    "olmoe": _RMS_NORM
    | {
        "attention_bias",
        "clip_qkv",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
    },
    "gpt_oss": _RMS_NORM
    | _SLIDING
    | {
        "attention_bias",
        "num_experts_per_tok",
        "num_local_experts",
        "swiglu_alpha",
        "swiglu_limit",
    },
}
# How DeepSeek V3 chooses experts.
_NO_AUXILIARY_LOSS: Mapping[str, tuple[object, ...]] = {
    "moe_layer_freq": (1,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}
# No limit, as older and newer versions of transformers write it.
_ANY_STEP = ([0.0, math.inf], (0.0, math.inf), [0.0, {"__float__": "Infinity"}])
# Keys of which only these values are implemented: those of all checkpoints that have the key.
_ONLY_VALUES: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "cohere2": {
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
        "use_parallel_embedding": (True,),
    },
    "deepseek_v2": {
        "moe_layer_freq": (1,),
        "rope_interleave": (True,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
    },
    "deepseek_v3": _NO_AUXILIARY_LOSS,
    # transformers reads `mlp_layer_types` instead.
    "glm4_moe_lite": {**_NO_AUXILIARY_LOSS, "first_k_dense_replace": (1,)},
    "phi3": {"full_attn_mod": (1,), "interpolate_factor": (1,)},
    "recurrent_gemma": {
        # transformers reads only `block_types`.
        "_block_types": (["recurrent", "recurrent", "attention"],),
        "embeddings_scale_by_sqrt_dim": (True,),
    },
    "qwen3_5_text": _QWEN3_5_VALUES,
    "qwen3_5_moe_text": _QWEN3_5_VALUES,
    "granitemoehybrid": {
        "normalization_function": ("rmsnorm",),
        "position_embedding_type": (None, "nope", "rope"),
        "time_step_limit": _ANY_STEP,
    },
    "bamba": {
        "partial_rotary_factor": (0.5,),  # what transformers takes, whatever it is
        "time_step_limit": _ANY_STEP,
    },
}
# Keys that repeat another one.
_REPEATED: Mapping[str, Mapping[str, str]] = {
    "cohere2": {"layer_switch": "sliding_window_pattern"},
    "gemma2": {"sliding_window_size": "sliding_window"},
    "recurrent_gemma": {"sliding_window": "attention_window_size"},
    "gpt_oss": {
        "experts_per_token": "num_experts_per_tok",
        "initial_context_length": "rope_scaling.original_max_position_embeddings",
    },
}
# They say how the model was made, stored or trained, or how it generates, which
# generation_config.json says today; a forward pass does not depend on them.
_HARMLESS = frozenset(
    {
        "auto_map",  # checked on its own
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_flash_attn_2_enabled",
        "_from_model_config",
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "attn_pdrop",
        "aux_loss_alpha",
        "bad_words_ids",
        "base_model_name_or_path",
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "emb_pdrop",
        "embd_pdrop",
        "encoder_no_repeat_ngram_size",
        "ep_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "final_w_init_variance_scale",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "is_decoder",
        "init_method",
        "is_llama_config",
        "label2id",
        "language",
        "length_penalty",
        "license",
        "mamba_chunk_size",  # of tokens that are computed together
        "max_length",
        "max_seq_len",
        "max_sequence_length",
        "min_length",
        "model_max_length",
        "model_name",
        "model_type",
        "name_or_path",
        "neftune_noise_alpha",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_logits_to_keep",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "resid_pdrop",
        "residual_dropout",
        "return_dict",
        "return_dict_in_generate",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sep_token_id",
        "seq_aux",
        "seq_length",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "use_bfloat16",
        "use_cache",
        "use_flash_attention_2",
        "use_flash_attn",
        "w_init_variance_scale",
        "z_loss_coefficient",
    }
)
_HARMLESS_PREFIXES = ("unsloth_", "mtp_")  # of multi-token prediction, which is not done
# Of RoPE's parameters; YaRN's and Llama 3's among them.
_ROPE = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "finetuned",
        "high_freq_factor",
        "long_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "rope_theta",
        "rope_type",
        "short_factor",
        "truncate",
        "type",
    }
)
# 1 is the neutral value of a factor, "full_attention" that of a layer's type.
_NEUTRAL: tuple[object, ...] = (None, False, 0, 0.0, 1.0, "", [], {})


def keys_not_implemented(config: Mapping[str, Any], architecture: Architecture) -> Iterator[str]:
    """Keys of `config` that may change what the model computes, with their sections."""
    own = _BY_MODEL_TYPE[architecture.model_type]
    types = config.get("layer_types") or ()
    for key, value in config.items():
        known = key in _COMMON or key in own or key in _HARMLESS
        known = known and key not in _ONLY_VALUES.get(architecture.model_type, {})
        if not known and not key.startswith(_HARMLESS_PREFIXES):
            redundant = _is_redundant(key, config, architecture.model_type)
            if not (_is_neutral(key, config) if redundant is None else redundant):
                yield key
        if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            for section, parameters in _rope_sections(key, value, types):
                yield from _rope_keys(section, parameters, own)


def is_harmless(key: str, value: object) -> bool:
    """Whether no forward pass depends on a key, or not on this value of it."""
    known = key in _HARMLESS or key.startswith(_HARMLESS_PREFIXES)
    return known or _is_plain_neutral(value)


def _rope_sections(
    name: str, value: Mapping[str, Any], layer_types: Iterable[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """RoPE's parameters, which may be given for each type of layer."""
    by_type = {kind: value[kind] for kind in dict.fromkeys(layer_types) if kind in value}
    if by_type:
        for kind, parameters in by_type.items():
            yield f"{name}.{kind}", parameters or {}
        value = {key: of for key, of in value.items() if key not in by_type}
    yield name, value


def _rope_keys(section: str, parameters: Mapping[str, Any], own: frozenset[str]) -> Iterator[str]:
    for key, value in parameters.items():
        if key not in _ROPE and key not in own and not _is_plain_neutral(value):
            yield f"{section}.{key}"


def _is_redundant(key: str, config: Mapping[str, Any], model_type: str) -> bool | None:
    """Whether the key says what is computed anyway, or what another key says; None if it is not
    a key of this kind."""
    value = config[key]
    only = _ONLY_VALUES.get(model_type, {})
    if key in only:
        return any(type(value) is type(known) and value == known for known in only[key])
    other = _REPEATED.get(model_type, {}).get(key)
    if other is None or value is None:
        return None
    section, _, name = other.rpartition(".")
    return bool(value == (config.get(section) or {} if section else config).get(name, value))


def _is_neutral(key: str, config: Mapping[str, Any]) -> bool:
    """Whether the key changes nothing, for its value or for those of others."""
    value = config[key]
    if key == "layer_types":
        return all(kind == "full_attention" for kind in value or ())
    if key == "sliding_window":
        return not value or config.get("use_sliding_window") is False
    if key == "max_window_layers":
        return not config.get("use_sliding_window")
    return _is_plain_neutral(value)


def _is_plain_neutral(value: object) -> bool:
    if value is True or (type(value) is int and value == 1):
        return False  # a switch, or a number of something
    return value in _NEUTRAL
