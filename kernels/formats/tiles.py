"""The tiles that sides share: numbers as they are, and codes with scales to be folded.

A row is a (sequence, KV head); its tokens are those of its pages, in order.
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
class TokenTile:
    """x = codes * scale + offset, one scale and offset a token.

    codes: [rows, tokens, head_dim] fp32. Where two codes share a byte, two
        tensors [rows, tokens, head_dim / 2]: the low nibble, and the whole
        byte, low + 16 * high, which saves the shift.
    scale: [rows, tokens] fp32; offset: the same, or None for zero
    """

    codes: tuple[torch.Tensor, ...]
    scale: torch.Tensor
    offset: torch.Tensor | None

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        # q·x = scale (q·codes) + offset Σq
        if len(self.codes) == 1:
            products = torch.bmm(q, self.codes[0].mT)
        else:
            low, byte = self.codes
            q_low, q_high = q.chunk(2, dim=-1)
            q_high = q_high * 0.0625
            products = torch.bmm(q_high, byte.mT).baddbmm_(q_low - q_high, low.mT)
        products.mul_(self.scale.unsqueeze(1))
        if self.offset is not None:
            products.addcmul_(q.sum(-1, keepdim=True), self.offset.unsqueeze(1))
        return products

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        # Σ w x = (w scale)·codes + Σ w offset
        scaled = weights * self.scale.unsqueeze(1)
        if len(self.codes) == 1:
            out = torch.bmm(scaled, self.codes[0])
        else:
            low, byte = self.codes
            out_low = torch.bmm(scaled, low)
            out_high = torch.bmm(scaled, byte).sub_(out_low).mul_(0.0625)
            out = torch.cat((out_low, out_high), dim=-1)
        if self.offset is not None:
            # A sum by halves: a product with a vector would round once a token.
            out.add_((weights * self.offset.unsqueeze(1)).sum(-1, keepdim=True))
        return out

    def dense(self) -> torch.Tensor:
        x = self._whole() * self.scale.unsqueeze(-1)
        return x if self.offset is None else x.add_(self.offset.unsqueeze(-1))

    def _whole(self) -> torch.Tensor:
        if len(self.codes) == 1:
            return self.codes[0]
        low, byte = self.codes
        return torch.cat((low, (byte - low) * 0.0625), dim=-1)


@dataclass(frozen=True, slots=True)
class ChannelTile:
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


def saturated(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """codes * scale + offset, finite even where rows span nearly all of fp32's range."""
    half = codes * (scale * 0.5) + offset * 0.5
    return half.clamp_(-0.5 * BF16_MAX, 0.5 * BF16_MAX).mul_(2.0)
