"""The rotary position embedding of a model's keys, for code that has to undo it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """In a key at position p, pair i of channels is rotated by the angle p * inv_freq[i].

    inv_freq: [rotary_dim / 2] fp32; channels from rotary_dim on are not rotated
    interleaved: pair i is channels 2i and 2i + 1, otherwise i and i + rotary_dim / 2

    A factor on the rotated channels, such as YaRN's attention scaling, is not included:
    it commutes with the rotation.
    """

    inv_freq: Tensor
    interleaved: bool

    @classmethod
    def of(cls, model: Any, *, interleaved: bool) -> Rope:
        """The RoPE of a transformers model."""
        return cls(model.model.rotary_emb.inv_freq.float(), interleaved)
