"""Plain-torch codec of `Grouped`: that of `Affine`, and one more way to fit a grid.

half_quadratic  HQQ's solver (Badri & Shaji, 2023): the range's scale, and the offset
                that minimises the p-norm of the error, p = 0.7, by a proximal
                iteration. Errors are measured in steps, not in the units of the
                numbers, so the result does not depend on those units
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.kernels.formats.affine.reference import (
    Grid,
    decode,
    encode_on,
    fit_range,
    in_steps,
    stored_offset,
    stored_scale,
)
from kvmesh.kernels.formats.affine.side import Affine
from kvmesh.kernels.formats.base import Params
from kvmesh.kernels.formats.comparison.grouped.side import Grouped

__all__ = ["decode", "encode"]

ROUNDS, NORM, BETA, KAPPA = 20, 0.7, 10.0, 1.01


def encode(side: Grouped, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
    return encode_on(fit_range if side.fit == "range" else _fit_half_quadratic, side, x)


def _fit_half_quadratic(half: Tensor, side: Affine) -> Grid:
    """The code of t is q = round(t + z); z is the mean of what the proximal step leaves."""
    levels = 2.0**side.width - 1
    steps, _, half_min, half_step = in_steps(half, levels)
    z = torch.zeros_like(steps[..., :1])
    beta = BETA
    for _ in range(ROUNDS):
        q = steps.add(z).add_(0.5).floor_().clamp_(0.0, levels)
        error = steps - (q - z)
        size = error.abs()
        kept = (size - size.clamp_min(1e-9).pow(NORM - 1.0) / beta).clamp_min(0.0)
        z = (q - (steps - error.sign() * kept)).mean(-1, keepdim=True)
        beta *= KAPPA
    scale = stored_scale(half_step * 2.0, side)
    return stored_offset(half_min, half_step, -z.squeeze(-1)), scale
