"""Decode: a program for each part of each sequence, and the merge of the parts.

A part (`work.py`) is a sequence's hot pages or a chunk of its sealed pages. Sealed pages are read
by the integer loop (`triton_sealed.py`) or the plain one. Grids follow from upper bounds and
everything else from what is read on the device, so a captured graph stays correct as sequences
grow. A loop over parts within a program would save the programs that find nothing to do, but in a
single warp it costs the sealed loop registers that it does not have.
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
    num_chunks,
    slots_below,
)
from kvmesh.kernels.attention.triton_sealed import integer_part
from kvmesh.kernels.merge.triton_merge import BLOCK_D, merge_row


@triton.jit(do_not_specialize=["batch", "first_slot", "max_slots", "num_seqs"])
def decode_kernel(
    q_ptr,
    hot_ptr,
    sealed_ptr,
    out_ptr,
    lse_ptr,
    batch,
    stride_table,
    first_slot,
    max_slots,
    num_seqs,
    softmax,
    windows,
    FORM: tl.constexpr,
):
    """Program (slot from first_slot on, KV head and a part of its query heads).

    batch: `BatchPointers`; softmax, windows: as in `triton_loop.py`
    max_slots: slots from first_slot + max_slots on are computed in another round
    out, lse: fp32 [slots, query heads, HEAD_DIM], and without HEAD_DIM, from first_slot on; slots
        of shared prefixes are not written
    """
    heads = (tl.program_id(1) // FORM.head_parts, tl.program_id(1) % FORM.head_parts)
    sink_pages, recent_pages = windows
    PAGE_SIZE: tl.constexpr = FORM.page_size
    PAGES: tl.constexpr = FORM.chunk_pages
    end_slot = tl.minimum(tl.load(batch.starts + num_seqs), first_slot + max_slots)
    slot = first_slot + tl.program_id(0)
    if slot < end_slot:
        seq = find(batch.starts, num_seqs, slot)
        part = slot - tl.load(batch.starts + seq)
        position = tl.load(batch.seq_lens + seq) - 1
        query = tl.load(batch.query_starts + seq).to(tl.int64)
        row = tl.load(batch.rows + seq).to(tl.int64) * stride_table
        out_row = (slot - first_slot).to(tl.int64) * FORM.num_heads
        first = first_of(batch, seq, FORM)
        here = (sink_pages, recent_pages, first)
        sink = columns_below(sink_pages, first, FORM)
        recent = columns_below(position // PAGE_SIZE - recent_pages, first, FORM)
        seen_from = 0
        first_page = sink
        if FORM.has_window:
            seen_from = first_seen(position, softmax[2])
            seen_page = columns_below(seen_from // PAGE_SIZE, first, FORM)
            first_page = tl.maximum(first_page, seen_page)
            seen_from = slots_below(seen_from, first, FORM)
        num_shared = 0
        if FORM.has_prefixes:
            shared_pages = tl.load(batch.prefix_pages + seq)
            first_page += shared_pages
            num_shared = num_chunks(sink, sink + shared_pages, PAGES)
            num_shared = tl.where(shared_pages > 0, num_shared, 0)
        pages = (hot_ptr, sealed_ptr, batch.hot_tables + row, batch.sealed_tables + row)
        if part == 0:
            spans = (seen_from, recent * PAGE_SIZE, slots_below(position + 1, first, FORM))
            q = _queries(q_ptr, query, position, heads, FORM)
            state = attend_hot(q, no_keys(FORM), pages, heads[0], spans, softmax, here, FORM)
            _store(state, out_ptr, lse_ptr, out_row, heads, FORM)
        elif part > num_shared:
            chunk = first_page // PAGES + part - 1 - num_shared
            from_page = tl.maximum(first_page, chunk * PAGES)
            end_page = tl.minimum(recent, (chunk + 1) * PAGES)
            if FORM.integer:
                integer_part(
                    q_ptr,
                    out_ptr,
                    lse_ptr,
                    query,
                    out_row,
                    pages,
                    heads,
                    from_page,
                    end_page,
                    softmax,
                    FORM,
                )
            else:
                span = (tl.maximum(from_page * PAGE_SIZE, seen_from), end_page * PAGE_SIZE)
                # Without a window the query sees all of every sealed page.
                MASKED: tl.constexpr = FORM.has_window
                q = _queries(q_ptr, query, position, heads, FORM)
                state = attend_sealed(
                    q, no_keys(FORM), pages, heads[0], span, softmax, here, MASKED, FORM
                )
                _store(state, out_ptr, lse_ptr, out_row, heads, FORM)


@triton.jit
def _query_heads(heads, FORM: tl.constexpr):
    """The query head of each row of the plain loop, and whether it exists."""
    offs_m = tl.arange(0, FORM.block_m)
    group_head = heads[1] * FORM.heads + offs_m
    mask_m = (offs_m < FORM.heads) & (group_head < FORM.group)
    return heads[0] * FORM.group + group_head, mask_m


@triton.jit
def _queries(q_ptr, query, position, heads, FORM: tl.constexpr):
    q_head, mask_m = _query_heads(heads, FORM)
    return load_queries(q_ptr, query * FORM.num_heads + q_head, mask_m, position + q_head * 0, FORM)


@triton.jit
def _store(state, out_ptr, lse_ptr, out_row, heads, FORM: tl.constexpr):
    q_head, mask_m = _query_heads(heads, FORM)
    store_finished(state, out_ptr, lse_ptr, out_row + q_head, mask_m, FORM)


@triton.jit(
    do_not_specialize=["batch", "first_slot", "first_seq", "end_seq", "num_seqs", "num_tokens"]
)
def decode_merge_kernel(
    out_ptr,
    lse_ptr,
    outs_ptr,
    lses_ptr,
    batch,
    first_slot,
    first_seq,
    end_seq,
    num_seqs,
    num_tokens,
    FORM: tl.constexpr,
):
    """Program (sequence of [first_seq, end_seq), query head, block of channels).

    outs, lses: as `decode_kernel` writes them; out, lse: the operator's. Program n also clears
    row n < num_tokens if it belongs to no sequence.
    """
    seq = first_seq + tl.program_id(0)
    head = tl.program_id(1)
    HEAD_DIM: tl.constexpr = FORM.head_dim
    NUM_HEADS: tl.constexpr = FORM.num_heads
    if seq < end_seq:
        start = tl.load(batch.starts + seq)
        num_parts = tl.load(batch.starts + seq + 1) - start
        if num_parts > 0:
            token = tl.load(batch.query_starts + seq).to(tl.int64)
            parts, merged = (outs_ptr, lses_ptr), (out_ptr, lse_ptr)
            first = (start - first_slot).to(tl.int64) * FORM.num_heads + head
            to_row = token * FORM.num_heads + head
            merge_row(parts, first, NUM_HEADS, num_parts, merged, to_row, HEAD_DIM)
    if (seq >= tl.load(batch.query_starts + num_seqs)) & (seq < num_tokens):
        offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        at = seq.to(tl.int64) * FORM.num_heads + head
        nothing = tl.zeros([BLOCK_D], out_ptr.dtype.element_ty)
        tl.store(out_ptr + at * FORM.head_dim + offs_d, nothing, mask=offs_d < FORM.head_dim)
        tl.store(lse_ptr + at, float("-inf"))
