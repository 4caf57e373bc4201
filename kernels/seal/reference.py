"""`seal_pages` in plain torch; the same signature as the public operator."""

from __future__ import annotations

import torch

from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams, ModelParams


def seal_pages(
    hot: torch.Tensor,
    sealed: torch.Tensor,
    hot_ids: torch.Tensor,
    sealed_ids: torch.Tensor,
    *,
    fmt: KVFormat,
    params: LayerParams,
    positions: torch.Tensor | None,
) -> None:
    if int(hot_ids.min()) < 0:
        wanted = hot_ids >= 0
        hot_ids, sealed_ids = hot_ids[wanted], sealed_ids[wanted]
        positions = None if positions is None else positions[wanted]
    full = hot.index_select(0, hot_ids)
    pages = fmt.encode(full[:, 0], full[:, -1], params, positions)
    sealed.index_copy_(0, sealed_ids.long(), pages)


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
    if params is not None:  # the parameters of all layers
        for layer, found in enumerate(params.layers):
            shared = (hot_ids, sealed_ids)
            seal_pages(
                hot[layer], sealed[layer], *shared, fmt=fmt, params=found, positions=positions
            )
        return
    wanted = hot_ids >= 0
    hot_ids, sealed_ids = hot_ids[wanted], sealed_ids[wanted]
    full = hot.index_select(1, hot_ids)  # [num_layers, n, 2, num_kv_heads, page_size, head_dim]
    sides = full.flatten(0, 1).unbind(1)
    pages = fmt.encode(sides[0], sides[-1], NO_PARAMS)
    sealed.index_copy_(1, sealed_ids.long(), pages.unflatten(0, full.shape[:2]))
