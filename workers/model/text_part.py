"""The text model inside a checkpoint of several modalities, such as text and images. Torch-free.

Only checkpoints are listed whose text model computes text as it does on its own: in them, certain
tokens stand for what is not text. Those tokens are refused in prompts, and the weights
of other modalities are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmesh.workers.errors import UnsupportedModelError
from kvmesh.workers.model.config_keys import is_harmless
from kvmesh.workers.model.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A class of checkpoints of several modalities.

    model_type: its name in config.json
    texts: types of text models, and their architectures here
    placeholders: keys of the tokens that stand for what is not text, and their defaults
    others: further keys, which only matter where there is something other than text
    refused: keys of the text model that the checkpoint's own class does not read as it does
    defaults: what `text_config` leaves out
    tied: whether the output layer's weights are those of the embeddings if nothing says so
    """

    model_type: str
    texts: Mapping[str, str]
    placeholders: Mapping[str, int]
    others: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    defaults: Mapping[str, int] = field(default_factory=dict)
    tied: bool = False


_BOUNDS = frozenset({"boi_token_index", "eoi_token_index"})
_QWEN_BOUNDS = frozenset({"vision_start_token_id", "vision_end_token_id", "language_model_only"})
_QWEN_PLACEHOLDERS = {"image_token_id": 248056, "video_token_id": 248057}
WRAPPERS: Mapping[str, Wrapper] = {
    "Llama4ForConditionalGeneration": Wrapper(
        "llama4",
        {"llama4_text": "Llama4ForCausalLM"},
        {"image_token_index": 200092},
        _BOUNDS,
    ),
    "Gemma3ForConditionalGeneration": Wrapper(
        "gemma3",
        {"gemma3_text": "Gemma3ForCausalLM"},
        {"image_token_index": 262144},
        _BOUNDS | {"mm_tokens_per_image"},
        refused=frozenset({"final_logit_softcapping"}),
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "max_position_embeddings": 131072,
        },
        tied=True,
    ),
    "Mistral3ForConditionalGeneration": Wrapper(
        "mistral3",
        {"mistral": "MistralForCausalLM"},
        {"image_token_index": 10},
        frozenset(
            {
                "multimodal_projector_bias",
                "projector_hidden_act",
                "spatial_merge_size",
                "vision_feature_layer",
            }
        ),
    ),
    "Qwen3_5ForConditionalGeneration": Wrapper(
        "qwen3_5", {"qwen3_5_text": "Qwen3_5ForCausalLM"}, _QWEN_PLACEHOLDERS, _QWEN_BOUNDS
    ),
    "Qwen3_5MoeForConditionalGeneration": Wrapper(
        "qwen3_5_moe",
        {"qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"},
        _QWEN_PLACEHOLDERS,
        _QWEN_BOUNDS,
    ),
}
# Of the whole checkpoint, but about its text model as well.
_COMMON = (
    "auto_map",
    "compression_config",
    "eos_token_id",
    "quantization_config",
    "tie_word_embeddings",
)
# Beginnings of names in checkpoints, and what the text model alone calls them.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_OTHER_PREFIXES = tuple(
    f"{whole}{part}."
    for whole in ("", "model.")
    for part in ("vision_tower", "vision_model", "visual", "multi_modal_projector")
)


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """Which class of checkpoints a config.json is of; None if it is a text model."""
    return WRAPPERS.get((config.get("architectures") or [""])[0])


def text_config(config: Mapping[str, Any], source: Path | str) -> dict[str, Any]:
    """The configuration of the text model; that of a model of text alone is returned as it is.

    source: the file's name, for errors
    Raises UnsupportedModelError for another text model than those listed, and for keys that are
    not known.
    """
    wrapper = wrapper_of(config)
    if wrapper is None:
        return dict(config)
    name = config["architectures"][0]
    if config.get("model_type", wrapper.model_type) != wrapper.model_type:
        raise _refused(
            source, f"{name} must have model type {wrapper.model_type}, got {config['model_type']}"
        )
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise _refused(source, f"{name} must have a text_config")
    kind = text.get("model_type", next(iter(wrapper.texts)))
    if kind not in wrapper.texts:
        expected = ", ".join(wrapper.texts)
        raise _refused(
            source,
            f"{name} has a text model of type {kind}, which is not served in it; "
            f"expected {expected}",
        )
    if unknown := sorted(_unknown_keys(config, text, wrapper)):
        raise _refused(
            source,
            f"{', '.join(unknown)} of {name} may change what it computes, and "
            f"{'is' if len(unknown) == 1 else 'are'} not implemented",
        )
    common = {key: config[key] for key in _COMMON if config.get(key) is not None}
    return {
        "tie_word_embeddings": wrapper.tied,
        **wrapper.defaults,
        **text,
        **common,
        "architectures": [wrapper.texts[kind]],
        "model_type": kind,
    }


def placeholder_tokens(config: Mapping[str, Any]) -> dict[int, str]:
    """Ids of tokens that stand for what is not text, and the keys that say so."""
    wrapper = wrapper_of(config)
    if wrapper is None:
        return {}
    found = {}
    for key, default in wrapper.placeholders.items():
        other = key.replace("_index", "_id")
        found[int(config.get(key, config.get(other, default)))] = key
    return found


def text_tensor(name: str) -> str | None:
    """What the text model alone calls a tensor of a checkpoint; None if it is not part of it."""
    for stored, ours in _PREFIXES.items():
        if name.startswith(stored):
            return ours + name.removeprefix(stored)
    return None if name.startswith(_OTHER_PREFIXES) else name


def text_tensors(
    tensors: Mapping[str, TensorInfo], unused: tuple[str, ...]
) -> dict[str, tuple[str, TensorInfo]]:
    """Those of the text model: what it calls each alone -> what the checkpoint does, and where.

    unused: beginnings of names of others that it does not need
    """
    named = ((text_tensor(stored), stored, info) for stored, info in tensors.items())
    return {
        name: (stored, info)
        for name, stored, info in named
        if name is not None and not name.startswith(unused)
    }


def _unknown_keys(
    config: Mapping[str, Any], text: Mapping[str, Any], wrapper: Wrapper
) -> Iterator[str]:
    known = {"text_config", "vision_config", *_COMMON, *wrapper.others}
    for key in wrapper.placeholders:
        known |= {key, key.replace("_index", "_id")}
    for key, value in config.items():
        repeated = key in text and text[key] == value
        if key not in known and not repeated and not is_harmless(key, value):
            yield key
    for key in wrapper.refused & text.keys():
        if text[key] is not None:
            yield f"text_config.{key}"


def _refused(source: Path | str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError("model", f"{source}: {reason}")
