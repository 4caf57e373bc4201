"""Ranges and levels of keys or values, for `NonUniform` (KVQuant, arXiv 2401.18079).

Keys, before RoPE, have ranges per head and channel; values per token; levels are per layer.

    scale, zero   map the range between two percentiles of a channel to [-1, 1]; then they are
                  refitted alternately with the levels, as the least-squares line through
                  (level, number)
    levels        optimal for the weighted numbers (levels.py). The weight is a channel's
                  Fisher information times the square of its scale, so that the error is
                  measured by its effect on the loss. KVQuant weighs every number by its own
                  squared gradient, whose noise costs as much on other text as it gains
    Q-Norm        C' = C s1/s2 + (m1 - m2 s1/s2) with the means m and deviations s of the
                  numbers (1) and of their levels (2), because levels at the centres of cells
                  shrink the deviation. Used for keys, since a softmax suffers more from bias
                  than from noise. Values get an unbiased scale when they are sealed

Outliers are excluded from fits: they are chosen in the same way as in the codec.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvmesh.kernels.formats.comparison.nuq.rope import RopePairs, phases
from kvmesh.kernels.formats.comparison.nuq.side import NonUniform
from kvmesh.workers.calibration.levels import best_levels
from kvmesh.workers.model.rope import Rope

_PERCENTILE = 0.005  # KVQuant's 1%, half of it at each end
_ROUNDS = 4
# Per layer and side: how many numbers percentiles and levels are computed from.
_MAX_TOKENS = 8192
_MAX_NUMBERS = 1 << 23
_MIN_SCALE = 1e-6


class LevelObserver:
    """Keeps some tokens of every window, and the sum of squared gradients of all tokens.

    samples: number of windows
    """

    wants_gradients = True

    def __init__(
        self,
        side: NonUniform,
        ropes: Sequence[Rope],
        num_kv_heads: int,
        head_dim: int,
        samples: int,
    ) -> None:
        self._side = side
        self._ropes = ropes
        max_tokens = min(_MAX_TOKENS, max(1024, _MAX_NUMBERS // (num_kv_heads * head_dim)))
        self._tokens_per_window = -(-max_tokens // samples)
        self._generator = torch.Generator().manual_seed(0)
        self._kept: dict[int, list[Tensor]] = {}
        self._fisher: dict[int, Tensor] = {}

    def observe(self, layer: int, x: Tensor, gradient: Tensor | None, positions: Tensor) -> None:
        assert gradient is not None
        if not self._side.values:
            back = phases(self._ropes[layer].inv_freq, positions).conj().unsqueeze(1)
            rope = RopePairs(self._ropes[layer].interleaved)
            x, gradient = rope.rotate(x, back), rope.rotate(gradient, back)
        order = torch.randperm(len(x), generator=self._generator)[: self._tokens_per_window]
        self._kept.setdefault(layer, []).append(x[order.to(x.device)].bfloat16().cpu())
        fisher = gradient.square().sum(0).double().cpu()
        self._fisher[layer] = self._fisher.get(layer, 0.0) + fisher

    def params(self, layer: int) -> dict[str, Tensor]:
        x = torch.cat(self._kept.pop(layer)).float()
        fisher = self._fisher.pop(layer)
        # Relative to the layer's mean; if no channel has an effect, all count equally.
        mean = fisher.mean()
        fisher = (fisher / mean).float() if mean > 0 else torch.ones_like(fisher).float()
        if self._side.values:
            return self._fit_values(x, fisher)
        return self._fit_keys(x, fisher, self._ropes[layer])

    def _fit_keys(self, x: Tensor, fisher: Tensor, rope: Rope) -> dict[str, Tensor]:
        """x: [tokens, num_kv_heads, head_dim]; fisher: [num_kv_heads, head_dim]"""
        importance = fisher.sqrt()
        low, high = _percentiles(x)
        scale, zero = _clamped((high - low) / 2), (high + low) / 2
        t = (x - zero) / scale
        inside = t.abs() <= 1
        levels = self._levels(t, inside, fisher * scale.square())
        for _ in range(_ROUNDS):
            chosen = _nearest((x - zero) / scale, levels)
            missed = (chosen * scale + zero - x).abs() * importance
            inside = self._all_but_outliers(missed)
            scale, zero = _line(chosen, x, inside)
            levels = self._levels((x - zero) / scale, inside, fisher * scale.square())
        return {
            "levels": _q_norm(((x - zero) / scale)[inside], levels),
            "bounds": _bounds(levels),
            "scale": scale,
            "zero": zero,
            "importance": importance / importance.amax(),
            "inv_freq": rope.inv_freq.cpu(),
            "interleaved": torch.tensor([rope.interleaved], dtype=torch.uint8),
        }

    def _fit_values(self, x: Tensor, fisher: Tensor) -> dict[str, Tensor]:
        inside = self._all_but_outliers((x - x.mean(-1, keepdim=True)).abs())
        low = x.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
        high = x.masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)
        scale, zero = _clamped((high - low) / 2), (high + low) / 2
        t = (x - zero) / scale
        levels = self._levels(t, inside, fisher * scale.square())
        return {"levels": levels, "bounds": _bounds(levels)}

    def _all_but_outliers(self, missed: Tensor) -> Tensor:
        apart = missed.topk(self._side.outliers(missed.shape[-1]), dim=-1).indices
        return torch.ones_like(missed, dtype=torch.bool).scatter_(-1, apart, False)

    def _levels(self, t: Tensor, inside: Tensor, weights: Tensor) -> Tensor:
        numbers = t[inside].double().numpy()
        weights_inside = weights.expand_as(t)[inside].double().numpy()
        found = best_levels(numbers, weights_inside, 2**self._side.width)
        return torch.from_numpy(found.astype(np.float32))


def _bounds(levels: Tensor) -> Tensor:
    return (levels[1:] + levels[:-1]) / 2


def _q_norm(t: Tensor, levels: Tensor) -> Tensor:
    """The levels, shifted and scaled to the mean and deviation of the numbers they represent."""
    numbers, chosen = t.double(), _nearest(t, levels).double()
    ratio = float(numbers.std() / chosen.std().clamp_min(1e-9))
    return levels * ratio + float(numbers.mean() - chosen.mean() * ratio)


def _percentiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each channel without outliers: [num_kv_heads, head_dim] each."""
    at = torch.tensor([_PERCENTILE, 1 - _PERCENTILE])
    low, high = torch.stack([head.quantile(at, dim=0) for head in x.unbind(1)], dim=1)
    return low, high


def _nearest(t: Tensor, levels: Tensor) -> Tensor:
    return levels[torch.bucketize(t.contiguous(), _bounds(levels))]


def _line(chosen: Tensor, x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of x by its levels: least squares over a channel without outliers."""
    weight = inside.float()
    count = weight.sum(0).clamp_min(1.0)
    mean_level, mean = (chosen * weight).sum(0) / count, (x * weight).sum(0) / count
    centred = (chosen - mean_level) * weight
    slope = (centred * (x - mean)).sum(0) / centred.square().sum(0).clamp_min(1e-9)
    scale = _clamped(slope)
    return scale, mean - scale * mean_level


def _clamped(scale: Tensor) -> Tensor:
    return scale.clamp_min(_MIN_SCALE)
