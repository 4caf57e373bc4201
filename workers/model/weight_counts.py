"""How many numbers a model's weights are on each rank, from its configuration alone.

    tp     heads of queries, keys and values                                    divided by tp
    all    output and MLP projections, experts, rows of the output layer        divided by tp · kvp
    whole  embeddings, norms, biases after a sum, routers of experts            on every rank

as `shards.py` divides them, where kvp is 1. Torch-free: a configuration is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.architectures import ARCHITECTURES

# Architectures whose weights can be counted besides those that are served.
_MIXTURES: Mapping[str, str] = {
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# transformers' default of tie_word_embeddings is false for the others.
_TIED_BY_DEFAULT = frozenset({"gemma", "gemma2", "cohere"})


@dataclass(frozen=True, slots=True)
class _Norms:
    """Weights of a layer's norms, in vectors of the hidden size, and of the final norm."""

    of_layer: int = 2
    final: int = 1


_NORMS: Mapping[str, _Norms] = {
    "gemma2": _Norms(of_layer=4),
    "olmo": _Norms(0, 0),
    "cohere": _Norms(of_layer=1),
    "stablelm": _Norms(of_layer=4, final=2),  # with biases
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
            tied=bool(config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
        )
        if model_type not in _MIXTURES.values():
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
    def of(cls, sizes: ModelSizes, config: Mapping[str, Any]) -> WeightCounts:
        """config: says which projections have biases, and which heads have norms"""
        hidden, kind = sizes.hidden_size, sizes.model_type
        q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        qkv_bias, bias = _has_biases(config, kind)
        mlp_bias = kind == "llama" and bool(config.get("mlp_bias"))
        norms = _NORMS.get(kind, _Norms())
        of_layer = norms.of_layer
        if kind == "stablelm" and config.get("use_parallel_residual"):
            of_layer = 2
        heads_norm, common_norm = _head_norms(sizes, config)
        dense = sizes.layers - sizes.expert_layers
        expert = 3 * hidden * sizes.moe_intermediate_size
        mlp = 3 * hidden * sizes.intermediate_size
        mlp += 2 * sizes.intermediate_size * mlp_bias
        attention = (hidden + qkv_bias) * (q + 2 * kv) + heads_norm
        whole = of_layer * hidden + common_norm + hidden * bias
        return cls(
            tp=sizes.layers * attention,
            all=sizes.layers * q * hidden + dense * mlp
            + sizes.expert_layers * sizes.experts * expert,
            whole=sizes.layers * whole
            + dense * hidden * mlp_bias
            + sizes.expert_layers * sizes.experts * hidden
            + (norms.final + sizes.vocab_size) * hidden,
            vocab_size=sizes.vocab_size,
            hidden_size=hidden,
            tied=sizes.tied,
            idle=sizes.expert_layers * (sizes.experts - sizes.experts_per_token) * expert,
        )  # fmt: skip

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
    if name in ARCHITECTURES:
        return name, ARCHITECTURES[name].model_type
    if name in _MIXTURES:
        return name, _MIXTURES[name]
    known = ", ".join((*ARCHITECTURES, *_MIXTURES))
    raise UnsupportedModelError(
        "model", f"{source}: architecture {name} is not known; expected one of {known}"
    )


def _has_biases(config: Mapping[str, Any], kind: str) -> tuple[bool, bool]:
    """Of queries, keys and values; of the output projection."""
    if kind == "qwen2":
        return True, False
    if kind == "stablelm":
        return bool(config.get("use_qkv_bias")), False
    bias = bool(config.get("attention_bias"))
    return bias, bias


def _head_norms(sizes: ModelSizes, config: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers in a layer's norms of queries and keys: those of each head, and common ones."""
    each = (sizes.heads + sizes.kv_heads) * sizes.head_dim
    match sizes.model_type:
        case "olmo2":
            return each, 0
        case "cohere":
            return each * bool(config.get("use_qk_norm")), 0
        case "stablelm":
            return each * bool(config.get("qk_layernorm")), 0
        case "qwen3" | "qwen3_moe":
            return 0, 2 * sizes.head_dim
    return 0, 0
