"""Plain-torch codec of `LloydMax`: TurboQuant (arXiv 2504.19874).

    side of a page   | codes (packing.py) | norms, bf16 | residual signs | their norms, bf16 |

A token's stored norm is the root mean square of its numbers. With r = x - x^ the residual is

sign   x^ ± |r| / √d, with the sign of r, like LMDeploy's policy 42
qjl    x^ + |r| √(π/2) / d Sᵀ sign(S r), with S [d, d] of N(0, 1) numbers, as published
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from kvmesh.kernels.formats.base import PageShape, Params
from kvmesh.kernels.formats.comparison.turboquant.side import LEVELS, NORM_BYTES, LloydMax
from kvmesh.kernels.formats.packing import pack, packed_bytes, unpack
from kvmesh.kernels.formats.scales import (
    BF16_MAX,
    SCALE_FLOOR,
    load_scale,
    rounded_scale,
    store_scale,
)

_QJL_SEED = 20240606


@cache
def levels(width: int) -> Tensor:
    """[2^width] fp32, ascending."""
    positive = torch.tensor(LEVELS[width])
    return torch.cat((-positive.flip(0), positive))


def encode(side: LloydMax, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
    x = x.float()
    table = levels(side.width).to(x.device)
    # Relative to the token's largest number, so that no square overflows or underflows.
    top = x.abs().amax(-1, keepdim=True).clamp_min(SCALE_FLOOR)
    y = x / top
    rms = y.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    codes = torch.bucketize((y / rms).contiguous(), (table[1:] + table[:-1]) / 2)
    # A quarter of bf16's maximum: the outermost level times this is still finite.
    norm = (rms * top).clamp(SCALE_FLOOR, 0.25 * BF16_MAX)
    parts = [
        pack(codes.to(torch.uint8), side.width, values=side.values),
        store_scale(norm.squeeze(-1), "bf16"),
    ]
    if side.residual:
        r = x - table[codes] * rounded_scale(norm, "bf16")
        largest = r.abs().amax(-1, keepdim=True).clamp_min(SCALE_FLOOR)
        left = (r / largest).norm(dim=-1) * largest.squeeze(-1)
        seen = r / largest if side.residual == "sign" else (r / largest) @ _projection(x).T
        parts.append(pack((seen >= 0).to(torch.uint8), 1, values=True))
        parts.append(store_scale(left.clamp(SCALE_FLOOR, 0.25 * BF16_MAX), "bf16"))
    return torch.cat(parts, dim=-1)


def decode(side: LloydMax, pages: Tensor, shape: PageShape, params: Params) -> Tensor:
    page_size, head_dim, _ = shape
    codes = unpack(pages, side.width, page_size, head_dim, values=side.values)
    start = packed_bytes(side.width, page_size, head_dim)
    end = start + page_size * NORM_BYTES
    norm = load_scale(pages[..., start:end], "bf16")[..., None]
    x = levels(side.width).to(pages.device)[codes.int()] * norm
    if not side.residual:
        return x
    middle = end + packed_bytes(1, page_size, head_dim)
    signs = unpack(pages[..., end:middle], 1, page_size, head_dim, values=True)
    signs = signs.float() * 2.0 - 1.0
    left = load_scale(pages[..., middle:], "bf16")[..., None]
    if side.residual == "sign":
        return x + signs * (left / math.sqrt(head_dim))
    return x + (signs @ _projection(x)) * (left * (math.sqrt(math.pi / 2) / head_dim))


@cache
def _gaussian(head_dim: int) -> Tensor:
    return torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(_QJL_SEED))


def _projection(like: Tensor) -> Tensor:
    return _gaussian(like.shape[-1]).to(like.device)
