"""What kernels know about pages and layers when they are compiled: one value instead of thirty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.tiles_triton import KernelConstants, format_kernels


@dataclass(frozen=True, slots=True)
class Geometry:
    """A layer's heads and pages on one rank. group: query heads per KV head; stride: as in
    `AttentionBatch`"""

    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    dtype_bytes: int = 2
    stride: int = 1

    @classmethod
    def of(cls, hot: torch.Tensor, num_heads: int, stride: int = 1) -> Geometry:
        """hot: as in `paged_attention`"""
        num_kv_heads, page_size, head_dim = hot.shape[2:]
        group = num_heads // num_kv_heads
        return cls(num_kv_heads, group, head_dim, page_size, hot.element_size(), stride)


@dataclass(frozen=True, eq=False)
class Form(KernelConstants):
    """The compile-time arguments of an attention kernel; `triton_launch.py` caches them.

    group: query heads per KV head; chunk_pages: sealed pages of a part (`work.py`)
    block_m: rows of a tile; block_q: query tokens of a tile in prefill; heads: query heads of a
        program in decode
    block_n: tokens of a tile of sealed keys; hot_n: of hot keys
    load_k, load_v, k_folded, v_folded, load_k_centre: as in `SideKernels`
    integer: sealed pages are read by the integer loop; ptx: with inline PTX; stages: of that loop
    hot_stages: of the loop over hot keys
    """

    k_side: Any
    v_side: Any
    load_k: Any
    load_v: Any
    load_k_centre: Any
    k_folded: bool
    v_folded: bool
    k_bytes: int
    page_bytes: int
    num_kv_heads: int
    group: int
    page_size: int
    head_dim: int
    block_d: int
    block_m: int
    block_n: int
    hot_n: int
    chunk_pages: int
    heads: int = 0
    block_q: int = 1
    has_softcap: bool = False
    has_window: bool = False
    has_prefixes: bool = False
    integer: bool = False
    ptx: bool = False
    stages: int = 1
    hot_stages: int = 1
    stride: int = 1

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def head_parts(self) -> int:
        """Programs that share a KV head's query heads, in decode."""
        return -(-self.group // self.heads)


def form_of(fmt: KVFormat, geometry: Geometry, *, dense: bool = False, **shape: Any) -> Form:
    """dense: tiles for many rows, for which folding scales does not pay; shape: other fields.

    Raises ValueError like `format_kernels`.
    """
    k, v = format_kernels(fmt)
    dense_k, dense_v = (dense and side.load_dense is not None for side in (k, v))
    page = (geometry.page_size, geometry.head_dim, geometry.dtype_bytes)
    return Form(
        k_side=fmt.k,
        v_side=fmt.v,
        load_k=k.load_dense if dense_k else k.load,
        load_v=v.load_dense if dense_v else v.load,
        load_k_centre=k.load_centre,
        k_folded=k.folded and not dense_k,
        v_folded=v.folded and not dense_v,
        k_bytes=fmt.k.num_bytes(*page),
        page_bytes=fmt.page_bytes(*page),
        num_kv_heads=geometry.num_kv_heads,
        group=geometry.group,
        page_size=geometry.page_size,
        head_dim=geometry.head_dim,
        block_d=triton.next_power_of_2(geometry.head_dim),
        stride=geometry.stride,
        **shape,
    )
