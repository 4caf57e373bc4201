"""Decode attention over prefixes that several sequences share: each page is read once for all.

As in FlashInfer's cascade, the rows of a tile are (sequence, query head of one KV
head's group) pairs: up to 64 of them for the cost of unpacking one tile of keys. The results go
into each member's slots, next to those of its other parts (`work.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.attention.triton_loop import (
    attend_sealed,
    load_queries,
    no_keys,
    store_finished,
)
from kvmesh.kernels.attention.triton_parts import columns_below, find, first_of


@triton.jit(do_not_specialize=["batch", "first_slot", "max_slots", "num_sets"])
def prefix_kernel(
    q_ptr,
    hot_ptr,
    sealed_ptr,
    out_ptr,
    lse_ptr,
    batch,
    stride_table,
    first_slot,
    max_slots,
    num_sets,
    softmax,
    windows,
    FORM: tl.constexpr,
):
    """Programs (n-th of a fixed number, KV head), which go through the chunks of all sets; the
    arguments are those of `decode_kernel`.

    Members whose slots are not those to be computed are masked.
    """
    head = tl.program_id(1)
    sink_pages, recent_pages = windows
    PAGES: tl.constexpr = FORM.chunk_pages
    BLOCK_M: tl.constexpr = FORM.block_m
    offs_m = tl.arange(0, BLOCK_M)
    total = tl.load(batch.set_chunks + num_sets)
    for number in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        members = find(batch.set_chunks, num_sets, number)
        part = number - tl.load(batch.set_chunks + members)
        members_from = tl.load(batch.set_starts + members)
        num_members = tl.load(batch.set_starts + members + 1) - members_from
        mask_m = offs_m // FORM.group < num_members
        member = members_from + offs_m // FORM.group
        seq = tl.load(batch.members + member, mask=mask_m, other=0)
        slot = tl.load(batch.starts + seq, mask=mask_m, other=0) + 1 + part - first_slot
        mask_m = mask_m & (slot >= 0) & (slot < max_slots)
        q_head = head * FORM.group + offs_m % FORM.group
        query = tl.load(batch.query_starts + seq, mask=mask_m, other=0).to(tl.int64)
        # Every row sees all of every page, so nothing is masked.
        q = load_queries(q_ptr, query * FORM.num_heads + q_head, mask_m, offs_m, FORM)
        first_seq = tl.load(batch.members + members_from)
        first = first_of(batch, first_seq, FORM)
        sink = columns_below(sink_pages, first, FORM)
        end_page = sink + tl.load(batch.prefix_pages + first_seq)
        chunk = sink // PAGES + part
        from_page = tl.maximum(sink, chunk * PAGES)
        end_page = tl.minimum(end_page, (chunk + 1) * PAGES)
        row = tl.load(batch.rows + first_seq).to(tl.int64) * stride_table
        pages = (hot_ptr, sealed_ptr, batch.hot_tables + row, batch.sealed_tables + row)
        span = (from_page * FORM.page_size, end_page * FORM.page_size)
        here = (sink_pages, recent_pages, first)
        state = attend_sealed(q, no_keys(FORM), pages, head, span, softmax, here, False, FORM)
        rows = slot.to(tl.int64) * FORM.num_heads + q_head
        store_finished(state, out_ptr, lse_ptr, rows, mask_m, FORM)
