"""Plain-torch codec of `Exact`."""

from __future__ import annotations

import torch

from kvmesh.kernels.formats.base import Params
from kvmesh.kernels.formats.exact.side import Exact


def encode(
    side: Exact, x: torch.Tensor, params: Params, positions: torch.Tensor | None
) -> torch.Tensor:
    return x.contiguous().flatten(-2).view(torch.uint8)


def decode(
    side: Exact,
    pages: torch.Tensor,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    params: Params,
) -> torch.Tensor:
    return pages.view(dtype).unflatten(-1, (page_size, head_dim)).float()  # type: ignore[no-any-return]
