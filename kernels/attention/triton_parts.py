"""Where a part of the work lies, found on the device (`work.py`), and the arguments of a batch.

Parts are divided, and loops count, in columns of the tables and their slots. Where all pages are
here, those are pages and positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kvmesh.kernels.attention.batch import AttentionBatch


class BatchPointers(NamedTuple):
    """Pointers to int32 arrays of `AttentionBatch` and `SharedPrefixes`, and to `starts` of the
    step's work. Kernels that do not read an array get a placeholder."""

    query_starts: Any
    seq_lens: Any
    rows: Any
    firsts: Any
    hot_tables: Any
    sealed_tables: Any
    starts: Any
    prefix_pages: Any
    members: Any
    set_starts: Any
    set_chunks: Any

    @classmethod
    def of(cls, batch: AttentionBatch, starts: Any, set_chunks: Any) -> BatchPointers:
        """Its tensors, for a launch. starts, set_chunks: of the step's work"""
        prefixes = batch.prefixes
        members = (starts,) * 3
        if prefixes is not None:
            members = (prefixes.pages, prefixes.members, prefixes.starts)
        return cls(
            batch.query_starts,
            batch.seq_lens,
            batch.rows,
            starts if batch.firsts is None else batch.firsts,
            batch.hot_tables,
            batch.sealed_tables,
            starts,
            *members,
            set_chunks,
        )


@triton.jit
def first_of(batch, seq, FORM: tl.constexpr):
    """The first page of a sequence that is here."""
    if FORM.stride == 1:
        return seq * 0
    else:
        return tl.load(batch.firsts + seq)


@triton.jit
def columns_below(page, first, FORM: tl.constexpr):
    """How many of a sequence's pages below `page` are here."""
    STRIDE: tl.constexpr = FORM.stride
    if STRIDE == 1:
        return page
    else:
        return tl.maximum(page - first + STRIDE - 1, 0) // STRIDE


@triton.jit
def slots_below(position, first, FORM: tl.constexpr):
    """How many of a sequence's positions below `position`, at least 0, are here."""
    STRIDE: tl.constexpr = FORM.stride
    if STRIDE == 1:
        return position
    else:
        page = position // FORM.page_size
        within = tl.where(page % STRIDE == first, position % FORM.page_size, 0)
        return columns_below(page, first, FORM) * FORM.page_size + within


@triton.jit
def find(starts_ptr, count, number):
    """The i below `count` for which starts[i] <= number < starts[i + 1]; `count` if none is."""
    found = tl.zeros([], dtype=tl.int32)
    for first in range(0, count, 256):
        offs = first + tl.arange(0, 256)
        ends = tl.load(starts_ptr + 1 + offs, mask=offs < count, other=2147483647)
        found += tl.sum((ends <= number).to(tl.int32), 0)
    return found


@triton.jit
def num_chunks(first_page, end_page, PAGES: tl.constexpr):
    """Chunks that contain pages of [first_page, end_page)."""
    count = (end_page + PAGES - 1) // PAGES - first_page // PAGES
    return tl.where(end_page > first_page, count, 0)


@triton.jit
def first_seen(position, window):
    """The first position that queries at `position` see; `window` as in `window.py`."""
    if window > 0:
        first = position - window + 1
    else:
        first = position // -window * -window
    return tl.maximum(first, 0)


@triton.jit
def prefill_parts(batch, num_seqs, seq, seq_len, first, windows, FORM: tl.constexpr):
    """First chunk, and number of parts, of the blocks of a sequence with several new tokens.

    batch: whose `starts` are followed by the sequences' first chunks; first: the sequence's first
        page that is here
    """
    PAGES: tl.constexpr = FORM.chunk_pages
    base = tl.load(batch.starts + num_seqs + 1 + seq)
    end_page = tl.maximum((seq_len - 1) // FORM.page_size - windows[1], 0)
    end_page = columns_below(end_page, first, FORM)
    return base, tl.maximum((end_page + PAGES - 1) // PAGES - base, 1)


@triton.jit
def page_of(table_ptr, page):
    """The id of a sequence's logical page; table_ptr: at the sequence's row. All kernels find
    pages here."""
    return tl.load(table_ptr + page).to(tl.int64)
