"""How many numbers a model's weights have on each rank, from its configuration alone.

    tp     queries, keys and values, and what belongs to their heads            divided by tp
    all    output and MLP projections, experts, rows of the output layer        divided by tp · kvp
    whole  embeddings, norms, biases after a sum, routers of experts            on every rank

Its modules are built without memory, on torch's meta device, and divided as `shards.py` does it,
where kvp is 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

<<<<<<< HEAD
from kvmesh.workers.model.shards import shard_of
from kvmesh.workers.model.sizes import ModelSizes
from kvmesh.workers.model.stored import config_of

# What is done with a weight, or with a bias, of a module with that shard; the rest is whole.
_DIVIDED_BY_TP = frozenset(
    {"queries, keys, values", "split norm", "module per head", "weight rows"}
)
_DIVIDED_BY_ALL = frozenset({"gate, up", "columns"})
=======
# Whether a configuration asks for something: the key that says so, or what holds for all of them.
_Rule = str | bool


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the weights of a model type have besides matrices.

    layer_norms, final_norms: vectors of the hidden size
    qkv_bias, out_bias, mlp_bias: biases of the projections
    norms_of_all: norms of queries and keys that have a number for each of their channels
    norms_of_one: norms of queries and keys that all heads share
    tied: transformers' default of tie_word_embeddings
    """

    layer_norms: int = 2
    final_norms: int = 1
    qkv_bias: _Rule = "attention_bias"
    out_bias: _Rule = "attention_bias"
    mlp_bias: _Rule = False
    norms_of_all: _Rule = False
    norms_of_one: bool = False
    tied: bool = False
    experts: bool = False


_NO_BIAS = _Kind(qkv_bias=False, out_bias=False)
_KINDS: Mapping[str, _Kind] = {
    "llama": _Kind(mlp_bias="mlp_bias"),
    "mistral": _NO_BIAS,
    "ministral": _NO_BIAS,
    "qwen2": _Kind(qkv_bias=True, out_bias=False),
    "qwen3": _Kind(norms_of_one=True),
    "qwen3_moe": _Kind(norms_of_one=True, experts=True),
    "mixtral": replace(_NO_BIAS, experts=True),
    "gemma": _Kind(tied=True),
    "gemma2": _Kind(layer_norms=4, tied=True),
    "gemma3_text": _Kind(layer_norms=4, norms_of_one=True, tied=True),
    "olmo": _Kind(layer_norms=0, final_norms=0),
    "olmo2": _Kind(norms_of_all=True),
    "olmo3": _Kind(norms_of_all=True),
    "olmoe": _Kind(norms_of_all=True, experts=True),
    "cohere": _Kind(layer_norms=1, norms_of_all="use_qk_norm", tied=True),
    "cohere2": _Kind(layer_norms=1, tied=True),
    # Its norms have biases.
    "stablelm": _Kind(4, 2, qkv_bias="use_qkv_bias", out_bias=False, norms_of_all="qk_layernorm"),
    "phi3": _NO_BIAS,
    "smollm3": _Kind(mlp_bias="mlp_bias", tied=True),
    "granite": _Kind(mlp_bias="mlp_bias"),
    "glm": _Kind(out_bias=False),
    "glm4": _Kind(layer_norms=4, out_bias=False),
}
# Architectures whose weights can be counted, besides those that are served.
_OTHERS: Mapping[str, str] = {
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes in a configuration.

    intermediate_size: width of a dense layer's MLP; moe_intermediate_size: of an expert's
    expert_layers: how many layers have `experts` instead of one MLP
    experts_per_token: to how many of them a token is sent
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    experts: int = 1
    experts_per_token: int = 1
    moe_intermediate_size: int = 0
    expert_layers: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], source: Path | str) -> ModelSizes:
        """The sizes of a config.json's contents.

        source: the file's name, for errors. Raises UnsupportedModelError if the architecture's
        weights cannot be counted, ConfigError naming a key that is missing or wrong.
        """
        name, model_type = _architecture_of(config, source)
        served = ARCHITECTURES.get(name)

        def number(*keys: str, default: int | None = None) -> int:
            """The first of the keys that is there."""
            value = next((config[key] for key in keys if config.get(key) is not None), default)
            if type(value) is not int or value < 1:
                raise ConfigError(
                    "model", f"{source}: {keys[0]} must be a positive integer, got {value!r}"
                )
            return value

        layers, heads = number("num_hidden_layers"), number("num_attention_heads")
        hidden = number("hidden_size")
        sizes = cls(
            model_type=model_type,
            layers=layers,
            heads=heads,
            kv_heads=number("num_key_value_heads", default=(served and served.kv_heads) or heads),
            head_dim=number("head_dim", default=(served and served.head_dim) or hidden // heads),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            vocab_size=number("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", _KINDS[model_type].tied)),
        )
        if not _KINDS[model_type].experts:
            return sizes
        dense = config.get("mlp_only_layers") or []
        every = number("decoder_sparse_step", default=1)
        return replace(
            sizes,
            experts=number("num_local_experts", "num_experts"),
            experts_per_token=number("num_experts_per_tok"),
            moe_intermediate_size=number("moe_intermediate_size", "intermediate_size"),
            expert_layers=sum(
                layer not in dense and (layer + 1) % every == 0 for layer in range(layers)
            ),
        )

    @property
    def tp_choices(self) -> list[int]:
        """The numbers of ranks that heads, KV heads and MLPs can be divided by."""
        widths = [self.heads]
        if self.expert_layers < self.layers:
            widths.append(self.intermediate_size)
        if self.expert_layers:
            widths.append(self.moe_intermediate_size)
        return divisors(self.kv_heads, *widths)
>>>>>>> plan


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """Numbers in a model's weights, by how ranks divide them; see the module.

    vocab_size, hidden_size: of the output layer, whose rows are divided over all ranks
    tied: the output layer's rows are those of the embeddings
    idle: of `all`, those of the experts that a token is not sent to
    """

    tp: int
    all: int
    whole: int
    vocab_size: int
    hidden_size: int
    tied: bool
    idle: int

    @classmethod
<<<<<<< HEAD
    def of(cls, sizes: ModelSizes, config: Mapping[str, Any], source: Path | str) -> WeightCounts:
        """config, source: as `ModelSizes.of` takes them.

        Raises UnsupportedModelError for a configuration that transformers refuses.
        """
        theirs = config_of(sizes.architecture, config, source)
        with torch.device("meta"):
            body = AutoModelForCausalLM.from_config(theirs).model
        counts: Counter[str] = Counter()
        for name, weight in body.named_parameters():
            module, _, kind = name.rpartition(".")
            shard = shard_of(theirs.model_type, module)
            counts[_part(shard, module, kind)] += weight.numel()
            if shard == "experts":
                counts["experts"] += weight.numel()
        idle = counts["experts"] * (sizes.experts - sizes.experts_per_token) // sizes.experts
        return cls(
            tp=counts["tp"],
            all=counts["all"],
            whole=counts["whole"],
=======
    def of(cls, sizes: ModelSizes, config: Mapping[str, Any]) -> WeightCounts:
        """config: says which projections have biases, and which heads have norms"""
        hidden, kind = sizes.hidden_size, _KINDS[sizes.model_type]
        q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim

        def says(rule: _Rule) -> bool:
            return bool(config.get(rule)) if isinstance(rule, str) else rule

        mlp_bias = says(kind.mlp_bias)
        norms = kind.layer_norms
        if sizes.model_type == "stablelm" and config.get("use_parallel_residual"):
            norms = 2
        dense = sizes.layers - sizes.expert_layers
        expert = 3 * hidden * sizes.moe_intermediate_size
        mlp = 3 * hidden * sizes.intermediate_size
        mlp += 2 * sizes.intermediate_size * mlp_bias
        attention = (hidden + says(kind.qkv_bias)) * (q + 2 * kv)
        attention += (q + kv) * says(kind.norms_of_all)
        whole = (norms + says(kind.out_bias)) * hidden + 2 * sizes.head_dim * kind.norms_of_one
        return cls(
            tp=sizes.layers * attention,
            all=sizes.layers * q * hidden + dense * mlp
            + sizes.expert_layers * sizes.experts * expert,
            whole=sizes.layers * whole
            + dense * hidden * mlp_bias
            + sizes.expert_layers * sizes.experts * hidden
            + (kind.final_norms + sizes.vocab_size) * hidden,
>>>>>>> plan
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            tied=theirs.tie_word_embeddings,
            idle=idle,
        )

    def of_rank(self, tp: int, kvp: int = 1) -> int:
        """Numbers on the rank that has most."""
        ranks = tp * kvp
        rows = -(-self.vocab_size // ranks)
        # Tied rows are not stored twice, except on the last rank, where they are padded.
        own = self.hidden_size * rows if not self.tied or self.vocab_size % ranks else 0
        return self.tp // tp + self.all // ranks + self.whole + own

    @property
    def total(self) -> int:
        """Numbers of the whole model."""
        return self.of_rank(1)

    @property
    def multiplied(self) -> int:
        """Numbers that a token is multiplied with: without embeddings and idle experts."""
        return self.tp + self.all - self.idle + self.vocab_size * self.hidden_size


<<<<<<< HEAD
def _part(shard: str, module: str, kind: str) -> str:
    """Which part of WeightCounts a parameter of that name belongs to."""
    if shard == "rows":
        return "tp" if ".self_attn." in module else "all"
    if shard in _DIVIDED_BY_TP:
        return "tp"
    if shard in _DIVIDED_BY_ALL and kind == "weight":
        return "all"
    if shard == "experts" and kind != "down_proj_bias":
        return "all"
    return "whole"
=======
def divisors(kv_heads: int, *widths: int) -> list[int]:
    """The numbers of tensor-parallel ranks that divide KV heads and all `widths`."""
    return [
        ranks
        for ranks in range(1, kv_heads + 1)
        if kv_heads % ranks == 0 and all(width % ranks == 0 for width in widths)
    ]


def _architecture_of(config: Mapping[str, Any], source: Path | str) -> tuple[str, str]:
    """Its name and model type; raises UnsupportedModelError if it cannot be counted."""
    names = config.get("architectures") or []
    name = str(names[0]) if names else f"of model type {config.get('model_type')}"
    served = ARCHITECTURES.get(name)
    model_type = _OTHERS.get(name) if served is None else served.model_type
    if model_type is None:
        known = ", ".join(dict.fromkeys((*ARCHITECTURES, *_OTHERS)))
        raise UnsupportedModelError(
            "model", f"{source}: architecture {name} is not known; expected one of {known}"
        )
    if model_type not in _KINDS:
        raise UnsupportedModelError(
            "model", f"{source}: the weights of {name} are not counted yet, so it cannot be planned"
        )
    return name, model_type
>>>>>>> plan
