"""Prefill: blocks of query tokens times parts of their keys, and the merge of a block's parts.

A block has 64 or more rows, so that a tile of sealed keys is unpacked once for all of them. Rows
of one block see different keys near its end; each masks what it does not see.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.attention.triton_loop import (
    attend_hot,
    attend_sealed,
    load_queries,
    no_keys,
    store_finished,
)
from kvmesh.kernels.attention.triton_parts import (
    columns_below,
    find,
    first_of,
    first_seen,
    prefill_parts,
    slots_below,
)
from kvmesh.kernels.merge.triton_merge import merge_row


@triton.jit(do_not_specialize=["batch", "first_item", "num_seqs"])
def prefill_kernel(
    q_ptr,
    hot_ptr,
    sealed_ptr,
    out_ptr,
    lse_ptr,
    batch,
    stride_table,
    first_item,
    num_seqs,
    softmax,
    windows,
    DIRECT: tl.constexpr,
    FORM: tl.constexpr,
):
    """Program (item, KV head); items from first_item on.

    batch: `BatchPointers`; softmax, windows: as in `triton_loop.py`
    out, lse: the operator's if DIRECT; otherwise fp32 [items, KV heads, block_m, HEAD_DIM] and
        without HEAD_DIM
    """
    index = tl.program_id(0)
    head = tl.program_id(1)
    item = first_item + index
    seq = find(batch.starts, num_seqs, item)
    query_start = tl.load(batch.query_starts + seq)
    num_queries = tl.load(batch.query_starts + seq + 1) - query_start
    seq_len = tl.load(batch.seq_lens + seq)
    sink_pages, recent_pages = windows
    first = first_of(batch, seq, FORM)
    base, num_parts = prefill_parts(batch, num_seqs, seq, seq_len, first, windows, FORM)
    here = (sink_pages, recent_pages, first)
    local = item - tl.load(batch.starts + seq)
    part = local % num_parts
    first_query = local // num_parts * FORM.block_q
    PAGE_SIZE: tl.constexpr = FORM.page_size
    CHUNK: tl.constexpr = FORM.chunk_pages * PAGE_SIZE

    BLOCK_M: tl.constexpr = FORM.block_m
    offs_m = tl.arange(0, BLOCK_M)
    token = first_query + offs_m // FORM.group
    mask_m = (offs_m < FORM.block_q * FORM.group) & (token < num_queries)
    q_head = head * FORM.group + offs_m % FORM.group
    q_row = (query_start + token).to(tl.int64) * FORM.num_heads + q_head
    # Rows beyond the block use the position of its first query, so that they see some key.
    num_past = seq_len - num_queries
    first_pos = num_past + first_query
    last_pos = tl.minimum(first_pos + FORM.block_q, seq_len) - 1
    q_pos = num_past + tl.where(mask_m, token, first_query)
    q = load_queries(q_ptr, q_row, mask_m, q_pos, FORM)

    seen_from = 0
    if FORM.has_window:
        seen_from = slots_below(first_seen(first_pos, softmax[2]), first, FORM)
    sealed_from = tl.maximum(columns_below(sink_pages, first, FORM) * PAGE_SIZE, seen_from)
    sealed_end = tl.maximum(last_pos // PAGE_SIZE - recent_pages, 0)
    sealed_end = columns_below(sealed_end, first, FORM) * PAGE_SIZE
    sealed_from = tl.maximum(sealed_from, (base + part) * CHUNK)
    sealed_end = tl.minimum(sealed_end, (base + part + 1) * CHUNK)

    row = tl.load(batch.rows + seq).to(tl.int64) * stride_table
    pages = (hot_ptr, sealed_ptr, batch.hot_tables + row, batch.sealed_tables + row)
    span = (sealed_from, sealed_end)
    state = attend_sealed(q, no_keys(FORM), pages, head, span, softmax, here, True, FORM)
    if part == 0:
        recent_from = columns_below(first_pos // PAGE_SIZE - recent_pages, first, FORM)
        end_key = slots_below(last_pos + 1, first, FORM)
        spans = (seen_from, recent_from * PAGE_SIZE, end_key)
        state = attend_hot(q, state, pages, head, spans, softmax, here, FORM)
    if DIRECT:
        store_finished(state, out_ptr, lse_ptr, q_row, mask_m, FORM)
    else:
        rows = (index.to(tl.int64) * FORM.num_kv_heads + head) * FORM.block_m + offs_m
        store_finished(state, out_ptr, lse_ptr, rows, mask_m, FORM)


@triton.jit(do_not_specialize=["batch", "first_item", "num_seqs", "first_token"])
def prefill_merge_kernel(
    out_ptr,
    lse_ptr,
    outs_ptr,
    lses_ptr,
    batch,
    first_item,
    first_token,
    num_seqs,
    windows,
    FORM: tl.constexpr,
):
    """Program (token, query head, block of channels), tokens from first_token on.

    outs, lses: as `prefill_kernel` writes them; out, lse: the operator's
    """
    token = first_token + tl.program_id(0)
    head = tl.program_id(1)
    seq = find(batch.query_starts, num_seqs, token)
    query_start = tl.load(batch.query_starts + seq)
    # Sequences that decode, and have no items, may lie between.
    if tl.load(batch.starts + seq + 1) > tl.load(batch.starts + seq):
        seq_len = tl.load(batch.seq_lens + seq)
        first = first_of(batch, seq, FORM)
        _, num_parts = prefill_parts(batch, num_seqs, seq, seq_len, first, windows, FORM)
        query = token - query_start
        item = tl.load(batch.starts + seq) - first_item + query // FORM.block_q * num_parts
        row = query % FORM.block_q * FORM.group + head % FORM.group
        kv_head = head // FORM.group
        STRIDE: tl.constexpr = FORM.num_kv_heads * FORM.block_m
        HEAD_DIM: tl.constexpr = FORM.head_dim
        parts, merged = (outs_ptr, lses_ptr), (out_ptr, lse_ptr)
        first_row = (item.to(tl.int64) * FORM.num_kv_heads + kv_head) * FORM.block_m + row
        to_row = token.to(tl.int64) * FORM.num_heads + head
        merge_row(parts, first_row, STRIDE, num_parts, merged, to_row, HEAD_DIM)
