"""Plain-torch codec of `Static8`.

    side of a page   | codes, int8 [page_size, head_dim] |

    zero = (min + max) / 2,  scale = (max - min) / 255,  code = round((x - zero) / scale)

with min and max over a text: LMDeploy's offline int8 (kCacheKVInt8), where one such
pair serves a layer. A pair a head and channel costs no byte and no step more: the
keys' scale folds into the query, once for all pages, and their zero into a number
added to every score. What lies outside the range is clipped.

scale, zero: [num_kv_heads, head_dim] fp32, whatever shares them
"""

from __future__ import annotations

import torch

from kvmesh.kernels.formats.base import Params, SideTile
from kvmesh.kernels.formats.static8.side import Static8
from kvmesh.kernels.formats.tiles import ChannelTile


def encode(
    side: Static8, x: torch.Tensor, params: Params, positions: torch.Tensor | None
) -> torch.Tensor:
    scale, zero = params["scale"].unsqueeze(1), params["zero"].unsqueeze(1)
    # floor(t + 0.5) rather than round-half-even: the same in every backend
    codes = x.float().sub(zero).div_(scale).add_(0.5).floor_().clamp_(-128.0, 127.0)
    return codes.to(torch.int8).flatten(-2).view(torch.uint8)


def load(
    side: Static8,
    pages: torch.Tensor,
    rows: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    params: Params,
) -> SideTile:
    codes = pages.contiguous().view(torch.int8).view(rows, 1, -1, head_dim).float()
    heads = params["scale"].shape[0]
    scale, zero = (params[name].repeat(rows // heads, 1) for name in ("scale", "zero"))
    return ChannelTile(codes, scale.unsqueeze(1), zero.unsqueeze(1))


def decode(
    side: Static8,
    pages: torch.Tensor,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    params: Params,
) -> torch.Tensor:
    codes = pages.contiguous().view(torch.int8).unflatten(-1, (page_size, head_dim)).float()
    return codes.mul_(params["scale"].unsqueeze(1)).add_(params["zero"].unsqueeze(1))
