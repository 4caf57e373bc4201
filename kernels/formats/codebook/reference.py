"""Plain-torch codec of `Codebook`.

    side of a page   | codes (packing.py) | scales | residual signs | residual norms |
                                            page_size each            bf16 each

Levels are Lloyd-Max's for N(0, 1), or the best uniform ones. The numbers of a rotated
vector, divided by their root mean square, are nearly N(0, 1). The scale of a token is

eden   Σ y² / Σ y level(y), which gives <x, x^> = |x|², so that scores are unbiased (EDEN,
       Vargaftik et al. 2022). The squared error is not minimal, but the softmax suffers
       more from a bias than from noise
rms    the root mean square of the token: TurboQuant's stored norm

TurboQuant's residual bit (arXiv 2504.19874), kept for comparison. With r = x - x^:

sign   x^ ± |r| / √d, with the sign of r, like LMDeploy's policy 42
qjl    x^ + |r| √(π/2) / d Sᵀ sign(S r), with S [d, d] of N(0, 1) numbers
"""

from __future__ import annotations

import math
from functools import cache

import torch

from kvmesh.kernels.formats.base import Params, SideTile
from kvmesh.kernels.formats.codebook.side import LLOYD_MAX, UNIFORM_STEP, Codebook
from kvmesh.kernels.formats.packing import by_token, pack, packed_bytes, unpack
from kvmesh.kernels.formats.scales import SCALE_BYTES, load_scale, rounded_scale, store_scale
from kvmesh.kernels.formats.tiles import BF16_MAX, DenseTile, TokenKeys, TokenValues

SCALE_FLOOR = 2.0**-125
_QJL_SEED = 20240606


@cache
def levels(side: Codebook) -> torch.Tensor:
    """[2^width] fp32, ascending."""
    count = 2**side.width
    if side.levels == "uniform":
        return (torch.arange(count) - (count - 1) / 2) * UNIFORM_STEP[side.width]  # type: ignore[no-any-return]
    positive = torch.tensor(LLOYD_MAX[side.width])
    return torch.cat((-positive.flip(0), positive))


@cache
def boundaries(side: Codebook) -> torch.Tensor:
    """[2^width - 1] fp32, half-way between levels."""
    table = levels(side)
    return (table[1:] + table[:-1]) / 2


def encode(
    side: Codebook, x: torch.Tensor, params: Params, positions: torch.Tensor | None
) -> torch.Tensor:
    x = x.float()
    # Relative to the token's largest number, so that no square overflows or underflows.
    top = x.abs().amax(-1, keepdim=True).clamp_min(SCALE_FLOOR)
    y = x / top
    rms = y.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    codes = torch.bucketize((y / rms).contiguous(), boundaries(side).to(x.device))
    chosen = levels(side).to(x.device)[codes]
    if side.norm == "eden":
        scale = y.square().sum(-1, keepdim=True) / (y * chosen).sum(-1, keepdim=True)
        scale = torch.where(rms > 1e-30, scale, 0.0) * top
    else:
        scale = rms * top
    # A quarter of bf16's maximum: the outermost level times this is still finite.
    scale = scale.clamp(SCALE_FLOOR, 0.25 * BF16_MAX)
    parts = [
        pack(codes.to(torch.uint8), side.width, values=side.values),
        store_scale(scale.squeeze(-1), side.scale),
    ]
    if side.residual:
        r = x - chosen * rounded_scale(scale, side.scale)
        largest = r.abs().amax(-1, keepdim=True).clamp_min(SCALE_FLOOR)
        norm = (r / largest).norm(dim=-1) * largest.squeeze(-1)
        seen = r / largest if side.residual == "sign" else (r / largest) @ _projection(x).T
        parts.append(pack((seen >= 0).to(torch.uint8), 1, values=True))
        parts.append(store_scale(norm.clamp(SCALE_FLOOR, 0.25 * BF16_MAX), "bf16"))
    return torch.cat(parts, dim=-1)


def load(
    side: Codebook,
    pages: torch.Tensor,
    rows: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    params: Params,
) -> SideTile:
    if side.residual:
        x = decode(side, pages.unsqueeze(1), page_size, head_dim, dtype, params)
        return DenseTile(x.contiguous().view(rows, -1, head_dim))
    scale = _scales(side, pages, page_size, head_dim).view(rows, -1)
    table = unpack(pages, side.width, page_size, head_dim, values=side.values)
    if side.levels == "uniform":
        chosen = table.float().sub_((2**side.width - 1) / 2)
        scale = scale * UNIFORM_STEP[side.width]
    else:
        chosen = levels(side).to(pages.device)[table.int()]
    if side.values:
        return TokenValues(chosen.view(rows, -1, *table.shape[-2:]), scale, None)
    return TokenKeys(chosen.view(rows, -1, head_dim), scale, None)


def decode(
    side: Codebook,
    pages: torch.Tensor,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    params: Params,
) -> torch.Tensor:
    table = unpack(pages, side.width, page_size, head_dim, values=side.values)
    codes = by_token(table, values=side.values)
    scale = _scales(side, pages, page_size, head_dim)
    x = levels(side).to(pages.device)[codes.int()] * scale[..., None]
    if not side.residual:
        return x
    start = packed_bytes(side.width, page_size, head_dim) + page_size * SCALE_BYTES[side.scale]
    middle = start + packed_bytes(1, page_size, head_dim)
    table = unpack(pages[..., start:middle], 1, page_size, head_dim, values=True)
    signs = by_token(table, values=True).float() * 2.0 - 1.0
    norm = load_scale(pages[..., middle:], "bf16")[..., None]
    if side.residual == "sign":
        return x + signs * (norm / math.sqrt(head_dim))
    return x + (signs @ _projection(x)) * (norm * (math.sqrt(math.pi / 2) / head_dim))


def _scales(side: Codebook, pages: torch.Tensor, page_size: int, head_dim: int) -> torch.Tensor:
    start = packed_bytes(side.width, page_size, head_dim)
    end = start + page_size * SCALE_BYTES[side.scale]
    return load_scale(pages[..., start:end], side.scale)


@cache
def _gaussian(head_dim: int) -> torch.Tensor:
    return torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(_QJL_SEED))


def _projection(like: torch.Tensor) -> torch.Tensor:
    return _gaussian(like.shape[-1]).to(like.device)
