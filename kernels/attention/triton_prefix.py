"""Decode attention over prefixes that several sequences share: each page is read once for all.

As in FlashInfer's cascade, the rows of a tile are (sequence, query head of one KV
head's group) pairs: up to 64 of them for the cost of unpacking one tile of keys. Other
kernels compute the rest of each sequence; the parts are merged by log-sum-exp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.attention.triton_loop import attend_tile, finished, load_keys


@triton.jit
def prefix_kernel(
    q_ptr,
    sealed_ptr,
    out_ptr,
    lse_ptr,
    query_starts_ptr,
    rows_ptr,
    sealed_tables_ptr,
    prefix_pages_ptr,
    members_ptr,
    set_starts_ptr,
    k_table_ptr,
    v_table_ptr,
    stride_table,
    stride_split,
    qk_scale,
    softcap,
    sink_pages,
    num_splits,
    LOAD_K: tl.constexpr,
    LOAD_K_CENTRE: tl.constexpr,
    LOAD_V: tl.constexpr,
    K_FOLDED: tl.constexpr,
    V_FOLDED: tl.constexpr,
    K_SIDE: tl.constexpr,
    V_SIDE: tl.constexpr,
    K_BYTES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (split, KV head, set of `SharedPrefixes`).

    out, lse: partial, fp32 [num_splits, num_seqs, num_heads, HEAD_DIM] and without
        HEAD_DIM; written for sequences that share a prefix, lse -inf where a split has no tile
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    members_from = tl.load(set_starts_ptr + tl.program_id(2))
    num_members = tl.load(set_starts_ptr + tl.program_id(2) + 1) - members_from
    if num_members > 0:
        DTYPE: tl.constexpr = q_ptr.dtype.element_ty
        NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
        offs_m = tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, BLOCK_D)
        mask_m = offs_m // GROUP < num_members
        mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
        seq = tl.load(members_ptr + members_from + offs_m // GROUP, mask=mask_m, other=0)
        q_head = head * GROUP + offs_m % GROUP
        token = tl.load(query_starts_ptr + seq, mask=mask_m, other=0).to(tl.int64)
        q_row = token * NUM_HEADS + q_head
        q = load_keys(q_ptr, q_row, mask_m, K_SIDE, HEAD_DIM, BLOCK_D)
        q_sum = tl.sum(q[0].to(tl.float32), 1)

        first_seq = tl.load(members_ptr + members_from)
        num_pages = tl.load(prefix_pages_ptr + first_seq)
        first_key = sink_pages * PAGE_SIZE
        end_key = first_key + num_pages * PAGE_SIZE
        num_tiles = num_pages * (PAGE_SIZE // BLOCK_N)
        per_split = (num_tiles + num_splits - 1) // num_splits
        tile_from = split * per_split
        tile_end = tl.minimum(tile_from + per_split, num_tiles)

        table = tl.load(rows_ptr + first_seq).to(tl.int64) * stride_table
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        acc_offset = tl.zeros([BLOCK_M], dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        for tile in range(tile_from, tile_end):
            key = first_key + tile * BLOCK_N
            page = tl.load(sealed_tables_ptr + table + key // PAGE_SIZE).to(tl.int64)
            page_ptr = sealed_ptr + (page * NUM_KV_HEADS + head) * PAGE_BYTES
            # Every row sees all of every page, so nothing is masked.
            acc, acc_offset, top, total = attend_tile(
                q,
                q_sum,
                offs_m,
                acc,
                acc_offset,
                top,
                total,
                page_ptr,
                page_ptr + K_BYTES,
                k_table_ptr,
                v_table_ptr,
                head,
                key,
                first_key,
                end_key,
                qk_scale,
                softcap,
                0,
                sink_pages,
                0,
                LOAD_K,
                LOAD_K_CENTRE,
                LOAD_V,
                K_FOLDED,
                V_FOLDED,
                K_SIDE,
                V_SIDE,
                False,
                True,
                HAS_SOFTCAP,
                False,
                PAGE_SIZE,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
                DTYPE,
                PRECISION,
            )
        out, lse = finished(acc, acc_offset, top, total)
        out_row = split.to(tl.int64) * stride_split + seq * NUM_HEADS + q_head
        tl.store(out_ptr + out_row[:, None] * HEAD_DIM + offs_d[None, :], out, mask=mask_q)
        tl.store(lse_ptr + out_row, lse, mask=mask_m)
