"""The sizes of a model, from its configuration alone. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import ModelFacts, check_architecture
from kvmesh.workers.model.state_shape import StateShape


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes in a configuration.

    intermediate_size: width of a dense layer's MLP, 0 if there is none
    moe_intermediate_size: of an expert's; shared_size: of an expert that computes every token,
        0 for none
    expert_layers: how many layers have `experts` instead of one MLP
    experts_per_token: to how many of them a token is sent
    state: what recurrent layers keep of a sequence, None if there are none
    values_in_keys: how many channels of a key are its value; 0 if values are of their own
    window_kinds: different sliding windows of layers; has_full_attention: whether one has none
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
    shared_size: int = 0
    expert_layers: int = 0
    state: StateShape | None = None
    values_in_keys: int = 0
    window_kinds: int = 1
    has_full_attention: bool = True

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
        windows = architecture.sliding_windows(config)
        hidden = number("hidden_size")
        sizes = cls(
            architecture=architecture.name,
            layers=layers,
            heads=heads,
            kv_heads=number("num_key_value_heads", default=architecture.kv_heads or heads),
            head_dim=number("head_dim", default=architecture.head_dim or hidden // heads),
            hidden_size=hidden,
            intermediate_size=0,
            vocab_size=number("vocab_size"),
            state=architecture.state(config),
            window_kinds=len(set(windows)),
            has_full_attention=None in windows,
        )
        if architecture.latent:
            rank = number("kv_lora_rank")
            width = rank + number("qk_rope_head_dim")
            sizes = replace(sizes, kv_heads=1, head_dim=width, values_in_keys=rank)
        keys = architecture.experts_in(config)
        if keys is None or not all(keys.layers(config)):
            width = number(architecture.mlp_key(config)) // architecture.mlp_parts
            sizes = replace(sizes, intermediate_size=width)
        if keys is None:
            return sizes
        return replace(
            sizes,
            experts=number(*keys.count),
            experts_per_token=number("num_experts_per_tok"),
            moe_intermediate_size=number(keys.width),
            shared_size=keys.shared_width(number),
            expert_layers=sum(keys.layers(config)),
        )

    @property
    def kv_layers(self) -> int:
        """Layers with keys and values."""
        return self.layers if self.state is None else self.layers - self.state.layers

    @property
    def mlp_widths(self) -> list[int]:
        """Of all MLPs that ranks have a part of."""
        widths = []
        if self.expert_layers < self.layers:
            widths.append(self.intermediate_size)
        if self.expert_layers:
            widths.append(self.moe_intermediate_size)
        return [*widths, self.shared_size] if self.shared_size else widths

    @property
    def tp_choices(self) -> list[int]:
        """The numbers of ranks that heads, KV heads and MLPs can be divided by."""
        first = self.heads if self.values_in_keys else self.kv_heads
        choices = divisors(first, self.heads, *self.mlp_widths)
        return [ranks for ranks in choices if _divides(self.state, ranks)]

    @property
    def kvp_width(self) -> int:
        """Of what attention returns, what all ranks must divide: channels, or for latents, which
        a matrix of each head makes values of, heads."""
        return self.heads if self.values_in_keys else self.heads * self.head_dim


def check_tp(facts: ModelFacts, tp: int, kvp: int = 1, *, expert_parallel: bool = False) -> None:
    """Raises ConfigError naming `tp` and its valid values unless it divides the heads and what
    else is split: MLPs and, if the model has any, experts and recurrent layers; or naming `kvp`
    unless it divides a rank's part of what is split over all ranks: the channels of the heads and
    all but the heads.

    expert_parallel: ranks have whole experts
    """
    split = {f"{facts.num_heads} heads": facts.num_heads}
    if facts.num_experts and expert_parallel:
        split[f"{facts.num_experts} experts"] = facts.num_experts
    elif facts.num_experts:
        split[f"experts' MLP of {facts.expert_size}"] = facts.expert_size
    split |= {f"MLP of {width}": width for width in facts.mlp_sizes}
    if facts.state is not None:
        split[_state_name(facts.state)] = facts.state.groups
    latent = facts.values_in_keys > 0  # and every rank has all of it
    choices = divisors(facts.num_heads if latent else facts.num_kv_heads, *split.values())
    valid = [ranks for ranks in choices if _divides(facts.state, ranks)]
    if tp not in valid:
        of_keys = "" if latent else f"{facts.num_kv_heads} KV heads of "
        raise ConfigError(
            "tp",
            f"must divide the {of_keys}{facts.name}"
            f" (and its {' and '.join(split)}): {', '.join(map(str, valid))}; got {tp}",
        )
    if not latent:  # a part of the channels may end in a head
        del split[f"{facts.num_heads} heads"]
        split[f"{facts.num_heads * facts.head_dim} channels"] = facts.num_heads * facts.head_dim
    choices = divisors(*(size // tp for size in split.values()))
    valid = [ranks for ranks in choices if _divides(facts.state, tp * ranks)]
    if kvp not in valid:
        raise ConfigError(
            "kvp",
            f"must divide the parts of {facts.name}'s {' and '.join(split)} that each of {tp} "
            f"shares of its heads has: {', '.join(map(str, valid))}; got {kvp}",
        )


def _divides(state: StateShape | None, ranks: int) -> bool:
    return state is None or state.divides_by(ranks)


def _state_name(state: StateShape) -> str:
    groups = f", in {state.shared_groups} groups" if state.shared_groups > 1 else ""
    return f"{state.groups} heads of recurrent layers{groups}"


def divisors(first: int, *widths: int) -> list[int]:
    """The numbers of ranks that divide all of these."""
    return [
        ranks
        for ranks in range(1, first + 1)
        if first % ranks == 0 and all(width % ranks == 0 for width in widths)
    ]
