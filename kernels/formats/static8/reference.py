"""Plain-torch codec of `Static8`.

    side of a page   | codes (packing.py) |

    zero = (min + max) / 2,  scale = (max - min) / 255,  code = round((x - zero) / scale)

with min and max over a calibration text. In LMDeploy's offline int8 (kCacheKVInt8), one such
pair serves a layer. A pair per head and channel costs no extra bytes or time: the keys'
scale is folded into the query, once for all pages, and their zero into a number added to
every score; the values' scale and zero are folded into the output. Numbers outside the
range are clipped. Codes are signed.

scale, zero: [num_kv_heads, head_dim] fp32, however many share a value
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvmesh.kernels.formats.base import Params, SideTile
from kvmesh.kernels.formats.packing import by_token, pack, unpack
from kvmesh.kernels.formats.static8.side import Static8
from kvmesh.kernels.formats.tiles import ChannelKeys

HALF_RANGE = 128.0  # packing.py takes codes from 0


def encode(
    side: Static8, x: torch.Tensor, params: Params, positions: torch.Tensor | None
) -> torch.Tensor:
    scale, zero = params["scale"].unsqueeze(1), params["zero"].unsqueeze(1)
    # floor(t + 0.5) rather than round-half-even, so that all backends agree
    codes = x.float().sub(zero).div_(scale).add_(HALF_RANGE + 0.5).floor_().clamp_(0.0, 255.0)
    return pack(codes.to(torch.uint8), 8, values=side.values)


def load(
    side: Static8,
    pages: torch.Tensor,
    rows: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    params: Params,
) -> SideTile:
    table = unpack(pages, 8, page_size, head_dim, values=side.values).float().sub_(HALF_RANGE)
    heads = params["scale"].shape[0]
    scale, zero = (params[name].repeat(rows // heads, 1) for name in ("scale", "zero"))
    if side.values:
        codes = table.view(rows, -1, *table.shape[-2:])
        return _ChannelValues(codes, scale, zero)
    return ChannelKeys(table.view(rows, 1, -1, head_dim), scale.unsqueeze(1), zero.unsqueeze(1))


def decode(
    side: Static8,
    pages: torch.Tensor,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    params: Params,
) -> torch.Tensor:
    table = unpack(pages, 8, page_size, head_dim, values=side.values)
    codes = by_token(table, values=side.values).float().sub_(HALF_RANGE)
    return codes.mul_(params["scale"].unsqueeze(1)).add_(params["zero"].unsqueeze(1))


@dataclass(frozen=True, slots=True)
class _ChannelValues:
    """x = codes * scale + zero, with one scale and zero per channel.

    codes: [rows, blocks, head_dim, block] fp32; scale, zero: [rows, head_dim] fp32
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        return torch.bmm(q, self.dense().mT)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        # Σ w x = scale (w·codes) + zero Σ w, block by block
        rows, blocks, head_dim, block = self.codes.shape
        by_block = weights.view(rows, -1, blocks, block).transpose(1, 2)
        products = torch.bmm(
            by_block.reshape(rows * blocks, -1, block),
            self.codes.view(rows * blocks, head_dim, block).mT,
        )
        out = products.view(rows, blocks, -1, head_dim).sum(1).mul_(self.scale.unsqueeze(1))
        return out.addcmul_(weights.sum(-1, keepdim=True), self.zero.unsqueeze(1))

    def dense(self) -> torch.Tensor:
        x = self.codes.mT.contiguous().flatten(1, 2) * self.scale.unsqueeze(1)
        return x.add_(self.zero.unsqueeze(1))
