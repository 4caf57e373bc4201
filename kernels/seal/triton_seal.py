"""`seal_pages` as one kernel; the same signature as the public operator.

A program encodes 16 tokens' keys or values of one head of one page: formats
with statistics over a whole page will ask for the whole page instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvmesh.kernels.formats.base import KVFormat

ROWS = 16


@triton.jit
def seal_kernel(
    hot_ptr,
    data_ptr,
    meta_ptr,
    hot_ids_ptr,
    sealed_ids_ptr,
    STORE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    page = tl.program_id(0)
    head = tl.program_id(1)
    hot_id = tl.load(hot_ids_ptr + page).to(tl.int64)
    sealed_id = tl.load(sealed_ids_ptr + page).to(tl.int64)
    if hot_id >= 0:
        slots = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
        mask = slots < PAGE_SIZE
        offs_d = tl.arange(0, HALF)
        mask_d = mask[:, None] & (offs_d < HEAD_DIM // 2)[None, :]
        sealed_row = sealed_id * NUM_KV_HEADS + head
        for V in tl.static_range(2):
            hot_row = (hot_id * 2 + V) * NUM_KV_HEADS + head
            row_ptr = hot_ptr + hot_row * (PAGE_SIZE * HEAD_DIM)
            row_ptr += slots[:, None] * HEAD_DIM + offs_d[None, :]
            low = tl.load(row_ptr, mask=mask_d, other=0.0)
            high = tl.load(row_ptr + HEAD_DIM // 2, mask=mask_d, other=0.0)
            STORE(
                low,
                high,
                data_ptr,
                meta_ptr,
                sealed_row,
                slots,
                mask,
                V,
                PAGE_SIZE,
                HEAD_DIM,
                HALF,
            )


def seal_pages(
    hot: torch.Tensor,
    sealed: torch.Tensor,
    hot_ids: torch.Tensor,
    sealed_ids: torch.Tensor,
    *,
    fmt: KVFormat,
) -> None:
    _, _, num_kv_heads, page_size, head_dim = hot.shape
    kernels = fmt.tile_kernels()
    data, meta = kernels.views(sealed, hot.dtype)
    grid = (hot_ids.shape[0], num_kv_heads, triton.cdiv(page_size, ROWS))
    seal_kernel[grid](
        hot,
        data,
        meta,
        hot_ids,
        sealed_ids,
        STORE=kernels.store_tile,
        NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        ROWS=ROWS,
        num_warps=4,
    )
