"""Plain-torch codec of `Static8`.

    side of a page   | codes (packing.py) |

    zero = (min + max) / 2,  scale = (max - min) / 255,  code = round((x - zero) / scale)

with min and max over a calibration text. In LMDeploy's offline int8 (kCacheKVInt8), one such
pair serves a layer; a pair per head and channel costs no extra bytes. Numbers outside the
range are clipped. Codes are signed.

scale, zero: [num_kv_heads, head_dim] fp32, however many share a value
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.kernels.formats.base import PageShape, Params
from kvmesh.kernels.formats.comparison.static8.side import Static8
from kvmesh.kernels.formats.packing import pack, unpack

HALF_RANGE = 128.0  # packing.py takes codes from 0


def encode(side: Static8, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
    scale, zero = params["scale"].unsqueeze(1), params["zero"].unsqueeze(1)
    # floor(t + 0.5) rather than round-half-even, so that all backends agree
    codes = x.float().sub(zero).div_(scale).add_(HALF_RANGE + 0.5).floor_().clamp_(0.0, 255.0)
    return pack(codes.to(torch.uint8), 8, values=side.values)


def decode(side: Static8, pages: Tensor, shape: PageShape, params: Params) -> Tensor:
    codes = unpack(pages, 8, shape.page_size, shape.head_dim, values=side.values)
    codes = codes.float().sub_(HALF_RANGE)
    return codes.mul_(params["scale"].unsqueeze(1)).add_(params["zero"].unsqueeze(1))
