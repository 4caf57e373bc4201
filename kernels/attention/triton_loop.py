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

    q         (tiles, from `load_keys`; sums over channels [rows] fp32; positions [rows])
    state     (acc [rows, BLOCK_D], acc_offset [rows], top [rows], total [rows]), all fp32
    pages     (hot_ptr, sealed_ptr, hot_table_ptr, sealed_table_ptr): tables at the sequence's row
    tables    (k_table_ptr, v_table_ptr): the layer's tables of the sides
    softmax   (qk_scale, softcap, sliding window)
    windows   (sink_pages, recent_pages, the first page of the sequence that is here)
    FORM      see `triton_form.py`
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.attention.triton_parts import columns_below
from kvmesh.kernels.formats.pairs_triton import padded_half, pair_channels
from kvmesh.kernels.formats.tiles_triton import rope_pairs


@triton.jit
def _load_rows(ptr, rows, mask, offs_d, mask_d, HEAD_DIM: tl.constexpr):
    """Some channels of rows of HEAD_DIM numbers; the masks say which exist."""
    mask = mask[:, None]
    if mask_d is not None:
        mask = mask & mask_d[None, :]
    return tl.load(ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def load_keys(ptr, rows, mask, FORM: tl.constexpr):
    """Queries or exact keys, to be multiplied with each other or with the side's tiles: a tuple of
    one tile with all channels or, if RoPE rotates the side's keys, of two."""
    HEAD_DIM: tl.constexpr = FORM.head_dim
    BLOCK_D: tl.constexpr = FORM.block_d
    ROPE: tl.constexpr = rope_pairs(FORM.k_side)
    if ROPE is None:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = None if BLOCK_D == HEAD_DIM else offs_d < HEAD_DIM
        return (_load_rows(ptr, rows, mask, offs_d, mask_d, HEAD_DIM),)
    else:
        PAD: tl.constexpr = padded_half(HEAD_DIM)
        mask_d = None if 2 * PAD == HEAD_DIM else tl.arange(0, PAD) < HEAD_DIM // 2
        first = pair_channels(0, ROPE, HEAD_DIM)
        second = pair_channels(1, ROPE, HEAD_DIM)
        return (
            _load_rows(ptr, rows, mask, first, mask_d, HEAD_DIM),
            _load_rows(ptr, rows, mask, second, mask_d, HEAD_DIM),
        )


@triton.jit
def load_queries(q_ptr, rows, mask, positions, FORM: tl.constexpr):
    """q_ptr: [tokens, heads, HEAD_DIM] seen as rows"""
    q = load_keys(q_ptr, rows, mask, FORM)
    return q, tl.sum(q[0].to(tl.float32), 1), positions


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
def key_products(q, k):
    """q, k: tuples of tiles from `load_keys` -> [rows, keys] fp32"""
    x = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    if len(q) == 2:
        x = tl.dot(q[1], tl.trans(k[1]), x, input_precision="ieee")
    return x


@triton.jit
def attend_tile(
    q,
    state,
    page,
    tables,
    head,
    first_key,
    span,
    softmax,
    windows,
    HOT: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
    FORM: tl.constexpr,
):
    """One tile of keys of one page, of which slots [span[0], span[1]) are valid.

    page: pointers to the head's keys and values in it
    MASKED: False if every row sees every key of the tile
    """
    q_tiles, q_sum, q_pos = q
    acc, acc_offset, top, total = state
    k_ptr, v_ptr = page
    k_table_ptr, v_table_ptr = tables
    start_key, end_key = span
    qk_scale, softcap, window = softmax
    sink_pages, recent_pages, first = windows
    PAGE_SIZE: tl.constexpr = FORM.page_size
    HEAD_DIM: tl.constexpr = FORM.head_dim
    BLOCK_D: tl.constexpr = FORM.block_d
    BLOCK_N: tl.constexpr = FORM.hot_n if HOT else FORM.block_n
    K_FOLDED: tl.constexpr = FORM.k_folded and not HOT
    V_FOLDED: tl.constexpr = FORM.v_folded and not HOT
    K_SIDE: tl.constexpr = FORM.k_side
    V_SIDE: tl.constexpr = FORM.v_side
    offs_n = tl.arange(0, BLOCK_N)
    keys = first_key + offs_n
    first_slot = first_key % PAGE_SIZE
    mask = (keys >= start_key) & (keys < end_key)
    if HOT:
        k = load_keys(k_ptr, first_slot + offs_n, mask, FORM)
        k_scale, k_offset = 1.0, 0.0
    else:
        k, k_scale, k_offset = FORM.load_k(
            k_ptr,
            k_table_ptr,
            head,
            first_slot,
            K_SIDE,
            PAGE_SIZE,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
            DTYPE,
        )
        if rope_pairs(K_SIDE) is None:
            k = (k,)
    scores = key_products(q_tiles, k)
    if K_FOLDED:
        scores = scores * (k_scale * qk_scale)[None, :]
        if k_offset is not None:
            scores += q_sum[:, None] * (k_offset * qk_scale)[None, :]
    else:
        scores = scores * qk_scale
    if FORM.load_k_centre is not None and not HOT:
        # The centre repeated eight times gives a product with the layout of the scores.
        centre = FORM.load_k_centre(k_ptr, K_SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_D).to(DTYPE)
        centre = tl.broadcast_to(centre[None, :], [8, BLOCK_D])
        shift = key_products(q_tiles, (centre,)) * qk_scale
        scores = scores.reshape(scores.shape[0], BLOCK_N // 8, 8) + shift[:, None, :]
        scores = scores.reshape(shift.shape[0], BLOCK_N)
    if FORM.has_softcap:
        # tanh(x) = 2 sigmoid(2x) - 1; scores are in natural log up to here
        scores = (2.0 * tl.sigmoid(scores * (2.0 / softcap)) - 1.0) * (softcap * 1.4426950408889634)
    if MASKED:
        column = first_key // PAGE_SIZE
        first_page = column * FORM.stride + first
        keys += (first_page - column) * PAGE_SIZE  # from slots to positions
        edge = q_pos // PAGE_SIZE - recent_pages
        if HOT:
            seen = (first_page < sink_pages) | (first_page >= edge)
            visible = mask[None, :] & seen[:, None] & (keys[None, :] <= q_pos[:, None])
        else:
            visible = mask[None, :] & (first_page < edge)[:, None]
        if FORM.has_window:
            visible = visible & (q_pos[:, None] - keys[None, :] < window)
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet keeps -inf; subtract 0 from it, since inf - inf is NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    keep = tl.exp2(top - base)
    total = total * keep + tl.sum(weights, 1)
    if HOT:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = None if BLOCK_D == HEAD_DIM else offs_d < HEAD_DIM
        v = _load_rows(v_ptr, first_slot + offs_n, mask, offs_d, mask_d, HEAD_DIM)
        v_scale, v_offset = 1.0, 0.0
    else:
        v, v_scale, v_offset = FORM.load_v(
            v_ptr,
            v_table_ptr,
            head,
            first_slot,
            V_SIDE,
            PAGE_SIZE,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
            DTYPE,
        )
    acc_offset = acc_offset * keep
    if V_FOLDED:
        if v_offset is not None:
            acc_offset += tl.sum(weights * v_offset[None, :], 1)
        weights = weights * v_scale[None, :]
    acc = tl.dot(weights.to(DTYPE), v, acc * keep[:, None], input_precision="ieee")
    return acc, acc_offset, new_top, total


@triton.jit
def attend_sealed(
    q,
    state,
    pages,
    tables,
    head,
    span,
    softmax,
    windows,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
    FORM: tl.constexpr,
):
    """The sealed pages that contain slots [span[0], span[1]); the end is a page's."""
    _, sealed_ptr, _, sealed_table_ptr = pages
    start_key, end_key = span
    BLOCK_N: tl.constexpr = FORM.block_n
    for tile in range(start_key // BLOCK_N, end_key // BLOCK_N):
        first_key = tile * BLOCK_N
        page = tl.load(sealed_table_ptr + first_key // FORM.page_size).to(tl.int64)
        k_ptr = sealed_ptr + (page * FORM.num_kv_heads + head) * FORM.page_bytes
        state = attend_tile(
            q,
            state,
            (k_ptr, k_ptr + FORM.k_bytes),
            tables,
            head,
            first_key,
            span,
            softmax,
            windows,
            False,
            MASKED,
            DTYPE,
            FORM,
        )
    return state


@triton.jit
def attend_hot(
    q,
    state,
    pages,
    tables,
    head,
    seen_from,
    recent_from,
    end_key,
    softmax,
    windows,
    DTYPE: tl.constexpr,
    FORM: tl.constexpr,
):
    """The hot pages of slots [seen_from, sink) and [recent_from, end_key)."""
    hot_ptr, _, hot_table_ptr, _ = pages
    sink_pages, _, first = windows
    BLOCK_N: tl.constexpr = FORM.hot_n
    sink_end = columns_below(sink_pages, first, FORM) * FORM.page_size
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
        page = tl.load(hot_table_ptr + first_key // FORM.page_size).to(tl.int64)
        # A hot page holds all heads' keys, then all heads' values.
        row = page * (2 * FORM.num_kv_heads) + head
        k_ptr = hot_ptr + row * (FORM.page_size * FORM.head_dim)
        v_ptr = k_ptr + FORM.num_kv_heads * FORM.page_size * FORM.head_dim
        state = attend_tile(
            q,
            state,
            (k_ptr, v_ptr),
            tables,
            head,
            first_key,
            (start, end),
            softmax,
            windows,
            True,
            True,
            DTYPE,
            FORM,
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
