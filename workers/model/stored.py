"""Checkpoints whose names and layouts differ from those of the modules that compute them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, LlamaConfig, MixtralConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridRotaryEmbedding,
)

from kvmesh.kernels.linear import GroupedWeight
from kvmesh.workers.errors import UnsupportedModelError
from kvmesh.workers.model.architectures import ARCHITECTURES
from kvmesh.workers.model.facts import ModelFacts, read_json
from kvmesh.workers.model.quantisation import quantisation_of, why_not_read
from kvmesh.workers.model.quantised_weights import QuantisedWeights
from kvmesh.workers.model.standard_keys import standard_keys
from kvmesh.workers.model.weights import WeightReader, Weights


def read_config(facts: ModelFacts, path: Path) -> Any:
    """transformers' configuration of the modules that compute the model in directory `path`.

    Raises UnsupportedModelError if transformers refuses the configuration.
    """
    return config_of(facts.architecture, read_json(path / "config.json"), path / "config.json")


def config_of(architecture: str, values: Mapping[str, Any], source: Path | str) -> Any:
    """`read_config` for the contents of a config.json. source: the file's name, for errors"""
    values = standard_keys(values, Path(source))
    try:
        if architecture == "InternLM2ForCausalLM":
            return _as_llama(values)
        if architecture == "DbrxForCausalLM":
            return _as_mixtral(values)
        # It can have but one value, and infinity has more than one form in JSON.
        known = {key: value for key, value in values.items() if key != "time_step_limit"}
        if type(known.get("attn_temperature_tuning")) is int:  # of early checkpoints of Llama 4
            known["attn_temperature_tuning"] = bool(known["attn_temperature_tuning"])
        return CONFIG_MAPPING[ARCHITECTURES[architecture].model_type].from_dict(known)
    except (ValueError, TypeError, KeyError) as error:
        raise UnsupportedModelError(
            "model", f"{source} is not valid for transformers: {error}"
        ) from error


def stored_as(facts: ModelFacts, reader: WeightReader, path: Path) -> Weights:
    """The weights in directory `path` by the names and in the layout of the modules."""
    weights: Weights = reader
    quantisation = quantisation_of(standard_keys(read_json(path / "config.json"), path))
    if quantisation is not None and why_not_read(quantisation) is None:
        weights = QuantisedWeights(reader, quantisation)
    if facts.architecture == "InternLM2ForCausalLM":
        return InternLM2Weights(weights, facts)
    if facts.architecture == "DbrxForCausalLM":
        return DbrxWeights(weights, facts)
    return weights


def adapt(facts: ModelFacts, model: Any) -> None:
    """Replace what differs in modules of another architecture; before weights are loaded."""
    if facts.architecture == "RecurrentGemmaForCausalLM":
        # One for all layers, as the other models have it.
        attentions = [part for part in model.modules() if hasattr(part, "rotary_emb")]
        model.model.rotary_emb = attentions[0].rotary_emb
        for attention in attentions:
            attention.rotary_emb = None
    if facts.architecture == "GraniteMoeHybridForCausalLM":
        for layer in model.model.layers:
            if layer.self_attn is not None:
                layer.self_attn.use_rope = model.model.rotary_emb is not None
        if model.model.rotary_emb is None:  # whatever it computes is not used
            model.model.rotary_emb = GraniteMoeHybridRotaryEmbedding(model.config)
    if facts.architecture != "DbrxForCausalLM":
        return
    for parent, name in [
        *((layer, "input_layernorm") for layer in model.model.layers),
        *((layer, "post_attention_layernorm") for layer in model.model.layers),
        (model.model, "norm"),
    ]:
        weight = getattr(parent, name).weight
        norm = nn.LayerNorm(weight.shape, bias=False, device=weight.device, dtype=weight.dtype)
        setattr(parent, name, norm)


def _as_mixtral(values: Mapping[str, Any]) -> MixtralConfig:
    """DBRX is Mixtral with other norms and clipped projections."""
    names = ("auto_map", "architectures", "model_type", "clip_qkv")
    config = MixtralConfig(
        **{key: value for key, value in values.items() if key not in names},
        sliding_window=None,
    )
    config.clip_qkv = values.get("clip_qkv")
    return config


def _as_llama(values: Mapping[str, Any]) -> LlamaConfig:
    """InternLM2 is Llama, with a bias on queries, keys, values and outputs or none."""
    config = {key: value for key, value in values.items() if key not in ("auto_map", "bias")}
    config["attention_bias"] = values.get("bias", True)
    config["model_type"] = "llama"
    config.setdefault("tie_word_embeddings", False)
    return LlamaConfig(**{"rms_norm_eps": 1e-6, **config})


class InternLM2Weights:
    """Llama's tensors in an InternLM2 checkpoint.

    Queries, keys and values are one projection, whose rows are ordered by KV head:

        wqkv   [num_kv_heads, group queries + key + value, head_dim, hidden]
    """

    _NAMES = (
        (r"^model\.embed_tokens\.", "model.tok_embeddings."),
        (r"^lm_head\.", "output."),
        (r"\.self_attn\.o_proj\.", ".attention.wo."),
        (r"\.mlp\.gate_proj\.", ".feed_forward.w1."),
        (r"\.mlp\.up_proj\.", ".feed_forward.w3."),
        (r"\.mlp\.down_proj\.", ".feed_forward.w2."),
        (r"\.input_layernorm\.", ".attention_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
    )

    def __init__(self, weights: Weights, facts: ModelFacts) -> None:
        self._weights = weights
        self._head_dim = facts.head_dim
        self._num_kv_heads = facts.num_kv_heads
        self._group = facts.num_heads // facts.num_kv_heads

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.dtype

    @property
    def keeps_bits(self) -> bool:
        return self._weights.keeps_bits

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._weights

    def whole(self, name: str, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
        return self._weights.whole(self._stored(name), shape, dtype)

    def rows(self, name: str, shape: torch.Size, first: int, end: int) -> Tensor:
        part = re.search(r"\.self_attn\.([qkv])_proj\.", name)
        if part is None:
            return self._weights.rows(self._stored(name), shape, first, end)
        kind = part[1]
        slots = self._slots(kind)
        rows_per_kv_head = self._head_dim * (self._group if kind == "q" else 1)
        stride = (self._group + 2) * self._head_dim
        stored = name.replace(part[0], ".attention.wqkv.")
        joined = self._weights.rows(
            stored,
            torch.Size((self._num_kv_heads * stride, *shape[1:])),
            first // rows_per_kv_head * stride,
            end // rows_per_kv_head * stride,
        )
        by_head = joined.view(-1, self._group + 2, self._head_dim, *shape[1:])
        return by_head[:, slots].reshape(end - first, *shape[1:]).contiguous()

    def kept(self, name: str, shape: torch.Size) -> GroupedWeight | None:
        part = re.search(r"\.self_attn\.([qkv])_proj\.", name)
        if part is None:
            return self._weights.kept(self._stored(name), shape)
        stored = name.replace(part[0], ".attention.wqkv.")
        rows = self._num_kv_heads * (self._group + 2) * self._head_dim
        joined = self._weights.kept(stored, torch.Size((rows, *shape[1:])))
        if joined is None:
            return None
        by_head = torch.arange(rows, device=joined.device).view(-1, self._group + 2, self._head_dim)
        return joined.rows(by_head[:, self._slots(part[1])].flatten())

    def columns(self, name: str, shape: torch.Size, first: int, end: int) -> Tensor:
        return self._weights.columns(self._stored(name), shape, first, end)

    def part(self, name: str, shape: torch.Size, *index: slice) -> Tensor:
        return self._weights.part(self._stored(name), shape, *index)

    def leave(self, name: str, shape: torch.Size) -> None:
        self._weights.leave(self._stored(name), shape)

    def check_all_read(self) -> None:
        self._weights.check_all_read()

    def _slots(self, kind: str) -> slice | int:
        """Where a KV head's queries, key or value are in the joined projection."""
        return slice(0, self._group) if kind == "q" else self._group + (kind == "v")

    def _stored(self, name: str) -> str:
        for pattern, stored in self._NAMES:
            name = re.sub(pattern, stored, name)
        return name


class DbrxWeights:
    """Mixtral's tensors in a DBRX checkpoint.

    Queries, keys and values are one projection, in this order; experts are rows of three tensors:

        w1, v1   [num_experts * width, hidden], gate and up
        w2       [num_experts * width, hidden], down, transposed
    """

    _NAMES = (
        (r"^model\.embed_tokens\.", "transformer.wte."),
        (r"^model\.norm\.", "transformer.norm_f."),
        (r"^model\.layers\.", "transformer.blocks."),
        (r"\.self_attn\.o_proj\.", ".norm_attn_norm.attn.out_proj."),
        (r"\.mlp\.gate\.", ".ffn.router.layer."),
        (r"\.input_layernorm\.", ".norm_attn_norm.norm_1."),
        (r"\.post_attention_layernorm\.", ".norm_attn_norm.norm_2."),
    )
    _EXPERT = re.compile(r"^model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.w([123])\.")

    def __init__(self, weights: Weights, facts: ModelFacts) -> None:
        self._weights = weights
        self._num_experts, self._width = facts.num_experts, facts.expert_size
        queries, keys = (heads * facts.head_dim for heads in (facts.num_heads, facts.num_kv_heads))
        self._starts = {"q": 0, "k": queries, "v": queries + keys}
        self._joined_rows = queries + 2 * keys

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.dtype

    @property
    def keeps_bits(self) -> bool:
        return self._weights.keeps_bits

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._weights

    def whole(self, name: str, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
        return self._weights.whole(self._stored(name), shape, dtype)

    def rows(self, name: str, shape: torch.Size, first: int, end: int) -> Tensor:
        if self._EXPERT.match(name):
            return self._of_expert(name, shape[1], first, end)
        part = re.search(r"\.self_attn\.([qkv])_proj\.", name)
        if part is None:
            return self._weights.rows(self._stored(name), shape, first, end)
        stored = self._stored(name.replace(part[0], ".norm_attn_norm.attn.Wqkv."))
        start = self._starts[part[1]]
        joined = torch.Size((self._joined_rows, *shape[1:]))
        return self._weights.rows(stored, joined, start + first, start + end)

    def columns(self, name: str, shape: torch.Size, first: int, end: int) -> Tensor:
        if self._EXPERT.match(name):
            return self._of_expert(name, shape[0], first, end).t()
        return self._weights.columns(self._stored(name), shape, first, end)

    def part(self, name: str, shape: torch.Size, *index: slice) -> Tensor:
        return self._weights.part(self._stored(name), shape, *index)

    def kept(self, name: str, shape: torch.Size) -> GroupedWeight | None:
        """None: no tool is known that quantises its joined tensors."""
        return None

    def leave(self, name: str, shape: torch.Size) -> None:
        assert self._EXPERT.match(name), "only experts are left to other ranks"
        # The rank's own experts are rows of the same tensor, whose shape is checked then.

    def check_all_read(self) -> None:
        self._weights.check_all_read()

    def _of_expert(self, name: str, hidden: int, first: int, end: int) -> Tensor:
        found = self._EXPERT.match(name)
        assert found is not None
        layer, expert, kind = found.groups()
        start = int(expert) * self._width
        return self._weights.rows(
            f"transformer.blocks.{layer}.ffn.experts.mlp.{_DBRX_EXPERT[kind]}",
            torch.Size((self._num_experts * self._width, hidden)),
            start + first,
            start + end,
        )

    def _stored(self, name: str) -> str:
        for pattern, stored in self._NAMES:
            name = re.sub(pattern, stored, name)
        return name


# Mixtral's w1, w3 and w2 are gate, up and down.
_DBRX_EXPERT = {"1": "w1", "3": "v1", "2": "w2"}
