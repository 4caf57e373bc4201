"""`seal_layers` as one kernel, for formats to serve.

A program calls the side to encode the keys or the values of one head of one page of one layer.
The arenas of all layers are treated as one: page p of layer l is page l * num_pages + p of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from kvmesh.kernels.direct import BoundKernels
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.tiles_triton import KernelConstants, format_kernels

NUM_WARPS = 8


# One binary for pools of any size, and for ids wherever they lie in a step's buffer.
@triton.jit(
    do_not_specialize=[
        "hot_ids_ptr",
        "sealed_ids_ptr",
        "num_hot_pages",
        "num_sealed_pages",
    ]
)
def seal_kernel(
    hot_ptr,
    sealed_ptr,
    hot_ids_ptr,
    sealed_ids_ptr,
    num_hot_pages,
    num_sealed_pages,
    FORM: tl.constexpr,
):
    """Program (page to seal, KV head, twice the layer, plus one for the values)."""
    page = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    layer = (part // 2).to(tl.int64)
    hot_id = tl.load(hot_ids_ptr + page).to(tl.int64)
    sealed_id = tl.load(sealed_ids_ptr + page).to(tl.int64)
    if hot_id >= 0:
        hot_page = layer * num_hot_pages + hot_id
        sealed_page = layer * num_sealed_pages + sealed_id
        SIZE: tl.constexpr = FORM.page_size * FORM.head_dim
        k_ptr = hot_ptr + (hot_page * (2 * FORM.num_kv_heads) + head) * SIZE
        page_ptr = sealed_ptr + (sealed_page * FORM.num_kv_heads + head) * FORM.page_bytes
        if part % 2 == 0:
            FORM.seal_k(k_ptr, page_ptr, FORM.k_side, FORM)
        else:
            v_ptr = k_ptr + FORM.num_kv_heads * SIZE
            FORM.seal_v(v_ptr, page_ptr + FORM.k_bytes, FORM.v_side, FORM)


_seals = BoundKernels(seal_kernel, num_warps=NUM_WARPS)


def seal_layers(
    hot: torch.Tensor,
    sealed: torch.Tensor,
    hot_ids: torch.Tensor,
    sealed_ids: torch.Tensor,
    *,
    fmt: KVFormat,
) -> None:
    num_layers, num_hot_pages, _, num_kv_heads, page_size, head_dim = hot.shape
    form = seal_form(fmt, num_kv_heads, page_size, head_dim, hot.element_size())
    check_arenas(hot, sealed)
    grid = (hot_ids.shape[0], num_kv_heads, 2 * num_layers)
    launch = _seals[num_hot_pages, sealed.shape[1], form]
    launch(grid, hot, sealed.view(torch.int8), hot_ids, sealed_ids)


@dataclass(frozen=True, eq=False)
class SealForm(KernelConstants):
    """The compile-time arguments of `seal_kernel`; `seal_form` caches them."""

    k_side: Any
    v_side: Any
    seal_k: Any
    seal_v: Any
    k_bytes: int
    page_bytes: int
    num_kv_heads: int
    page_size: int
    head_dim: int


@cache
def seal_form(
    fmt: KVFormat, num_kv_heads: int, page_size: int, head_dim: int, dtype_bytes: int
) -> SealForm:
    """Raises ValueError like `format_kernels`."""
    k, v = format_kernels(fmt)
    return SealForm(
        fmt.k,
        fmt.v,
        k.seal,
        v.seal,
        fmt.k.num_bytes(page_size, head_dim, dtype_bytes),
        fmt.page_bytes(page_size, head_dim, dtype_bytes),
        num_kv_heads,
        page_size,
        head_dim,
    )


def check_arenas(hot: torch.Tensor, sealed: torch.Tensor) -> None:
    """Raises ValueError for arenas that the kernels cannot address."""
    page_size, head_dim = hot.shape[-2:]
    if page_size % 16:
        raise ValueError(
            f"hot: page_size must be a multiple of 16 for the kernels, got {page_size}"
        )
    if head_dim % 16:
        raise ValueError(f"hot: head_dim must be a multiple of 16 for the kernels, got {head_dim}")
    if not (hot.is_contiguous() and sealed.is_contiguous()):
        raise ValueError("hot, sealed: the arenas must be contiguous for the kernels")
