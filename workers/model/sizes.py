"""The sizes of a model, from its configuration alone. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import check_architecture


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes in a configuration.

    intermediate_size: width of a dense layer's MLP; moe_intermediate_size: of an expert's
    expert_layers: how many layers have `experts` instead of one MLP
    experts_per_token: to how many of them a token is sent
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    experts: int = 1
    experts_per_token: int = 1
    moe_intermediate_size: int = 0
    expert_layers: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], source: Path | str) -> ModelSizes:
        """The sizes of a config.json's contents.

        source: the file's name, for errors. Raises UnsupportedModelError for an architecture that
        is not served, ConfigError naming a key that is missing or wrong.
        """
        architecture = check_architecture(config, Path(source))

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
            architecture=architecture.name,
            layers=layers,
            heads=heads,
            kv_heads=number("num_key_value_heads", default=architecture.kv_heads or heads),
            head_dim=number("head_dim", default=architecture.head_dim or hidden // heads),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            vocab_size=number("vocab_size"),
        )
        if architecture.experts is None:
            return sizes
        dense = config.get("mlp_only_layers") or []
        every = number("decoder_sparse_step", default=1)
        return replace(
            sizes,
            experts=number(*architecture.experts.count),
            experts_per_token=number("num_experts_per_tok"),
            moe_intermediate_size=number(architecture.experts.width),
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


def divisors(kv_heads: int, *widths: int) -> list[int]:
    """The numbers of tensor-parallel ranks that divide KV heads and all `widths`."""
    return [
        ranks
        for ranks in range(1, kv_heads + 1)
        if kv_heads % ranks == 0 and all(width % ranks == 0 for width in widths)
    ]
