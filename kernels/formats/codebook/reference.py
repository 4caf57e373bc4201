"""Plain-torch codec of `Codebook`.

    side of a page   | codes (packing.py) | scales, page_size of them |

Levels are the best uniform ones for N(0, 1), which the numbers of a rotated vector, divided by
their root mean square, nearly are. The scale of a token is Σ y² / Σ y level(y), which gives
<x, x^> = |x|², so that weighted sums are unbiased (EDEN, Vargaftik et al. 2022). The squared error
is not minimal, but the model suffers more from a bias than from noise.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kvmesh.kernels.formats.base import PageShape, Params
from kvmesh.kernels.formats.codebook.side import UNIFORM_STEP, Codebook
from kvmesh.kernels.formats.packing import pack, packed_bytes, unpack
from kvmesh.kernels.formats.scales import BF16_MAX, SCALE_FLOOR, load_scale, store_scale


@cache
def levels(width: int) -> Tensor:
    """[2^width] fp32, ascending."""
    count = 2**width
    return (torch.arange(count) - (count - 1) / 2) * UNIFORM_STEP[width]  # type: ignore[no-any-return]


@cache
def boundaries(width: int) -> Tensor:
    """[2^width - 1] fp32, half-way between levels."""
    table = levels(width)
    return (table[1:] + table[:-1]) / 2


def encode(side: Codebook, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
    x = x.float()
    # Relative to the token's largest number, so that no square overflows or underflows.
    top = x.abs().amax(-1, keepdim=True).clamp_min(SCALE_FLOOR)
    y = x / top
    rms = y.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    codes = torch.bucketize((y / rms).contiguous(), boundaries(side.width).to(x.device))
    chosen = levels(side.width).to(x.device)[codes]
    scale = y.square().sum(-1, keepdim=True) / (y * chosen).sum(-1, keepdim=True)
    scale = torch.where(rms > 1e-30, scale, 0.0) * top
    # A quarter of bf16's maximum: the outermost level times this is still finite.
    scale = scale.clamp(SCALE_FLOOR, 0.25 * BF16_MAX)
    packed = pack(codes.to(torch.uint8), side.width, values=side.values)
    return torch.cat((packed, store_scale(scale.squeeze(-1), side.scale)), dim=-1)


def decode(side: Codebook, pages: Tensor, shape: PageShape, params: Params) -> Tensor:
    page_size, head_dim, _ = shape
    codes = unpack(pages, side.width, page_size, head_dim, values=side.values)
    start = packed_bytes(side.width, page_size, head_dim)
    scale = load_scale(pages[..., start:], side.scale) * UNIFORM_STEP[side.width]
    middle = (2**side.width - 1) / 2
    return codes.float().sub_(middle).mul_(scale[..., None])
