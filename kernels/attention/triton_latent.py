"""The kernel of attention over latents: one KV head, whose values are a part of its keys.

A program has a block of heads of one query, and a part of the pages that it reads. A tile of keys
is loaded once, in two pieces, and used twice:

    channels   | 0 … VALUES     | VALUES … HEAD_DIM |
    scores     q · k          + q · k
    output     weights · k

As all heads read the same keys, a program of 16 heads does 16 times as much with a byte as
attention with a KV head for each: products are the bound, and decoding codes costs little.

FORM is a `LatentForm` (latent_form.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.attention.triton_parts import columns_below, first_of, page_of
from kvmesh.kernels.formats.fp8.triton import from_e4m3
from kvmesh.kernels.formats.tiles_triton import load_bf16


@triton.jit
def _codes(part_ptr, slots, channels, mask, FORM: tl.constexpr):
    """A tile of a sealed page in the layout of keys of `packing.py`, fp32: codes or numbers."""
    if FORM.width == 4:  # two tokens in a byte; the upper one's highest bit is stored flipped
        byte_ptr = part_ptr + (slots // 2)[:, None] * FORM.head_dim + channels[None, :]
        byte = tl.load(byte_ptr, mask=mask, other=0).to(tl.int32)
        upper = (slots % 2)[:, None]
        return (((byte >> (upper * 4)) & 15) ^ (upper * 8)).to(tl.float32)
    byte_ptr = part_ptr + slots[:, None] * FORM.head_dim + channels[None, :]
    byte = tl.load(byte_ptr, mask=mask, other=0)
    if FORM.code == "e4m3":
        return from_e4m3(byte, tl.float32)
    return byte.to(tl.float32) + 128.0  # stored minus 128


@triton.jit
def _sealed_tile(part_ptr, slots, channels, mask, DTYPE: tl.constexpr, FORM: tl.constexpr):
    """[tokens, channels] of a sealed page, in DTYPE"""
    NUMBERS: tl.constexpr = FORM.page_size * FORM.head_dim
    if FORM.code == "dense":
        number_ptr = part_ptr.to(tl.pointer_type(DTYPE), bitcast=True)
        at = slots[:, None] * FORM.head_dim + channels[None, :]
        return tl.load(number_ptr + at, mask=mask, other=0.0)
    x = _codes(part_ptr, slots, channels, mask, FORM)
    if FORM.code == "e4m3":
        centre = load_bf16(part_ptr + NUMBERS, channels, channels < FORM.head_dim)
        scale_ptr = part_ptr + NUMBERS + 2 * FORM.head_dim
        scale = tl.load(scale_ptr.to(tl.pointer_type(tl.float32), bitcast=True))
        return (x * scale + centre[None, :]).to(DTYPE)
    offset_ptr = part_ptr + NUMBERS * FORM.width // 8
    offset = load_bf16(offset_ptr, slots)
    scale = load_bf16(offset_ptr + 2 * FORM.page_size, slots)
    # Codes decode to finite numbers, which channels that do not exist have to be as well.
    return tl.where(mask, x * scale[:, None] + offset[:, None], 0.0).to(DTYPE)


@triton.jit
def _tile(page_ptr, slots, channels, HOT: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr):
    TOKENS: tl.constexpr = FORM.block_n
    mask = tl.broadcast_to((channels < FORM.head_dim)[None, :], [TOKENS, channels.shape[0]])
    if HOT:
        at = slots[:, None] * FORM.head_dim + channels[None, :]
        return tl.load(page_ptr + at, mask=mask, other=0.0)
    return _sealed_tile(page_ptr, slots, channels, mask, DTYPE, FORM)


@triton.jit
def _attend(
    q,
    state,
    pages_ptr,
    table_ptr,
    first,
    position,
    from_column,
    end_column,
    qk_scale,
    HOT: tl.constexpr,
    FORM: tl.constexpr,
):
    """Adds the pages of these columns to the state of a running softmax.

    q: (of the values' channels [heads, block_v], of the others [heads, block_r])
    state: (acc [heads, block_v], top [heads], total [heads]), fp32; scores are base-2 logarithms
    """
    q_values, q_rest = q
    acc, top, total = state
    DTYPE: tl.constexpr = q_values.dtype
    TILES: tl.constexpr = FORM.page_size // FORM.block_n
    BYTES: tl.constexpr = FORM.page_size * FORM.head_dim if HOT else FORM.page_bytes
    offs_n = tl.arange(0, FORM.block_n)
    of_values = tl.arange(0, FORM.block_v)
    of_rest = FORM.values + tl.arange(0, FORM.block_r)
    for tile in range(from_column * TILES, end_column * TILES):
        column = tile // TILES
        slots = tile % TILES * FORM.block_n + offs_n
        page_ptr = pages_ptr + page_of(table_ptr, column) * BYTES
        k_values = _tile(page_ptr, slots, of_values, HOT, DTYPE, FORM)
        k_rest = _tile(page_ptr, slots, of_rest, HOT, DTYPE, FORM)
        keys = (first + FORM.stride * column) * FORM.page_size + slots
        seen = keys <= position
        # Slots after the last token may hold anything, and 0 * NaN is NaN.
        k_values = tl.where(seen[:, None], k_values, 0.0)
        scores = tl.dot(q_values, tl.trans(k_values), input_precision="ieee")
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * qk_scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(weights, 1)
        acc = acc * keep[:, None]
        acc = tl.dot(weights.to(DTYPE), k_values, acc, input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["part_columns"])
def latent_kernel(
    q_ptr,
    hot_ptr,
    sealed_ptr,
    out_ptr,
    lse_ptr,
    tokens_ptr,
    seqs_ptr,
    batch,
    stride_table,
    stride_q_token,
    stride_q_head,
    part_columns,
    qk_scale,
    FORM: tl.constexpr,
):
    """Program (row and a block of heads, part).

    tokens, seqs: of each row, its row of q and its sequence; batch: `BatchPointers`
    part_columns: of a part, in columns of the tables
    qk_scale: makes base-2 logarithms of products
    out: [parts, rows, num_heads, values], lse: [parts, rows, num_heads]; parts without a key have
        0 and -inf
    """
    BLOCKS: tl.constexpr = (FORM.num_heads + FORM.heads - 1) // FORM.heads
    row = tl.program_id(0) // BLOCKS
    part = tl.program_id(1)
    num_rows = tl.num_programs(0) // BLOCKS
    token = tl.load(tokens_ptr + row).to(tl.int64)
    seq = tl.load(seqs_ptr + row)
    end_query = tl.load(batch.query_starts + seq + 1)
    position = tl.load(batch.seq_lens + seq) - end_query + token.to(tl.int32)
    first = first_of(batch, seq, FORM)
    heads = tl.program_id(0) % BLOCKS * FORM.heads + tl.arange(0, FORM.heads)
    offs_v = tl.arange(0, FORM.block_v)
    offs_r = FORM.values + tl.arange(0, FORM.block_r)
    mask_h = (heads < FORM.num_heads)[:, None]
    q_row_ptr = q_ptr + token * stride_q_token + heads[:, None] * stride_q_head
    mask_v = mask_h & (offs_v < FORM.values)[None, :]
    q_values = tl.load(q_row_ptr + offs_v[None, :], mask=mask_v, other=0.0)
    mask_r = mask_h & (offs_r < FORM.head_dim)[None, :]
    q_rest = tl.load(q_row_ptr + offs_r[None, :], mask=mask_r, other=0.0)
    q = (q_values, q_rest)

    page = position // FORM.page_size
    end = columns_below(page + 1, first, FORM)
    sink = tl.minimum(columns_below(FORM.sink_pages, first, FORM), end)
    recent_page = tl.maximum(page - FORM.recent_pages, FORM.sink_pages)
    recent = tl.maximum(tl.minimum(columns_below(recent_page, first, FORM), end), sink)
    start = part * part_columns
    stop = tl.minimum(start + part_columns, end)
    table_row = tl.load(batch.rows + seq).to(tl.int64) * stride_table
    hot_table_ptr = batch.hot_tables + table_row
    sealed_table_ptr = batch.sealed_tables + table_row

    HEADS: tl.constexpr = FORM.heads
    BLOCK_V: tl.constexpr = FORM.block_v
    acc = tl.zeros([HEADS, BLOCK_V], tl.float32)
    # Not -inf: a tile may have no key that is seen, and inf - inf is NaN.
    top = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    state = (acc, top, total)
    # | sink, hot | sealed | recent, hot |, of which this part has the columns from start to stop
    a, b = start, tl.minimum(stop, sink)
    state = _attend(q, state, hot_ptr, hot_table_ptr, first, position, a, b, qk_scale, True, FORM)
    a, b = tl.maximum(start, sink), tl.minimum(stop, recent)
    state = _attend(
        q, state, sealed_ptr, sealed_table_ptr, first, position, a, b, qk_scale, False, FORM
    )
    a, b = tl.maximum(start, recent), stop
    state = _attend(q, state, hot_ptr, hot_table_ptr, first, position, a, b, qk_scale, True, FORM)

    acc, top, total = state
    some = total > 0.0
    share = 1.0 / tl.where(some, total, 1.0)
    out_row = ((part * num_rows + row) * FORM.num_heads + heads).to(tl.int64)
    out = (acc * share[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row[:, None] * FORM.values + offs_v[None, :], out, mask=mask_v)
    lse = (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453
    lse = tl.where(some, lse, float("-inf"))
    tl.store(lse_ptr + out_row, lse, mask=heads < FORM.num_heads)
