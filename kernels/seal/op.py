"""The public operators `seal_pages` and `seal_layers`."""

from __future__ import annotations

import torch

from kvmesh.kernels import gpu
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams, ModelParams
from kvmesh.kernels.seal import reference


def seal_layers(
    hot: torch.Tensor,
    sealed: torch.Tensor,
    hot_ids: torch.Tensor,
    sealed_ids: torch.Tensor,
    *,
    fmt: KVFormat,
    params: ModelParams | None = None,
    positions: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Encode full hot pages of all layers into sealed pages at once, in place.

    On CPUs the calls of torch cost more than the arithmetic, and on GPUs the launches do: one
    pass over all layers costs a fraction of a pass per layer.

    hot: [num_layers, num_hot_pages, 2, num_kv_heads, page_size, head_dim] of the compute dtype; 1
        instead of 2 if the format's values are in keys
    sealed: [num_layers, num_sealed_pages, num_kv_heads, page_bytes] uint8
    hot_ids, sealed_ids: [n] int32, page n of one is encoded into page n of the other; a
        negative hot id is padding and is skipped
    params: the layers' calibrated parameters, if the format needs them
    positions: [n] int64, of each page's first token; only for formats that need positions
    backend: None picks the kernels on GPUs and plain torch elsewhere; formats without kernels
        have only plain torch
    """
    if hot_ids.shape != sealed_ids.shape or hot_ids.dim() != 1:
        raise ValueError(
            "hot_ids, sealed_ids: expected equal shapes [n], "
            f"got {tuple(hot_ids.shape)} and {tuple(sealed_ids.shape)}"
        )
    if hot.dim() != 6 or hot.shape[2] != fmt.stored_sides:
        raise ValueError(
            f"hot: expected [num_layers, num_hot_pages, {fmt.stored_sides}, num_kv_heads, "
            f"page_size, head_dim] for format {fmt.name}, got {tuple(hot.shape)}"
        )
    num_layers, _, _, num_kv_heads, page_size, head_dim = hot.shape
    page_bytes = fmt.page_bytes(page_size, head_dim, hot.element_size())
    if (
        sealed.dtype != torch.uint8
        or sealed.dim() != 4
        or sealed.shape[-2:] != (num_kv_heads, page_bytes)
    ):
        raise ValueError(
            f"sealed: expected [num_layers, num_sealed_pages, {num_kv_heads}, {page_bytes}] uint8, "
            f"got {tuple(sealed.shape)} {sealed.dtype}"
        )
    if sealed.shape[0] != num_layers:
        raise ValueError(f"sealed: expected {num_layers} layers as in hot, got {sealed.shape[0]}")
    if fmt.needs_calibration and (params is None or len(params.layers) != num_layers):
        raise ValueError(f"params: {fmt.name} needs calibrated parameters of {num_layers} layers")
    if hot_ids.shape[0] == 0:
        return
    if fmt.wants_positions and (positions is None or positions.shape != hot_ids.shape):
        raise ValueError(
            f"positions: format {fmt.name} needs the first positions of {hot_ids.shape[0]} pages"
        )
    ids = (hot_ids, sealed_ids)
    if gpu.picks_kernel(hot, backend) and fmt.has_kernels:
        from kvmesh.kernels.seal import triton_seal

        triton_seal.seal_layers(hot, sealed, *ids, fmt=fmt)
    else:
        reference.seal_layers(hot, sealed, *ids, fmt=fmt, params=params, positions=positions)


def seal_pages(
    hot: torch.Tensor,
    sealed: torch.Tensor,
    hot_ids: torch.Tensor,
    sealed_ids: torch.Tensor,
    *,
    fmt: KVFormat,
    params: LayerParams = NO_PARAMS,
    positions: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """`seal_layers` of one layer: hot and sealed without num_layers, params of that layer."""
    seal_layers(
        hot.unsqueeze(0),
        sealed.unsqueeze(0),
        hot_ids,
        sealed_ids,
        fmt=fmt,
        params=ModelParams((params,)),
        positions=positions,
        backend=backend,
    )
