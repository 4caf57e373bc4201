"""Tile functions of the format `exact` for the Triton kernels.

page_row: int64, page id * num_kv_heads + head: where one head's part of a page
starts, in units of such parts; slots: [N], the page's tokens; V: 0 for
keys, 1 for values. A tile comes in two halves of the head's dimensions, low and
high, each [N, HALF], HALF being head_dim / 2 padded to a power of two. See
`kernels/attention/triton_attention.py` for how the functions are used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvmesh.kernels.formats.base import KVFormat, TileKernels


def views(sealed: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The sealed arena as the tensors the tile functions read: numbers, and again."""
    typed = sealed.view(dtype)
    return typed, typed


@triton.jit
def load_tile(
    data_ptr,
    meta_ptr,
    page_row,
    slots,
    V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
):
    offs_d = tl.arange(0, HALF)
    page_ptr = data_ptr + page_row * (2 * PAGE_SIZE * HEAD_DIM)
    row_ptr = page_ptr + (V * PAGE_SIZE + slots)[:, None] * HEAD_DIM + offs_d[None, :]
    if HALF * 2 == HEAD_DIM:
        low = tl.load(row_ptr)
        high = tl.load(row_ptr + HEAD_DIM // 2)
    else:
        mask_d = (offs_d < HEAD_DIM // 2)[None, :]
        low = tl.load(row_ptr, mask=mask_d, other=0.0)
        high = tl.load(row_ptr + HEAD_DIM // 2, mask=mask_d, other=0.0)
    unused = tl.zeros_like(slots).to(tl.float32)
    return low, high, unused, unused


@triton.jit
def store_tile(
    low,
    high,
    data_ptr,
    meta_ptr,
    page_row,
    slots,
    mask,
    V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    offs_d = tl.arange(0, HALF)
    mask_d = mask[:, None] & (offs_d < HEAD_DIM // 2)[None, :]
    page_ptr = data_ptr + page_row * (2 * PAGE_SIZE * HEAD_DIM)
    row_ptr = page_ptr + (V * PAGE_SIZE + slots)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(row_ptr, low, mask=mask_d)
    tl.store(row_ptr + HEAD_DIM // 2, high, mask=mask_d)


def kernels(fmt: KVFormat) -> TileKernels:
    return TileKernels(views, load_tile, store_tile, affine=False)
