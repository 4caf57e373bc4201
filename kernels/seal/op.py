"""The public operators `seal_pages` and `seal_layers`."""

from __future__ import annotations

import torch

from kvmesh.kernels import gpu
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams, ModelParams
from kvmesh.kernels.seal import reference


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
    """Encode full hot pages of one layer into sealed pages, in place.

    hot: [num_hot_pages, 2, num_kv_heads, page_size, head_dim] of the compute dtype; 1 instead of
        2 if the format's values are in keys
    sealed: [num_sealed_pages, num_kv_heads, page_bytes] uint8
    hot_ids, sealed_ids: [n] int32, page n of one is encoded into page n of the other; a
        negative hot id is padding and is skipped
    params: this layer's calibrated parameters, if the format needs them
    positions: [n] int64, of each page's first token; only for formats that need positions
    backend: None picks the kernels on GPUs and plain torch elsewhere; formats without kernels
        have only plain torch
    """
    _check(hot, sealed, hot_ids, sealed_ids, fmt, "")
    if hot_ids.shape[0] == 0:
        return
    _check_positions(fmt, hot_ids, positions)
    ids = (hot_ids, sealed_ids)
    if _picks_kernel(hot, fmt, backend):
        from kvmesh.kernels.seal import triton_seal

        triton_seal.seal_layers(hot.unsqueeze(0), sealed.unsqueeze(0), *ids, fmt=fmt)
    else:
        reference.seal_pages(hot, sealed, *ids, fmt=fmt, params=params, positions=positions)


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

    hot: [num_layers, num_hot_pages, 2, num_kv_heads, page_size, head_dim]
    sealed: [num_layers, num_sealed_pages, num_kv_heads, page_bytes] uint8
    params: the layers' calibrated parameters, if the format needs them
    hot_ids, sealed_ids, positions, backend: as in `seal_pages`
    """
    _check(hot, sealed, hot_ids, sealed_ids, fmt, "num_layers, ")
    if sealed.shape[0] != hot.shape[0]:
        raise ValueError(f"sealed: expected {hot.shape[0]} layers as in hot, got {sealed.shape[0]}")
    if fmt.needs_calibration and (params is None or len(params.layers) != hot.shape[0]):
        raise ValueError(f"params: {fmt.name} needs calibrated parameters of {hot.shape[0]} layers")
    if hot_ids.shape[0] == 0:
        return
    _check_positions(fmt, hot_ids, positions)
    ids = (hot_ids, sealed_ids)
    if _picks_kernel(hot, fmt, backend):
        from kvmesh.kernels.seal import triton_seal

        triton_seal.seal_layers(hot, sealed, *ids, fmt=fmt)
    else:
        reference.seal_layers(hot, sealed, *ids, fmt=fmt, params=params, positions=positions)


def _check_positions(fmt: KVFormat, hot_ids: torch.Tensor, positions: torch.Tensor | None) -> None:
    if fmt.wants_positions and (positions is None or positions.shape != hot_ids.shape):
        raise ValueError(
            f"positions: format {fmt.name} needs the first positions of {hot_ids.shape[0]} pages"
        )


def _check(
    hot: torch.Tensor,
    sealed: torch.Tensor,
    hot_ids: torch.Tensor,
    sealed_ids: torch.Tensor,
    fmt: KVFormat,
    layers: str,
) -> None:
    """layers: leading dimensions of the shapes"""
    if hot_ids.shape != sealed_ids.shape or hot_ids.dim() != 1:
        raise ValueError(
            "hot_ids, sealed_ids: expected equal shapes [n], "
            f"got {tuple(hot_ids.shape)} and {tuple(sealed_ids.shape)}"
        )
    sides, num_kv_heads, page_size, head_dim = hot.shape[-4:]
    if sides != fmt.stored_sides:
        raise ValueError(
            f"hot: expected {fmt.stored_sides} in place of 2 for format {fmt.name}, "
            f"got {tuple(hot.shape)}"
        )
    page_bytes = fmt.page_bytes(page_size, head_dim, hot.element_size())
    if (
        sealed.dtype != torch.uint8
        or sealed.dim() != hot.dim() - 2
        or sealed.shape[-2:] != (num_kv_heads, page_bytes)
    ):
        raise ValueError(
            f"sealed: expected [{layers}num_sealed_pages, {num_kv_heads}, {page_bytes}] uint8, "
            f"got {tuple(sealed.shape)} {sealed.dtype}"
        )


def _picks_kernel(hot: torch.Tensor, fmt: KVFormat, backend: str | None) -> bool:
    return gpu.picks_kernel(hot, backend) and fmt.has_kernels
