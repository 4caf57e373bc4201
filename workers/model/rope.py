"""The rotary position embeddings of a model: fixed at load, and known to code that undoes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvmesh.workers.model.rope_scaling import SCALED_LAYERS
from kvmesh.workers.rope_override import RopeOverride


@dataclass(frozen=True, slots=True)
class Rope:
    """In a key at position p, pair i of channels is rotated by the angle p * inv_freq[i].

    inv_freq: [rotary_dim / 2] fp32; channels from rotary_dim on are not rotated
    interleaved: pair i is channels 2i and 2i + 1, otherwise i and i + rotary_dim / 2

    Where values are in keys, channels are counted after those of the value.
    A factor on the rotated channels, such as YaRN's attention scaling, is not included:
    it commutes with the rotation.
    """

    inv_freq: Tensor
    interleaved: bool

    @classmethod
    def of_layers(
        cls, rotary: Any, config: Any, rotated: Sequence[bool], *, interleaved: bool
    ) -> tuple[Rope, ...]:
        """Each layer's RoPE in a transformers model.

        rotary: the model's rotary embedding; rotated: per layer, whether it is applied
        """
        ropes = []
        for layer, turns in enumerate(rotated):
            if hasattr(rotary, "inv_freq"):
                inv_freq = rotary.inv_freq
            else:
                inv_freq = getattr(rotary, f"{config.layer_types[layer]}_inv_freq")
            rope = cls(inv_freq.float(), interleaved)
            ropes.append(rope if turns else replace(rope, inv_freq=torch.zeros_like(rope.inv_freq)))
        return tuple(ropes)


def override_rope(config: Any, override: RopeOverride, trained_len: int) -> None:
    """Scale the RoPE of a transformers configuration as an operator chose.

    trained_len: positions that the model was trained for
    """
    nested = SCALED_LAYERS in config.rope_parameters
    own = config.rope_parameters[SCALED_LAYERS] if nested else config.rope_parameters
    names = ["rope_theta", "partial_rotary_factor"]
    if override.type == "yarn":  # how much it scales the softmax of latent attention
        names += ["mscale", "mscale_all_dim"]
    kept = {key: own[key] for key in names if key in own}
    kind, theta = override.type, kept["rope_theta"]
    if override.type == "ntk":
        head_dim = getattr(config, "head_dim", None)
        dim = int(
            (head_dim or config.hidden_size // config.num_attention_heads)
            * kept.get("partial_rotary_factor", 1.0)
        )
        kept["rope_theta"] = theta * override.factor ** (dim / (dim - 2))
        scaled = {"rope_type": "default", **kept}
    else:
        scaled = {"rope_type": kind, "factor": override.factor, **kept}
    if override.type == "yarn":
        scaled["original_max_position_embeddings"] = trained_len
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = trained_len
    config.max_position_embeddings = math.floor(trained_len * override.factor)
    config.rope_parameters = {**config.rope_parameters, SCALED_LAYERS: scaled} if nested else scaled


def fixed_rotary(rotary: Any, config: Any, device: torch.device, max_model_len: int) -> Any:
    """A new rotary embedding of the same class, whose frequencies no length changes.

    max_model_len: tokens of the longest sequence, which decides between LongRoPE's factors
    """
    made = type(rotary)(config=config).to(device)
    if made.rope_type in ("dynamic", "longrope"):
        length = max_model_len if made.rope_type == "longrope" else None
        compute = ROPE_INIT_FUNCTIONS[made.rope_type]
        made.inv_freq, made.attention_scaling = compute(config, device, seq_len=length)
        made.original_inv_freq = made.inv_freq
        made.rope_type = "default"  # transformers would look at every step's positions
    return made
