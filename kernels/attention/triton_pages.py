"""Sealed pages decoded into plain keys and values (`far.py`)."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.attention.triton_parts import page_of

NUM_WARPS = 4


@triton.jit
def _plain(tile, scale, offset, FOLDED: tl.constexpr):
    """The numbers of a side's tile in fp32."""
    x = tile.to(tl.float32)
    if FOLDED:
        x = x * scale[:, None]
        if offset is not None:
            x += offset[:, None]
    return x


@triton.jit(do_not_specialize=["stride_table", "seq", "first_column", "num_tokens"])
def decode_pages_kernel(
    sealed_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    table_ptr,
    stride_table,
    seq,
    first_column,
    num_tokens,
    FORM: tl.constexpr,
):
    """Program (page, KV head): pages from `first_column` on of a sequence's table.

    k, v: [KV heads, num_tokens, HEAD_DIM]
    """
    index = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(rows_ptr + seq).to(tl.int64) * stride_table
    page = page_of(table_ptr + row, first_column + index)
    k_part = sealed_ptr + (page * FORM.num_kv_heads + head) * FORM.page_bytes
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    BLOCK_N: tl.constexpr = FORM.block_n
    offs_d = tl.arange(0, FORM.block_d)
    mask = (tl.arange(0, BLOCK_N) < BLOCK_N)[:, None] & (offs_d < FORM.head_dim)[None, :]
    for first_slot in range(0, FORM.page_size, BLOCK_N):
        token = index * FORM.page_size + first_slot + tl.arange(0, BLOCK_N)
        at = (head.to(tl.int64) * num_tokens + token)[:, None] * FORM.head_dim + offs_d[None, :]
        tile, scale, offset = FORM.load_k(k_part, first_slot, FORM.k_side, DTYPE, FORM)
        k = _plain(tile, scale, offset, FORM.k_folded)
        if FORM.load_k_centre is not None:
            k += FORM.load_k_centre(k_part, FORM)[None, :]
        tl.store(k_ptr + at, k.to(DTYPE), mask=mask)
        v_part = k_part + FORM.k_bytes
        tile, scale, offset = FORM.load_v(v_part, first_slot, FORM.v_side, DTYPE, FORM)
        v = _plain(tile, scale, offset, FORM.v_folded)
        tl.store(v_ptr + at, v.to(DTYPE), mask=mask)
