"""The rotary position embedding a model gives its keys, for what has to undo it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """A key at position p has its plane i turned by the angle p * inv_freq[i].

    inv_freq: [rotary_dim / 2] fp32; channels from rotary_dim on are not turned
    interleaved: plane i is channels 2i and 2i + 1, else i and i + rotary_dim / 2

    A factor of the turned channels, as YaRN's attention scaling, is not part of it:
    it commutes with turning.
    """

    inv_freq: Tensor
    interleaved: bool

    @classmethod
    def of(cls, model: Any, *, interleaved: bool) -> Rope:
        """The one of a transformers model."""
        return cls(model.model.rotary_emb.inv_freq.float(), interleaved)
