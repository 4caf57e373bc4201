"""The ranges of keys or values, for `Static8`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.kernels.formats.comparison.static8.side import Static8

# For a channel that is constant.
_MIN_SCALE = 1e-6


class RangeObserver:
    """Minimum and maximum of every head and channel, or of a whole layer."""

    wants_gradients = False

    def __init__(self, side: Static8) -> None:
        self._side = side
        self._ranges: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(self, layer: int, x: Tensor, gradient: Tensor | None, positions: Tensor) -> None:
        low, high = x.amin(0), x.amax(0)
        if layer in self._ranges:
            low = torch.minimum(low, self._ranges[layer][0])
            high = torch.maximum(high, self._ranges[layer][1])
        self._ranges[layer] = low, high

    def params(self, layer: int) -> dict[str, Tensor]:
        low, high = (x.double().cpu() for x in self._ranges[layer])
        if self._side.per == "layer":
            low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        scale = ((high - low) / 255.0).clamp_min(_MIN_SCALE)
        return {"scale": scale.float(), "zero": ((low + high) / 2.0).float()}
