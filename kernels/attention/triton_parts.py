"""Where a part of the work lies, found on the device (`work.py`), and the arguments of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class BatchPointers(NamedTuple):
    """Pointers to int32 arrays of `AttentionBatch` and `SharedPrefixes`, and to `starts` of the
    step's work. Kernels that do not read an array get a placeholder."""

    query_starts: Any
    seq_lens: Any
    rows: Any
    hot_tables: Any
    sealed_tables: Any
    starts: Any
    prefix_pages: Any
    members: Any
    set_starts: Any
    set_chunks: Any


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
def prefill_parts(seq_len, num_queries, window, windows, FORM: tl.constexpr):
    """First chunk, and number of parts, of the blocks of a sequence with several new tokens."""
    sink_pages, recent_pages = windows
    PAGES: tl.constexpr = FORM.chunk_pages
    base = seq_len * 0
    if FORM.has_window:
        seen_from = first_seen(seq_len - num_queries, window)
        base = tl.maximum(seen_from // FORM.page_size, sink_pages) // PAGES
    end_page = tl.maximum((seq_len - 1) // FORM.page_size - recent_pages, 0)
    return base, tl.maximum((end_page + PAGES - 1) // PAGES - base, 1)


@triton.jit
def page_of(table_ptr, page):
    """The id of a sequence's logical page; table_ptr: at the sequence's row. All kernels find
    pages here."""
    return tl.load(table_ptr + page).to(tl.int64)
