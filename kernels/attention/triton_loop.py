"""The plain attention loop: every format, decode and prefill, hot and sealed pages.

A program attends a block of rows, (query token, query head of one KV head's
group) pairs, over a share of the keys. Keys come in two ranges of positions,

    sealed   [sink + shared, Pl - recent)        pages; Pl: page of the block's last query
    hot      [0, sink) and [Pf - recent, end)    Pf: page of its first query

and each row masks the keys that it does not see in that form. For decode a block is one
token and Pf = Pl; `num_splits` programs share its keys, and the pages that a sequence
shares with others are read elsewhere (`triton_prefix.py`). For prefill a block has 64
or more rows, so that a tile of sealed keys is unpacked once for all of them.

Sides supply `LOAD` (formats/tiles_triton.py). If a side is folded, its scale and offset
are applied to the scores or to the weights,

    q·k^ = scale (q·tile) + offset Σq        Σ p v^ = Σ (p scale) tile + Σ p offset

and if the keys of a page have a centre, q·k^ + q·centre.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def load_keys(ptr, rows, mask, K_SIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Queries or exact keys, to be multiplied with each other or with the side's tiles: a tuple of
    one tile with all channels or, if RoPE rotates the side's keys, of two."""
    ROPE: tl.constexpr = rope_pairs(K_SIDE)
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
def key_products(q, k, PRECISION: tl.constexpr):
    """q, k: tuples of tiles from `load_keys` -> [rows, keys] fp32"""
    x = tl.dot(q[0], tl.trans(k[0]), input_precision=PRECISION)
    if len(q) == 2:
        x = tl.dot(q[1], tl.trans(k[1]), x, input_precision=PRECISION)
    return x


@triton.jit
def attend_tile(
    q,
    q_sum,
    q_pos,
    acc,
    acc_offset,
    top,
    total,
    k_ptr,
    v_ptr,
    k_table_ptr,
    v_table_ptr,
    head,
    first_key,
    start_key,
    end_key,
    qk_scale,
    softcap,
    window,
    sink_pages,
    recent_pages,
    LOAD_K: tl.constexpr,
    LOAD_K_CENTRE: tl.constexpr,
    LOAD_V: tl.constexpr,
    K_FOLDED: tl.constexpr,
    V_FOLDED: tl.constexpr,
    K_SIDE: tl.constexpr,
    V_SIDE: tl.constexpr,
    HOT: tl.constexpr,
    DECODE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of BLOCK_N keys of one page, of which positions [start_key, end_key) are valid.

    q: from `load_keys`; q_sum: [rows] fp32
    k_ptr, v_ptr: the head's keys and values in the page
    """
    offs_n = tl.arange(0, BLOCK_N)
    keys = first_key + offs_n
    first_slot = first_key % PAGE_SIZE
    mask = (keys >= start_key) & (keys < end_key)
    if HOT:
        k = load_keys(k_ptr, first_slot + offs_n, mask, K_SIDE, HEAD_DIM, BLOCK_D)
        k_scale, k_offset = 1.0, 0.0
    else:
        k, k_scale, k_offset = LOAD_K(
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
    scores = key_products(q, k, PRECISION)
    if K_FOLDED and not HOT:
        scores = scores * (k_scale * qk_scale)[None, :]
        if k_offset is not None:
            scores += q_sum[:, None] * (k_offset * qk_scale)[None, :]
    else:
        scores = scores * qk_scale
    if LOAD_K_CENTRE is not None and not HOT:
        # The centre repeated eight times gives a product with the layout of the scores.
        centre = LOAD_K_CENTRE(k_ptr, K_SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_D).to(DTYPE)
        centre = tl.broadcast_to(centre[None, :], [8, BLOCK_D])
        shift = key_products(q, (centre,), PRECISION) * qk_scale
        scores = scores.reshape(scores.shape[0], BLOCK_N // 8, 8) + shift[:, None, :]
        scores = scores.reshape(shift.shape[0], BLOCK_N)
    if HAS_SOFTCAP:
        # tanh(x) = 2 sigmoid(2x) - 1; scores are in natural log up to here
        scores = (2.0 * tl.sigmoid(scores * (2.0 / softcap)) - 1.0) * (softcap * 1.4426950408889634)
    # Sealed tiles are full, and a decoding query without a window sees all of each tile.
    if HOT or HAS_WINDOW or not DECODE:
        page = first_key // PAGE_SIZE
        edge = q_pos // PAGE_SIZE - recent_pages
        if HOT:
            seen = (page < sink_pages) | (page >= edge)
            visible = mask[None, :] & seen[:, None] & (keys[None, :] <= q_pos[:, None])
        else:
            visible = mask[None, :] & (page < edge)[:, None]
        if HAS_WINDOW:
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
        v, v_scale, v_offset = LOAD_V(
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
    if V_FOLDED and not HOT:
        if v_offset is not None:
            acc_offset += tl.sum(weights * v_offset[None, :], 1)
        weights = weights * v_scale[None, :]
    acc = tl.dot(weights.to(DTYPE), v, acc * keep[:, None], input_precision=PRECISION)
    return acc, acc_offset, new_top, total


@triton.jit
def finished(acc, acc_offset, top, total):
    """The sums over all tiles -> out [rows, channels] and lse [rows]; 0 and -inf for rows that have
    seen no key"""
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    out = (acc + acc_offset[:, None]) * (1.0 / total)[:, None]
    return out, tl.where(some, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))


@triton.jit
def attention_kernel(
    q_ptr,
    hot_ptr,
    sealed_ptr,
    out_ptr,
    lse_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    rows_ptr,
    hot_tables_ptr,
    sealed_tables_ptr,
    prefix_pages_ptr,
    k_table_ptr,
    v_table_ptr,
    stride_table,
    stride_split,
    qk_scale,
    softcap,
    window,
    sink_pages,
    recent_pages,
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
    DECODE: tl.constexpr,
    HOT_ONLY: tl.constexpr,
    SEALED_ONLY: tl.constexpr,
    HAS_PREFIXES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (split or query block, KV head, sequence).

    DECODE: sequences with one new token; out and lse are partial, fp32
        [num_splits, num_seqs, num_heads, HEAD_DIM] and without HEAD_DIM.
        Otherwise sequences with more; out and lse are the operator's.
    HOT_ONLY, SEALED_ONLY: another kernel computes the other keys
    HAS_PREFIXES: another kernel computes the sequence's first prefix_pages sealed pages
    """
    head = tl.program_id(1)
    seq = tl.program_id(2)
    query_start = tl.load(query_starts_ptr + seq)
    num_queries = tl.load(query_starts_ptr + seq + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + seq)
    if DECODE:
        split = tl.program_id(0)
        block = 0
        wanted = num_queries == 1
    else:
        split = 0
        block = tl.program_id(0)
        wanted = (num_queries > 1) & (block * BLOCK_Q < num_queries)
    if wanted:
        DTYPE: tl.constexpr = q_ptr.dtype.element_ty
        NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
        offs_m = tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, BLOCK_D)
        token = block * BLOCK_Q + offs_m // GROUP
        q_head = head * GROUP + offs_m % GROUP
        mask_m = (offs_m < BLOCK_Q * GROUP) & (token < num_queries)
        mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
        q_row = (query_start + token).to(tl.int64) * NUM_HEADS + q_head
        q = load_keys(q_ptr, q_row, mask_m, K_SIDE, HEAD_DIM, BLOCK_D)
        q_sum = tl.sum(q[0].to(tl.float32), 1)  # over all channels, for folded sides

        # Rows beyond the block use the position of its first query, so that they see some key.
        num_past = seq_len - num_queries
        q_pos = num_past + tl.where(mask_m, token, block * BLOCK_Q)
        first_pos = num_past + block * BLOCK_Q
        last_pos = tl.minimum(first_pos + BLOCK_Q, seq_len) - 1
        seen_from = 0
        if HAS_WINDOW:
            seen_from = tl.maximum(first_pos - window + 1, 0)
        sealed_from = tl.maximum(sink_pages * PAGE_SIZE, seen_from)
        if HAS_PREFIXES:
            sealed_from += tl.load(prefix_pages_ptr + seq) * PAGE_SIZE
        sealed_end = (last_pos // PAGE_SIZE - recent_pages) * PAGE_SIZE
        sink_end = tl.minimum(sink_pages * PAGE_SIZE, last_pos + 1)
        recent_from = (first_pos // PAGE_SIZE - recent_pages) * PAGE_SIZE
        recent_from = tl.maximum(tl.maximum(recent_from, sink_pages * PAGE_SIZE), seen_from)

        # Tiles: sealed ones, then those of the sink, then the recent ones.
        sealed_tile = sealed_from // BLOCK_N
        sink_tile = seen_from // BLOCK_N
        recent_tile = recent_from // BLOCK_N
        num_sealed = 0
        if not HOT_ONLY:
            num_sealed = tl.maximum(sealed_end // BLOCK_N - sealed_tile, 0)
        num_sink, num_recent = 0, 0
        if not SEALED_ONLY:
            num_sink = tl.maximum((sink_end + BLOCK_N - 1) // BLOCK_N - sink_tile, 0)
            num_recent = tl.maximum(last_pos // BLOCK_N + 1 - recent_tile, 0)
        num_tiles = num_sealed + num_sink + num_recent
        per_split = num_tiles
        if DECODE:
            per_split = (num_tiles + num_splits - 1) // num_splits
        tile_from = split * per_split
        tile_end = tl.minimum(tile_from + per_split, num_tiles)

        table = tl.load(rows_ptr + seq).to(tl.int64) * stride_table
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        acc_offset = tl.zeros([BLOCK_M], dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)

        if not HOT_ONLY:
            for tile in range(tile_from, tl.minimum(tile_end, num_sealed)):
                first_key = (sealed_tile + tile) * BLOCK_N
                page = tl.load(sealed_tables_ptr + table + first_key // PAGE_SIZE).to(tl.int64)
                page_ptr = sealed_ptr + (page * NUM_KV_HEADS + head) * PAGE_BYTES
                acc, acc_offset, top, total = attend_tile(
                    q,
                    q_sum,
                    q_pos,
                    acc,
                    acc_offset,
                    top,
                    total,
                    page_ptr,
                    page_ptr + K_BYTES,
                    k_table_ptr,
                    v_table_ptr,
                    head,
                    first_key,
                    sealed_from,
                    sealed_end,
                    qk_scale,
                    softcap,
                    window,
                    sink_pages,
                    recent_pages,
                    LOAD_K,
                    LOAD_K_CENTRE,
                    LOAD_V,
                    K_FOLDED,
                    V_FOLDED,
                    K_SIDE,
                    V_SIDE,
                    False,
                    DECODE,
                    HAS_SOFTCAP,
                    HAS_WINDOW,
                    PAGE_SIZE,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_N,
                    DTYPE,
                    PRECISION,
                )
        if not SEALED_ONLY:
            for tile in range(tl.maximum(tile_from, num_sealed), tile_end):
                index = tile - num_sealed
                in_sink = index < num_sink
                first_key = tl.where(in_sink, sink_tile + index, recent_tile + index - num_sink)
                first_key = first_key * BLOCK_N
                start_key = tl.where(in_sink, seen_from, recent_from)
                end_key = tl.where(in_sink, sink_end, last_pos + 1)
                page = tl.load(hot_tables_ptr + table + first_key // PAGE_SIZE).to(tl.int64)
                # A hot page holds all heads' keys, then all heads' values.
                k_ptr = hot_ptr + (page * (2 * NUM_KV_HEADS) + head) * (PAGE_SIZE * HEAD_DIM)
                acc, acc_offset, top, total = attend_tile(
                    q,
                    q_sum,
                    q_pos,
                    acc,
                    acc_offset,
                    top,
                    total,
                    k_ptr,
                    k_ptr + NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM,
                    k_table_ptr,
                    v_table_ptr,
                    head,
                    first_key,
                    start_key,
                    end_key,
                    qk_scale,
                    softcap,
                    window,
                    sink_pages,
                    recent_pages,
                    LOAD_K,
                    LOAD_K_CENTRE,
                    LOAD_V,
                    K_FOLDED,
                    V_FOLDED,
                    K_SIDE,
                    V_SIDE,
                    True,
                    DECODE,
                    HAS_SOFTCAP,
                    HAS_WINDOW,
                    PAGE_SIZE,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_N,
                    DTYPE,
                    PRECISION,
                )

        out, lse = finished(acc, acc_offset, top, total)
        if DECODE:
            out_row = split.to(tl.int64) * stride_split + seq * NUM_HEADS + q_head
        else:
            out_row = q_row
        out_row_ptr = out_ptr + out_row[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(out_row_ptr, out.to(out_ptr.dtype.element_ty), mask=mask_q)
        tl.store(lse_ptr + out_row, lse, mask=mask_m)
