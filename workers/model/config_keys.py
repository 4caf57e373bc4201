"""Which keys of a config.json kvmesh implements, or knows to be harmless: an allow-list.

Any other key may change what the model computes, as `dual_chunk_attention_config` or
`no_rope_layers` do, and what is computed without it would be wrong, perhaps only in long
contexts. So the model is refused by the name of the key, unless its value is neutral.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)
_BY_MODEL_TYPE: Mapping[str, frozenset[str]] = {
    "llama": frozenset({"attention_bias", "mlp_bias", "rms_norm_eps"}),
    "mistral": frozenset({"rms_norm_eps", "sliding_window"}),
    "qwen2": frozenset(
        {"layer_types", "max_window_layers", "rms_norm_eps", "sliding_window", "use_sliding_window"}
    ),
    "qwen3": frozenset(
        {
            "attention_bias",
            "layer_types",
            "max_window_layers",
            "rms_norm_eps",
            "sliding_window",
            "use_sliding_window",
        }
    ),
    "gemma": frozenset({"attention_bias", "hidden_activation", "rms_norm_eps"}),
    "gemma2": frozenset(
        {
            "attention_bias",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "hidden_activation",
            "layer_types",
            "query_pre_attn_scalar",
            "rms_norm_eps",
            "sliding_window",
        }
    ),
    "olmo": frozenset({"attention_bias", "clip_qkv"}),
    "olmo2": frozenset({"attention_bias", "rms_norm_eps"}),
    "cohere": frozenset({"attention_bias", "layer_norm_eps", "logit_scale", "use_qk_norm"}),
    "stablelm": frozenset(
        {
            "layer_norm_eps",
            "partial_rotary_factor",
            "qk_layernorm",
            "use_parallel_residual",
            "use_qkv_bias",
        }
    ),
}
# They say how the model was made, stored or trained, or how it generates, which
# generation_config.json says today; a forward pass does not depend on them.
_HARMLESS = frozenset(
    {
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
        "embd_pdrop",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "language",
        "length_penalty",
        "license",
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
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "resid_pdrop",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
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
    }
)
_HARMLESS_PREFIXES = ("unsloth_",)
# Of RoPE's parameters; YaRN's and Llama 3's among them.
_ROPE = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "finetuned",
        "high_freq_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "rope_theta",
        "rope_type",
        "truncate",
        "type",
    }
)
# 1 is the neutral value of a factor, "full_attention" that of a layer's type.
_NEUTRAL: tuple[object, ...] = (None, False, 0, 0.0, 1.0, "", [], {})


def keys_not_implemented(config: Mapping[str, Any], architecture: Architecture) -> Iterator[str]:
    """Keys of `config` that may change what the model computes, with their sections."""
    own = _BY_MODEL_TYPE[architecture.model_type]
    for key, value in config.items():
        known = key in _COMMON or key in own or key in _HARMLESS
        if not known and not key.startswith(_HARMLESS_PREFIXES) and not _is_neutral(key, config):
            yield key
        if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            yield from _rope_keys(key, value, own)


def _rope_keys(section: str, parameters: Mapping[str, Any], own: frozenset[str]) -> Iterator[str]:
    for key, value in parameters.items():
        if key not in _ROPE and key not in own and not _is_plain_neutral(value):
            yield f"{section}.{key}"


def _is_neutral(key: str, config: Mapping[str, Any]) -> bool:
    """Whether the key changes nothing, for its value or for those of others."""
    value = config[key]
    if key == "layer_types":
        return all(kind == "full_attention" for kind in value or ())
    if key == "sliding_window":
        return not value or config.get("use_sliding_window") is False
    if key == "max_window_layers":
        return not config.get("use_sliding_window")
    if key == "sliding_window_size":  # Gemma 2's, twice
        return bool(value == config.get("sliding_window"))
    return _is_plain_neutral(value)


def _is_plain_neutral(value: object) -> bool:
    if value is True or (type(value) is int and value == 1):
        return False  # a switch, or a number of something
    return value in _NEUTRAL
