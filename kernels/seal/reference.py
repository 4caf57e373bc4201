"""`seal_layers` in plain torch; the same signature as the public operator."""

from __future__ import annotations

import torch

from kvmesh.kernels.formats.base import KVFormat, ModelParams


def seal_layers(
    hot: torch.Tensor,
    sealed: torch.Tensor,
    hot_ids: torch.Tensor,
    sealed_ids: torch.Tensor,
    *,
    fmt: KVFormat,
    params: ModelParams | None,
    positions: torch.Tensor | None,
) -> None:
    wanted = hot_ids >= 0
    hot_ids, sealed_ids = hot_ids[wanted], sealed_ids[wanted].long()
    if fmt.needs_calibration and params is not None:  # each layer has parameters of its own
        positions = None if positions is None else positions[wanted]
        for pages, codes, found in zip(hot, sealed, params.layers, strict=True):
            full = pages.index_select(0, hot_ids)
            encoded = fmt.encode(full[:, 0], full[:, -1], found, positions)
            codes.index_copy_(0, sealed_ids, encoded)
        return
    full = hot.index_select(1, hot_ids)  # [num_layers, n, 2, num_kv_heads, page_size, head_dim]
    sides = full.flatten(0, 1).unbind(1)
    encoded = fmt.encode(sides[0], sides[-1])
    sealed.index_copy_(1, sealed_ids, encoded.unflatten(0, full.shape[:2]))
