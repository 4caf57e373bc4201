"""The tiles that sides share: numbers as they are, and codes with scales to be folded.

A row is a (sequence, KV head); its tokens are those of its pages, in order.
Keys lie by token, values by channel in blocks of tokens (packing.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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


@dataclass(frozen=True, slots=True)
class TokenKeys:
    """x = codes * scale + offset, one scale and offset a token.

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
    """x = codes * scale + offset, one scale and offset a token.

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
            # A sum by halves: a product with a vector would round once a token.
            out.add_((weights * self.offset.unsqueeze(1)).sum(-1, keepdim=True))
        return out

    def dense(self) -> torch.Tensor:
        # Contiguous also where there is a single block: torch's attention on CPUs reads other
        # strides wrongly.
        x = self.codes.mT.contiguous().flatten(1, 2) * self.scale.unsqueeze(-1)
        return x if self.offset is None else x.add_(self.offset.unsqueeze(-1))


@dataclass(frozen=True, slots=True)
class NibbleKeys:
    """As TokenKeys, of 4-bit codes as packing.py pairs them: token 2r in the low nibble of row r,
    token 2r + 1 in the high one.

    low: [rows, tokens / 2, head_dim] fp32, the low nibbles
    byte: the same, whole bytes as signed numbers, low + 16 (high - 8), which saves the shift
    """

    low: torch.Tensor
    byte: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        q_sum = q.sum(-1, keepdim=True)
        low = torch.bmm(q, self.low.mT)
        high = torch.bmm(q, self.byte.mT).sub_(low).mul_(0.0625).add_(q_sum, alpha=8.0)
        products = torch.stack((low, high), dim=-1).flatten(-2)
        return products.mul_(self.scale.unsqueeze(1)).addcmul_(q_sum, self.offset.unsqueeze(1))

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weights, self.dense())

    def dense(self) -> torch.Tensor:
        high = (self.byte - self.low).mul_(0.0625).add_(8.0)
        x = torch.stack((self.low, high), dim=2).flatten(1, 2)
        return x.mul_(self.scale.unsqueeze(-1)).add_(self.offset.unsqueeze(-1))


@dataclass(frozen=True, slots=True)
class NibbleValues:
    """As TokenValues, of 4-bit codes as packing.py pairs them: channel m in the low nibble of
    row m, channel m + head_dim / 2 in the high one.

    low, byte: [rows, blocks, head_dim / 2, block] fp32, as in NibbleKeys
    """

    low: torch.Tensor
    byte: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        return torch.bmm(q, self.dense().mT)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        scaled = weights * self.scale.unsqueeze(1)
        low = _by_block(scaled, self.low)
        high = _by_block(scaled, self.byte).sub_(low).mul_(0.0625)
        high.add_(scaled.sum(-1, keepdim=True), alpha=8.0)
        shift = (weights * self.offset.unsqueeze(1)).sum(-1, keepdim=True)
        return torch.cat((low, high), dim=-1).add_(shift)

    def dense(self) -> torch.Tensor:
        high = (self.byte - self.low).mul_(0.0625).add_(8.0)
        x = torch.cat((self.low, high), dim=2).mT.contiguous().flatten(1, 2)
        return x.mul_(self.scale.unsqueeze(-1)).add_(self.offset.unsqueeze(-1))


@dataclass(frozen=True, slots=True)
class ChannelKeys:
    """x = codes * scale + offset, one scale and offset a channel and run of tokens.

    codes: [rows, runs, tokens a run, head_dim] fp32
    scale, offset: [rows, runs, head_dim] fp32
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        # q·x = (q scale)·codes + q·offset, with the query scaled once a run
        rows, runs, tokens, head_dim = self.codes.shape
        scaled = (q.unsqueeze(1) * self.scale.unsqueeze(2)).view(rows * runs, -1, head_dim)
        products = torch.bmm(scaled, self.codes.view(rows * runs, tokens, head_dim).mT)
        products = products.view(rows, runs, -1, tokens).transpose(1, 2)
        shift = torch.bmm(q, self.offset.mT)  # [rows, queries, runs]
        return (products + shift.unsqueeze(-1)).flatten(2)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weights, self.dense())

    def dense(self) -> torch.Tensor:
        x = self.codes * self.scale.unsqueeze(2)
        return x.add_(self.offset.unsqueeze(2)).flatten(1, 2)


def _by_block(weights: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """weights [rows, queries, tokens], codes [rows, blocks, channels, block], both fp32 ->
    [rows, queries, channels]: a product a block, and their sum."""
    rows, blocks, channels, block = codes.shape
    products = torch.bmm(
        weights.view(rows, -1, blocks, block).transpose(1, 2).reshape(rows * blocks, -1, block),
        codes.view(rows * blocks, channels, block).mT,
    )
    return products.view(rows, blocks, -1, channels).sum(1)


def saturated(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """codes * scale + offset, finite even where rows span nearly all of fp32's range."""
    half = codes * (scale * 0.5) + offset * 0.5
    return half.clamp_(-0.5 * BF16_MAX, 0.5 * BF16_MAX).mul_(2.0)
