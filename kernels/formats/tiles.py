"""Tiles that several sides use: plain numbers, and codes whose scales are folded.

A row is a (sequence, KV head); its tokens are those of its pages, in order.
Keys are stored by token, values by channel in blocks of tokens (packing.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvmesh.kernels.formats.base import Params

BF16_MAX = 3.3895313892515355e38


@dataclass(frozen=True, slots=True)
class DenseTile:
    """x: [rows, tokens, head_dim] fp32"""

    x: torch.Tensor

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        return torch.bmm(q, self.x.mT)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weights, self.x)

    def dense(self) -> torch.Tensor:
        return self.x


def loads_decoded(decode: Callable[..., torch.Tensor]) -> Callable[..., DenseTile]:
    """`SideCodec.load` for a side whose numbers are decoded before they are multiplied.

    decode: `SideCodec.decode` of the side
    """

    def load(
        side: Any,
        pages: torch.Tensor,
        rows: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        params: Params,
    ) -> DenseTile:
        # Rows are by head, and calibrated parameters are of heads.
        heads = params["scale"].shape[0] if "scale" in params else 1
        by_page = pages.view(rows // heads, heads, -1, pages.shape[-1]).transpose(1, 2)
        x = decode(side, by_page.flatten(0, 1), page_size, head_dim, dtype, params)
        x = x.unflatten(0, (rows // heads, -1)).transpose(1, 2)
        # Torch's attention on CPUs gives wrong results for other strides.
        return DenseTile(x.reshape(rows, -1, head_dim).contiguous())

    return load


@dataclass(frozen=True, slots=True)
class TokenKeys:
    """x = codes * scale + offset, with one scale and offset per token.

    codes: [rows, tokens, head_dim] fp32; scale, offset: [rows, tokens] fp32, offset None for 0
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        # q·x = scale (q·codes) + offset Σq
        products = torch.bmm(q, self.codes.mT).mul_(self.scale.unsqueeze(1))
        if self.offset is not None:
            products.addcmul_(q.sum(-1, keepdim=True), self.offset.unsqueeze(1))
        return products

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weights, self.dense())

    def dense(self) -> torch.Tensor:
        x = self.codes * self.scale.unsqueeze(-1)
        return x if self.offset is None else x.add_(self.offset.unsqueeze(-1))


@dataclass(frozen=True, slots=True)
class TokenValues:
    """x = codes * scale + offset, with one scale and offset per token.

    codes: [rows, blocks, head_dim, block] fp32; scale, offset: [rows, blocks * block] fp32,
        offset None for 0
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        return torch.bmm(q, self.dense().mT)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        # Σ w x = (w scale)·codes + Σ w offset, block by block
        out = _by_block(weights * self.scale.unsqueeze(1), self.codes)
        if self.offset is not None:
            # A pairwise sum: a product with a vector would round once per token.
            out.add_((weights * self.offset.unsqueeze(1)).sum(-1, keepdim=True))
        return out

    def dense(self) -> torch.Tensor:
        # Made contiguous even with a single block: torch's attention on CPUs gives wrong results
        # for other strides.
        x = self.codes.mT.contiguous().flatten(1, 2) * self.scale.unsqueeze(-1)
        return x if self.offset is None else x.add_(self.offset.unsqueeze(-1))


@dataclass(frozen=True, slots=True)
class ChannelKeys:
    """x = codes * scale + offset, with one scale and offset per channel and page.

    codes: [rows, pages, page_size, head_dim] fp32
    scale, offset: [rows, pages, head_dim] fp32
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        # q·x = (q scale)·codes + q·offset, with the query scaled once per page
        rows, pages, tokens, head_dim = self.codes.shape
        scaled = (q.unsqueeze(1) * self.scale.unsqueeze(2)).view(rows * pages, -1, head_dim)
        products = torch.bmm(scaled, self.codes.view(rows * pages, tokens, head_dim).mT)
        products = products.view(rows, pages, -1, tokens).transpose(1, 2)
        shift = torch.bmm(q, self.offset.mT)  # [rows, queries, pages]
        return (products + shift.unsqueeze(-1)).flatten(2)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weights, self.dense())

    def dense(self) -> torch.Tensor:
        x = self.codes * self.scale.unsqueeze(2)
        return x.add_(self.offset.unsqueeze(2)).flatten(1, 2)


def _by_block(weights: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """weights [rows, queries, tokens], codes [rows, blocks, channels, block], both fp32 ->
    [rows, queries, channels]: the sum of one product per block."""
    rows, blocks, channels, block = codes.shape
    products = torch.bmm(
        weights.view(rows, -1, blocks, block).transpose(1, 2).reshape(rows * blocks, -1, block),
        codes.view(rows * blocks, channels, block).mT,
    )
    return products.view(rows, blocks, -1, channels).sum(1)


def saturated(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """codes * scale + offset, finite even for rows that span almost all of fp32's range."""
    half = codes * (scale * 0.5) + offset * 0.5
    return half.clamp_(-0.5 * BF16_MAX, 0.5 * BF16_MAX).mul_(2.0)
