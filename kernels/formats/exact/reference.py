"""Plain-torch codec of `Exact`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.kernels.formats.base import PageShape, Params
from kvmesh.kernels.formats.exact.side import Exact


def encode(side: Exact, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
    return x.contiguous().flatten(-2).view(torch.uint8)


def decode(side: Exact, pages: Tensor, shape: PageShape, params: Params) -> Tensor:
    page_size, head_dim, dtype = shape
    return pages.view(dtype).unflatten(-1, (page_size, head_dim)).float()  # type: ignore[no-any-return]
