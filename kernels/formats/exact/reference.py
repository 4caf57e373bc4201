"""Plain-torch codec of the format `exact`.

page   | keys: page_size x head_dim | values: page_size x head_dim |   compute dtype
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvmesh.kernels.formats.base import KVFormat


def encode(fmt: KVFormat, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.stack((k, v), dim=-3).flatten(-3).view(torch.uint8)


def decode(
    fmt: KVFormat, pages: torch.Tensor, page_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    both = pages.contiguous().view(dtype).unflatten(-1, (2, page_size, head_dim))
    return both.select(-3, 0), both.select(-3, 1)


@dataclass(frozen=True, slots=True)
class ExactTile:
    """Keys and values as they are: [rows, pages * page_size, head_dim] fp32."""

    k: torch.Tensor
    v: torch.Tensor

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        return torch.bmm(q, self.k.mT)

    def weighted_values(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weights, self.v)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k, self.v


def tile_index(index: torch.Tensor) -> torch.Tensor:
    """Rows of sealed seen as [pages * num_kv_heads * 2, page_size * head_dim]: keys, then values"""
    return torch.cat((index.flatten() * 2, index.flatten() * 2 + 1))


def load_tile(
    fmt: KVFormat,
    sealed: torch.Tensor,
    tile_index: torch.Tensor,
    rows: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
) -> ExactTile:
    halves = sealed.view(dtype).view(-1, page_size * head_dim)
    k, v = halves.index_select(0, tile_index).view(2, rows, -1, head_dim).float().unbind(0)
    return ExactTile(k, v)
