"""The plain attention loop over tiles of keys: every format, hot and sealed pages.

A program has a block of rows, (query token, query head of one KV head's group) pairs, and goes
through tiles of keys of one page each. Each row masks the keys that it does not see in that form:
a row at position i, in page P, sees

    sealed   pages [sink, P - recent)
    hot      pages [0, sink) and [P - recent, P], up to position i

Sides supply the loads (formats/tiles_triton.py). If a side is folded, its scale and offset
are applied to the scores or to the weights,

    q·k^ = scale (q·tile) + offset Σq        Σ p v^ = Σ (p scale) tile + Σ p offset

and if the keys of a page have a centre, q·k^ + q·centre.

In all functions here:

    q         (tile [rows, BLOCK_D]; sums over channels [rows] fp32; positions [rows])
    state     (acc [rows, BLOCK_D], acc_offset [rows], top [rows], total [rows]), all fp32
    pages     (hot_ptr, sealed_ptr, hot_table_ptr, sealed_table_ptr): tables at the sequence's row
    softmax   (qk_scale, softcap, sliding window)
    windows   (sink_pages, recent_pages, the first page of the sequence that is here)
    FORM      see `triton_form.py`
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.attention.triton_parts import columns_below, first_seen, page_of


@triton.jit
def _load_rows(ptr, rows, mask, FORM: tl.constexpr):
    """Rows of HEAD_DIM numbers, [rows, BLOCK_D]; the mask says which exist."""
    offs_d = tl.arange(0, FORM.block_d)
    mask = mask[:, None]
    if FORM.block_d != FORM.head_dim:
        mask = mask & (offs_d < FORM.head_dim)[None, :]
    return tl.load(ptr + rows[:, None] * FORM.head_dim + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def load_queries(q_ptr, rows, mask, positions, FORM: tl.constexpr):
    """q_ptr: [tokens, heads, HEAD_DIM] seen as rows"""
    q = _load_rows(q_ptr, rows, mask, FORM)
    return q, tl.sum(q.to(tl.float32), 1), positions


@triton.jit
def no_keys(FORM: tl.constexpr):
    """The state before the first tile."""
    M: tl.constexpr = FORM.block_m
    D: tl.constexpr = FORM.block_d
    acc = tl.zeros([M, D], dtype=tl.float32)
    acc_offset = tl.zeros([M], dtype=tl.float32)
    top = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    return acc, acc_offset, top, total


@triton.jit
def _scores(q, k_ptr, first_slot, mask, softmax, HOT: tl.constexpr, FORM: tl.constexpr):
    """[rows, keys] fp32: products of queries with a tile of keys, as base-2 logarithms, or with a
    softcap first as natural ones"""
    q_tile, q_sum, _ = q
    qk_scale, softcap, _ = softmax
    DTYPE: tl.constexpr = q_tile.dtype
    if HOT:
        k = _load_rows(k_ptr, first_slot + tl.arange(0, FORM.hot_n), mask, FORM)
    else:
        k, scale, offset = FORM.load_k(k_ptr, first_slot, FORM.k_side, DTYPE, FORM)
    scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee")
    if FORM.k_folded and not HOT:
        scores = scores * (scale * qk_scale)[None, :]
        if offset is not None:
            scores += q_sum[:, None] * (offset * qk_scale)[None, :]
    else:
        scores = scores * qk_scale
    if FORM.load_k_centre is not None and not HOT:
        BLOCK_N: tl.constexpr = FORM.block_n
        BLOCK_D: tl.constexpr = FORM.block_d
        # The centre repeated eight times gives a product with the layout of the scores.
        centre = FORM.load_k_centre(k_ptr, FORM).to(DTYPE)
        centre = tl.broadcast_to(centre[None, :], [8, BLOCK_D])
        shift = tl.dot(q_tile, tl.trans(centre), input_precision="ieee") * qk_scale
        scores = scores.reshape(scores.shape[0], BLOCK_N // 8, 8) + shift[:, None, :]
        scores = scores.reshape(shift.shape[0], BLOCK_N)
    if FORM.has_softcap:
        # tanh(x) = 2 sigmoid(2x) - 1
        scores = (2.0 * tl.sigmoid(scores * (2.0 / softcap)) - 1.0) * (softcap * 1.4426950408889634)
    return scores


@triton.jit
def _visible(page, keys, mask, q_pos, softmax, windows, HOT: tl.constexpr, FORM: tl.constexpr):
    """[rows, keys]: which keys of a page's tile each row sees in this form; keys: positions"""
    sink_pages, recent_pages, _ = windows
    edge = q_pos // FORM.page_size - recent_pages
    if HOT:
        seen = (page < sink_pages) | (page >= edge)
        visible = mask[None, :] & seen[:, None] & (keys[None, :] <= q_pos[:, None])
    else:
        visible = mask[None, :] & (page < edge)[:, None]
    if FORM.has_window:
        visible = visible & (keys[None, :] >= first_seen(q_pos, softmax[2])[:, None])
    return visible


@triton.jit
def _attend_tile(
    q,
    state,
    page,
    first_key,
    span,
    softmax,
    windows,
    HOT: tl.constexpr,
    MASKED: tl.constexpr,
    FORM: tl.constexpr,
):
    """One tile of keys of one page, of which slots [span[0], span[1]) are valid.

    page: pointers to the head's keys and values in it
    MASKED: False if every row sees every key of the tile
    """
    acc, acc_offset, top, total = state
    k_ptr, v_ptr = page
    DTYPE: tl.constexpr = q[0].dtype
    keys = first_key + tl.arange(0, FORM.hot_n if HOT else FORM.block_n)
    first_slot = first_key % FORM.page_size
    mask = (keys >= span[0]) & (keys < span[1])
    scores = _scores(q, k_ptr, first_slot, mask, softmax, HOT, FORM)
    if MASKED:
        column = first_key // FORM.page_size
        page = column * FORM.stride + windows[2]
        keys += (page - column) * FORM.page_size  # from slots to positions
        visible = _visible(page, keys, mask, q[2], softmax, windows, HOT, FORM)
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet keeps -inf; subtract 0 from it, since inf - inf is NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    keep = tl.exp2(top - base)
    total = total * keep + tl.sum(weights, 1)
    acc_offset = acc_offset * keep
    if HOT:
        v = _load_rows(v_ptr, first_slot + tl.arange(0, FORM.hot_n), mask, FORM)
    else:
        v, scale, offset = FORM.load_v(v_ptr, first_slot, FORM.v_side, DTYPE, FORM)
        if FORM.v_folded:
            if offset is not None:
                acc_offset += tl.sum(weights * offset[None, :], 1)
            weights = weights * scale[None, :]
    acc = tl.dot(weights.to(DTYPE), v, acc * keep[:, None], input_precision="ieee")
    return acc, acc_offset, new_top, total


@triton.jit
def attend_sealed(
    q, state, pages, head, span, softmax, windows, MASKED: tl.constexpr, FORM: tl.constexpr
):
    """The sealed pages that contain slots [span[0], span[1]); the end is a page's."""
    _, sealed_ptr, _, table_ptr = pages
    start_key, end_key = span
    BLOCK_N: tl.constexpr = FORM.block_n
    for tile in range(start_key // BLOCK_N, end_key // BLOCK_N):
        first_key = tile * BLOCK_N
        page = page_of(table_ptr, first_key // FORM.page_size)
        k_ptr = sealed_ptr + (page * FORM.num_kv_heads + head) * FORM.page_bytes
        at = (k_ptr, k_ptr + FORM.k_bytes)
        state = _attend_tile(q, state, at, first_key, span, softmax, windows, False, MASKED, FORM)
    return state


@triton.jit
def attend_hot(q, state, pages, head, spans, softmax, windows, FORM: tl.constexpr):
    """The hot pages of slots [seen_from, sink) and [recent_from, end_key).

    spans: (seen_from, recent_from, end_key)
    """
    seen_from, recent_from, end_key = spans
    hot_ptr, _, table_ptr, _ = pages
    BLOCK_N: tl.constexpr = FORM.hot_n
    sink_end = columns_below(windows[0], windows[2], FORM) * FORM.page_size
    recent_from = tl.maximum(tl.maximum(recent_from, sink_end), seen_from)
    sink_end = tl.minimum(sink_end, end_key)
    sink_tile = seen_from // BLOCK_N
    recent_tile = recent_from // BLOCK_N
    num_sink = tl.maximum((sink_end + BLOCK_N - 1) // BLOCK_N - sink_tile, 0)
    num_recent = tl.maximum((end_key + BLOCK_N - 1) // BLOCK_N - recent_tile, 0)
    for index in tl.range(0, num_sink + num_recent, num_stages=FORM.hot_stages):
        in_sink = index < num_sink
        first_key = tl.where(in_sink, sink_tile + index, recent_tile + index - num_sink) * BLOCK_N
        start = tl.where(in_sink, seen_from, recent_from)
        end = tl.where(in_sink, sink_end, end_key)
        page = page_of(table_ptr, first_key // FORM.page_size)
        # A hot page holds all heads' keys, then all heads' values.
        row = page * (2 * FORM.num_kv_heads) + head
        k_ptr = hot_ptr + row * (FORM.page_size * FORM.head_dim)
        at = (k_ptr, k_ptr + FORM.num_kv_heads * FORM.page_size * FORM.head_dim)
        state = _attend_tile(
            q, state, at, first_key, (start, end), softmax, windows, True, True, FORM
        )
    return state


@triton.jit
def store_finished(state, out_ptr, lse_ptr, rows, mask, FORM: tl.constexpr):
    """The sums over all tiles -> out [rows, HEAD_DIM] and lse [rows]; 0 and -inf for rows that
    have seen no key"""
    acc, acc_offset, top, total = state
    BLOCK_D: tl.constexpr = FORM.block_d
    offs_d = tl.arange(0, BLOCK_D)
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    out = (acc + acc_offset[:, None]) * (1.0 / total)[:, None]
    lse = tl.where(some, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    at = rows[:, None] * FORM.head_dim + offs_d[None, :]
    mask_d = mask[:, None] & (offs_d < FORM.head_dim)[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask_d)
    tl.store(lse_ptr + rows, lse, mask=mask)
