"""Plain-torch codec of `Fp8`.

    side of a page   | e4m3 numbers | centres bf16 | scale fp32 | 12 zeros |

Numbers are laid out like 8-bit codes (packing.py): keys [page_size, head_dim], values in blocks
of 64 tokens [head_dim, 64], so that for tensor cores the axis that is summed over comes last.

scale = max |x - centre| / 448 over the head's page, in fp32; 448 is e4m3's maximum, and
torch rounds to nearest. Other engines calibrate one scale per layer; a scale per page
costs four bytes and always fits the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.kernels.formats.base import PageShape, Params
from kvmesh.kernels.formats.fp8.side import PADDING_BYTES, SCALE_BYTES, Fp8
from kvmesh.kernels.formats.packing import BLOCK_TOKENS
from kvmesh.kernels.formats.scales import BF16_MAX

E4M3_MAX = 448.0
SCALE_FLOOR = 2.0**-100


def encode(side: Fp8, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
    half = x.float() * 0.5
    parts = []
    if side.centred:
        centre = half.mul(2.0 / half.shape[-2]).sum(-2, keepdim=True).to(torch.bfloat16)
        parts.append(centre.flatten(-2).view(torch.uint8))
        half = half - centre.float() * 0.5
    half_scale = (half.abs().amax((-2, -1), keepdim=True) / E4M3_MAX).clamp_min(SCALE_FLOOR)
    numbers = (half / half_scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    scale = (half_scale * 2.0).flatten(-2)
    stored = numbers.view(torch.uint8)
    if side.values:
        stored = stored.unflatten(-2, (-1, min(BLOCK_TOKENS, x.shape[-2]))).mT.flatten(-3, -2)
    padded_scale = torch.nn.functional.pad(scale.view(torch.uint8), (0, PADDING_BYTES))
    return torch.cat((stored.flatten(-2), *parts, padded_scale), -1)


def decode(side: Fp8, pages: Tensor, shape: PageShape, params: Params) -> Tensor:
    page_size, head_dim, _ = shape
    end = page_size * head_dim
    numbers = pages[..., :end].contiguous().view(torch.float8_e4m3fn).float()
    start = pages.shape[-1] - SCALE_BYTES - PADDING_BYTES
    scale = pages[..., start : start + SCALE_BYTES].contiguous().view(torch.float32)
    if side.values:
        block = min(BLOCK_TOKENS, page_size)
        numbers = numbers.unflatten(-1, (-1, head_dim, block)).mT.flatten(-3)
    half = numbers.unflatten(-1, (page_size, head_dim)) * (scale * 0.5)[..., None]
    if side.centred:
        centre = pages[..., end:start].contiguous().view(torch.bfloat16).float()
        half = half + centre[..., None, :] * 0.5
    return half.clamp_(-0.5 * BF16_MAX, 0.5 * BF16_MAX).mul_(2.0)  # type: ignore[no-any-return]
