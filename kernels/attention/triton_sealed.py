"""Decode attention over sealed pages on integer tensor cores, one warp a program.

Codes are multiplied as they are: no key and no value is dequantised. The sixteen rows of
a tensor core's tile are eight query heads, times the high and the low byte of a
16-bit number v = 256 hi + lo, |v| <= 32639. As such come

    q      once, or where keys have a scale a channel once a run of tokens, as q * scale
    P      once a tile and run of channels: e^(score - the tile's greatest) * the value's
           scale, in steps of the power of two above the tile's greatest of both. The running
           maximum is not in it: tokens far below a sink would round to nothing

so that for the price of a 16-bit product both have 14 to 15 bits. Where scales are shared by runs
of a token's channels, keys' products are summed a run and scaled, values' have weights of their
own for each run. Where keys' are shared by 32 tokens, a tile is two halves of rows with a query
operand each.

A tile is 64 tokens: K
[tokens, D] and V [D, tokens] are the products' second operands, the axis that is
summed over last, which is how packing.py has them; `load_planes` gives planes of
codes. A plane of keys is every 4th (2nd) token, one of values a run of channels.

One warp has no barriers and reduces in registers. For q and P to become operands
without a detour through shared memory, values are computed where the tensor core wants
them: channels of q and rows of K are taken in the orders `chan` and `row`; what goes with
them is brought into these orders.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.base import Side
from kvmesh.kernels.formats.codebook.side import UNIFORM_STEP
from kvmesh.kernels.formats.packing_triton import packed_bytes
from kvmesh.kernels.formats.planes_triton import load_planes, unit
from kvmesh.kernels.formats.tiles_triton import from_bf16, from_e5m3

HEADS = 8  # of a program, padded
TOKENS = 64  # of a tile
# No number may be divided by less: 32639 / FLOOR is finite, and what is smaller weighs nothing.
FLOOR = tl.constexpr(2.0**-100)
# 1.5 * 2^23 + 128: of a number with this added the lowest bits are those of the nearest whole
# number + 128. With MAGIC * 2^k added they are those of the number over 2^k.
MAGIC = tl.constexpr(12583040.0)
LOG2_LARGEST = tl.constexpr(14.994309420105886)


# Numbers $2 to $5, of each the second byte and the first: bytes of $0 and of $1.
SPLIT_PTX = tl.constexpr("""{
    .reg .b32 a, b;
    prmt.b32 a, $2, $3, 0x5140;
    prmt.b32 b, $4, $5, 0x5140;
    prmt.b32 $0, a, b, 0x7632;
    prmt.b32 a, a, b, 0x5410;
    xor.b32 $1, a, 0x80808080;
}""")


@triton.constexpr_function
def grid_of(side: Side) -> str:
    """A grid along "channel" or "token" has scales and offsets, a "level" a scale a token."""
    return getattr(side, "along", "level")


@triton.constexpr_function
def planes_of(side: Side) -> int:
    return {8: 1, 4: 2, 3: 4, 2: 4}[side.width]


@triton.constexpr_function
def step_of(side: Side) -> float:
    """What scales are multiplied with."""
    return 1.0 if hasattr(side, "along") else UNIFORM_STEP[side.width]


@triton.constexpr_function
def middle_of(side: Side) -> float:
    """The code that stands for 0, or for the offset; 8-bit codes come less 128."""
    if hasattr(side, "along"):
        return 0.0
    return (2.0**side.width - 1.0) / 2.0


@triton.constexpr_function
def top_offset(side: Side) -> float:
    """What the last plane's numbers lack; of 8 bits a grid a token has it in its offset."""
    if side.width == 8:
        return 128.0 if grid_of(side) == "channel" else 0.0
    return 2.0 ** (side.width - 1)


@triton.constexpr_function
def channel_runs(side: Side, head_dim: int) -> int:
    """Runs of channels with a scale each, in a token."""
    return head_dim // side.run_length(TOKENS, head_dim) if grid_of(side) == "token" else 1


@triton.constexpr_function
def token_run(side: Side, page_size: int, head_dim: int) -> int:
    """Tokens that share a channel's scale."""
    return side.run_length(page_size, head_dim) if grid_of(side) == "channel" else page_size


@triton.jit
def _split(x, PTX: tl.constexpr):
    """Numbers with `_magic` added -> hi, lo of the nearest whole number, int8."""
    bits = x.to(tl.int32, bitcast=True)
    if PTX:
        return tl.inline_asm_elementwise(
            SPLIT_PTX, "=&r,=&r,r,r,r,r", [bits], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        return (bits >> 8).to(tl.int8), bits.to(tl.int8) ^ (-128)


@triton.jit
def _stack(hi, lo):
    """[HEADS, X] twice -> [2 HEADS, X]"""
    return tl.join(hi, lo).permute(2, 0, 1).reshape(2 * hi.shape[0], hi.shape[1])


@triton.jit
def _joined(x):
    """Products with hi and lo, [2 HEADS, X] int32 -> with the number, [HEADS, X] fp32"""
    hi, lo = tl.split(x.reshape(2, x.shape[0] // 2, x.shape[1]).permute(1, 2, 0))
    return (hi * 256 + lo).to(tl.float32)


@triton.jit
def _halves(x):
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _times(a, b):
    return tl.dot(a, tl.trans(b), out_dtype=tl.int32)


@triton.jit
def _products(a, planes, P: tl.constexpr, WIDTH: tl.constexpr):
    """a [2 HEADS, X] int8 -> sums over plane P's numbers, [HEADS, rows] fp32"""
    if WIDTH == 3:
        first, second = _halves(a)
        x = _times(first, planes[P])
        x = tl.dot(second, tl.trans(planes[4 + P]), x, out_dtype=tl.int32)
        return _joined(x)
    else:
        return _joined(_times(a, planes[P]))


@triton.jit
def _row_sums(a):
    """a [2 HEADS, X] int8 -> sums of the rows' numbers, [HEADS, 8] fp32: eight times the same, as
    products lie, so that they meet those without leaving their threads"""
    return _joined(_times(a, tl.full([8, a.shape[1]], 1, tl.int8)))


@triton.jit
def _column_sums(x):
    """[HEADS, X] -> every 8th column's sum, [HEADS, 8]: what a thread has of a row; what the others
    have is added when the loop is over"""
    return tl.sum(x.reshape(x.shape[0], x.shape[1] // 8, 8), 1)


@triton.jit
def _plus(x, sums):
    """x [HEADS, X] + sums [HEADS, 8], eight times the same"""
    parts = x.reshape(x.shape[0], x.shape[1] // 8, 8) + sums[:, None, :]
    return parts.reshape(x.shape[0], x.shape[1])


@triton.jit
def _scores(qq, planes, q_top, WIDTH: tl.constexpr, PLANES: tl.constexpr, TOP: tl.constexpr):
    """Products of queries with keys, [HEADS, PLANES * rows]: plane after plane, in units of codes.

    q_top: [HEADS, 8], sums of the queries, of which the last plane's numbers lack TOP times
    """
    x = _products(qq, planes, 0, WIDTH)
    H: tl.constexpr = x.shape[0]
    ROWS: tl.constexpr = x.shape[1]
    if PLANES == 1:
        s = x
        if TOP != 0.0:
            s = _plus(s, q_top * TOP)
    elif PLANES == 2:
        last = unit(_products(qq, planes, 1, WIDTH), 1, WIDTH)
        last = _plus(last, q_top * TOP)
        s = tl.join(x, last).permute(0, 2, 1).reshape(H, 2 * ROWS)
    else:
        s1 = unit(_products(qq, planes, 1, WIDTH), 1, WIDTH)
        s2 = unit(_products(qq, planes, 2, WIDTH), 2, WIDTH)
        last = unit(_products(qq, planes, 3, WIDTH), 3, WIDTH)
        last = _plus(last, q_top * TOP)
        s = tl.join(tl.join(x, s2), tl.join(s1, last)).reshape(H, ROWS, 4)
        s = s.permute(0, 2, 1).reshape(H, 4 * ROWS)
    return s


@triton.jit
def _side_by_side(first, second, PLANES: tl.constexpr):
    """Scores of two runs of tokens, as `_scores` gives them -> of both."""
    H: tl.constexpr = first.shape[0]
    X: tl.constexpr = first.shape[1]
    first = first.reshape(H, PLANES, X // PLANES)
    second = second.reshape(H, PLANES, X // PLANES)
    return tl.join(first, second).permute(0, 1, 3, 2).reshape(H, 2 * X)


@triton.jit
def _channels(x, R: tl.constexpr, RUNS: tl.constexpr):
    """[HEADS, D] -> run R of the channels"""
    if RUNS == 1:
        return x
    else:
        first, second = _halves(x)
        if 2 * R < RUNS:
            return _channels(first, R, RUNS // 2)
        else:
            return _channels(second, R - RUNS // 2, RUNS // 2)


@triton.jit
def _query_operand(q, D: tl.constexpr, PTX: tl.constexpr):
    """q [HEADS, D] fp32 in the order `chan`, magic added -> [2 HEADS, D] int8, in order"""
    hi, lo = _split(q, PTX)
    rows = _stack(hi, lo).reshape(2 * q.shape[0], D // 32, 4, 4, 2)
    return rows.permute(0, 1, 3, 2, 4).reshape(2 * q.shape[0], D)


@triton.jit
def _in_chan_order(x):
    """[X] in order -> in the order `chan`, which is also that of scores over 8-bit keys."""
    X: tl.constexpr = x.shape[0]
    return x.reshape(X // 32, 4, 4, 2).permute(0, 2, 1, 3).reshape(X)


@triton.jit
def _in_score_order(x, PLANES: tl.constexpr):
    """[TOKENS] in order -> as the columns of scores"""
    X: tl.constexpr = x.shape[0]
    if PLANES == 1:
        return _in_chan_order(x)
    elif PLANES == 2:
        return x.reshape(X // 32, 4, 2, 2, 2).permute(4, 0, 2, 1, 3).reshape(X)
    else:
        return x.reshape(X // 4, 4).permute(1, 0).reshape(X)


@triton.jit
def _weight_operand(w, PLANES: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr):
    """w [HEADS, TOKENS] fp32 as scores are ordered, magic added -> [2 HEADS, TOKENS] int8, in
    order"""
    H: tl.constexpr = 2 * w.shape[0]
    X: tl.constexpr = w.shape[1]
    if PARTS == 1:
        hi, lo = _split(w, PTX)
    else:
        # One run of tokens after the other: four numbers that make a word come together.
        w = w.reshape(H // 2, PLANES, 2, X // PLANES // 2)
        first, second = tl.split(w.permute(0, 1, 3, 2))
        hi, lo = _split(first, PTX)
        second_hi, second_lo = _split(second, PTX)
        hi = tl.join(hi, second_hi).permute(0, 1, 3, 2).reshape(H // 2, X)
        lo = tl.join(lo, second_lo).permute(0, 1, 3, 2).reshape(H // 2, X)
    pp = _stack(hi, lo)
    if PLANES == 1:
        pp = pp.reshape(H, X // 32, 4, 4, 2).permute(0, 1, 3, 2, 4)
    elif PLANES == 2:
        pp = pp.reshape(H, 2, X // 32, 2, 4, 2).permute(0, 2, 4, 3, 5, 1)
    else:
        pp = pp.reshape(H, 4, X // 4).permute(0, 2, 1)
    return pp.reshape(H, X)


@triton.jit
def _load_words(ptr, COUNT: tl.constexpr, SCALE: tl.constexpr):
    """COUNT stored numbers in order, as int32 of two or four."""
    words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(words_ptr + tl.arange(0, COUNT // (2 if SCALE == "bf16" else 4)))


@triton.jit
def _every(x, R: tl.constexpr, STEP: tl.constexpr):
    """[X] -> [X / STEP], those at R, R + STEP, ...; STEP a power of two"""
    if STEP == 1:
        return x
    else:
        even, odd = tl.split(x.reshape(x.shape[0] // 2, 2))
        if R % 2 == 0:
            return _every(even, R // 2, STEP // 2)
        else:
            return _every(odd, R // 2, STEP // 2)


@triton.jit
def _numbers(words, R: tl.constexpr, RUNS: tl.constexpr, SCALE: tl.constexpr):
    """Every RUNS-th number from R on, fp32 in order."""
    if SCALE == "e5m3":
        codes = (words[:, None] >> (tl.arange(0, 4) * 8)[None, :]).to(tl.int8)
        return from_e5m3(_every(codes.reshape(4 * words.shape[0]), R, RUNS))
    elif RUNS == 1:
        both = tl.join(words << 16, words & -65536).reshape(2 * words.shape[0])
        return both.to(tl.float32, bitcast=True)
    else:
        word = _every(words, R // 2, RUNS // 2)
        word = word << 16 if R % 2 == 0 else word & -65536
        return word.to(tl.float32, bitcast=True)


@triton.jit
def _power_above(words, R: tl.constexpr, RUNS: tl.constexpr, SCALE: tl.constexpr):
    """The power of two above every RUNS-th scale from R on, as far as MAGIC times it is normal."""
    if SCALE == "e5m3":
        codes = (words[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 255
        most = tl.max(_every(codes.reshape(4 * words.shape[0]), R, RUNS), 0)
        exponent = (most >> 3) + 108
    else:
        if RUNS == 1:
            most = tl.max(tl.maximum(words & 0x7FFF, words >> 16), 0)
        else:
            word = _every(words, R // 2, RUNS // 2)
            most = tl.max(word & 0x7FFF if R % 2 == 0 else word >> 16, 0)
        exponent = (most >> 7) + 1
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exact_operand(q, DTYPE: tl.constexpr):
    """q [HEADS, D] fp32 in the order `chan` -> [2 HEADS, D] of the numbers that it had, below them
    zeros; in the order in which a thread's numbers are an operand's."""
    q = q.to(DTYPE)
    q = _stack(q, tl.zeros_like(q)).reshape(2 * q.shape[0], q.shape[1] // 16, 2, 4, 2)
    return q.permute(0, 1, 3, 2, 4).reshape(q.shape[0], q.shape[1] * 16)


@triton.jit
def _shifts(q, offset_ptr, offs_d, PARTS: tl.constexpr, HEADS: tl.constexpr):
    """Products of queries, as `_exact_operand` gives them, with keys' offsets [PARTS, D], bf16
    -> [HEADS, 8], column r that of part r % PARTS"""
    D: tl.constexpr = offs_d.shape[0]
    bits_ptr = offset_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    bits = tl.load(bits_ptr + tl.arange(0, PARTS)[:, None] * D + offs_d[None, :])
    bits = bits.reshape(PARTS, D // 32, 4, 2, 4).permute(0, 1, 3, 2, 4).reshape(PARTS, D)
    if q.dtype == tl.bfloat16:
        offsets = bits.to(tl.bfloat16, bitcast=True)
    else:
        offsets = from_bf16(bits).to(q.dtype)
    offsets = tl.broadcast_to(offsets[None, :, :], [8 // PARTS, PARTS, D]).reshape(8, D)
    x = tl.dot(q, tl.trans(offsets), input_precision="ieee")
    x, _ = tl.split(x.reshape(2, HEADS, 8).permute(1, 2, 0))
    return x


@triton.jit
def _part_columns(x, R: tl.constexpr, PARTS: tl.constexpr):
    """x [HEADS, 8] as `_shifts` gives it -> part R's number in all columns; PARTS is 2"""
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    one = even if R == 0 else odd
    return tl.broadcast_to(one[:, :, None], [x.shape[0], x.shape[1] // 2, 2]).reshape(x.shape)


@triton.jit
def _run_weights(
    p,
    keep,
    gain,
    scales,
    offsets,
    acc_offset,
    weight_sum,
    R: tl.constexpr,
    RUNS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    WANTS_SUM: tl.constexpr,
    SIDE: tl.constexpr,
    K_PLANES: tl.constexpr,
    K_PARTS: tl.constexpr,
    PTX: tl.constexpr,
):
    """The weights of the values' run R as an operand, what products with it are multiplied with,
    and the sums over all tiles of weights times offsets and of weights.

    p: [HEADS, TOKENS]; keep, gain: [HEADS], of what was summed before and of this tile
    """
    power = _power_above(scales, R, RUNS, SIDE.scale)
    scale = _in_score_order(_numbers(scales, R, RUNS, SIDE.scale), K_PLANES)
    if HAS_OFFSET:
        offset = _in_score_order(_numbers(offsets, R, RUNS, "bf16"), K_PLANES)
        if SIDE.width == 8:
            offset = tl.fma(scale, tl.full(scale.shape, 128.0, tl.float32), offset)
        sums = _column_sums(p * offset[None, :])
        acc_offset = acc_offset * keep[:, None] + sums * gain[:, None]
    w = _weight_operand(p * scale[None, :] + power * MAGIC, K_PLANES, K_PARTS, PTX)
    gain = gain * (power * step_of(SIDE))
    if WANTS_SUM:
        weight_sum = weight_sum * keep[:, None] + _row_sums(w) * gain[:, None]
    return w, gain, acc_offset, weight_sum


@triton.jit
def _outputs(acc, acc_offset, weight_sum, P: tl.constexpr, SIDE: tl.constexpr):
    """Sums over plane P's numbers -> over the values, [HEADS, channels]"""
    MIDDLE: tl.constexpr = middle_of(SIDE)
    x = unit(acc, P, SIDE.width) + (acc_offset - weight_sum * MIDDLE)[:, None]
    PLANES: tl.constexpr = planes_of(SIDE)
    if P + 1 == PLANES:
        TOP: tl.constexpr = top_offset(SIDE)
        x += (weight_sum * TOP)[:, None]
    return x


@triton.jit
def sealed_kernel(
    q_ptr,
    sealed_ptr,
    out_ptr,
    lse_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    rows_ptr,
    sealed_tables_ptr,
    prefix_pages_ptr,
    stride_table,
    stride_split,
    qk_scale,
    softcap,
    sink_pages,
    recent_pages,
    num_splits,
    K_SIDE: tl.constexpr,
    V_SIDE: tl.constexpr,
    K_BYTES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    HAS_PREFIXES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MIN_TILES: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
):
    """Program (split, KV head and eight of its query heads, sequence with one new token).

    out, lse: partial, fp32 [num_splits, num_seqs, num_heads, HEAD_DIM] and without
        HEAD_DIM; where a split has no tile, lse is -inf and out is not written
    HAS_PREFIXES: a sequence's first prefix_pages sealed pages are another kernel's
    """
    D: tl.constexpr = HEAD_DIM
    LARGEST: tl.constexpr = 32639.0  # 127 * 256 + 127
    K_WIDTH: tl.constexpr = K_SIDE.width
    V_WIDTH: tl.constexpr = V_SIDE.width
    K_PLANES: tl.constexpr = planes_of(K_SIDE)
    V_PLANES: tl.constexpr = planes_of(V_SIDE)
    MODE: tl.constexpr = grid_of(K_SIDE)
    K_TOP: tl.constexpr = top_offset(K_SIDE)
    V_TOP: tl.constexpr = top_offset(V_SIDE)
    K_MIDDLE: tl.constexpr = middle_of(K_SIDE)
    V_MIDDLE: tl.constexpr = middle_of(V_SIDE)
    V_OFFSET: tl.constexpr = grid_of(V_SIDE) != "level"
    # Keys: runs of channels, and runs of tokens, of which a tile has K_PARTS.
    K_RUNS: tl.constexpr = channel_runs(K_SIDE, D)
    K_RUN: tl.constexpr = token_run(K_SIDE, PAGE_SIZE, D)
    K_PARTS: tl.constexpr = max(1, TOKENS // K_RUN)
    # Values: a plane has V_PARTS runs of channels, or a run several planes.
    V_RUNS: tl.constexpr = channel_runs(V_SIDE, D)
    V_PARTS: tl.constexpr = max(1, V_RUNS // V_PLANES)
    V_PIECES: tl.constexpr = V_PLANES * V_PARTS
    SCALED: tl.constexpr = HAS_SOFTCAP or K_PARTS > 1  # scores, before they are compared
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    BLOCKS: tl.constexpr = PAGE_SIZE // TOKENS
    K_CODES: tl.constexpr = packed_bytes(K_WIDTH, PAGE_SIZE, D)
    V_CODES: tl.constexpr = packed_bytes(V_WIDTH, PAGE_SIZE, D)
    K_TABLE: tl.constexpr = TOKENS * D // K_PLANES
    V_TABLE: tl.constexpr = TOKENS * D // V_PLANES
    K_SCALE_BYTES: tl.constexpr = 2 if K_SIDE.scale == "bf16" else 1
    V_SCALE_BYTES: tl.constexpr = 2 if V_SIDE.scale == "bf16" else 1

    split = tl.program_id(0)
    head = tl.program_id(1) // PARTS
    part = tl.program_id(1) % PARTS
    seq = tl.program_id(2)
    query_start = tl.load(query_starts_ptr + seq)
    seq_len = tl.load(seq_lens_ptr + seq)
    first_page = sink_pages
    if HAS_PREFIXES:
        first_page += tl.load(prefix_pages_ptr + seq)
    num_pages = (seq_len - 1) // PAGE_SIZE - recent_pages - first_page
    num_tiles = tl.maximum(num_pages, 0) * BLOCKS
    per_split = tl.maximum((num_tiles + num_splits - 1) // num_splits, MIN_TILES)
    tile_from = split * per_split
    tile_end = tl.minimum(tile_from + per_split, num_tiles)

    offs_g = tl.arange(0, HEADS)
    group_head = part * HEADS + offs_g
    mask_g = group_head < GROUP
    q_head = head * GROUP + group_head
    out_row = split.to(tl.int64) * stride_split + seq * NUM_HEADS + q_head
    if tl.load(query_starts_ptr + seq + 1) - query_start == 1:
        if tile_from < tile_end:
            offs_d = tl.arange(0, D)
            offs_m = tl.arange(0, 2 * HEADS)
            # The queries, twice, where the tensor core puts products: a product with
            # the identity brings them there.
            chan = (offs_d // 32) * 32 + (offs_d // 2 % 4) * 8 + (offs_d // 8 % 4) * 2 + offs_d % 2
            m_head = part * HEADS + offs_m % HEADS
            q_row = query_start.to(tl.int64) * NUM_HEADS + head * GROUP + m_head
            at = q_row[:, None] * D + chan[None, :]
            q = tl.load(q_ptr + at, mask=(m_head < GROUP)[:, None], other=0.0)
            one = (offs_m[:, None] == offs_m[None, :]).to(q.dtype)
            q = tl.dot(one, q, input_precision="ieee")
            q, _ = tl.split(q.reshape(2, HEADS, D).permute(1, 2, 0))
            if K_PARTS > 1:
                q_exact = _exact_operand(q, one.dtype)
            q_most = tl.maximum(tl.max(tl.abs(q), 1), FLOOR)
            q_scale = q_most * (qk_scale * (step_of(K_SIDE) / LARGEST))
            q_whole = q * (LARGEST / q_most)[:, None]
            q_sum = tl.sum(q_whole, 1)
            q_sums, qqs = (), ()
            if MODE != "channel":
                for r in tl.static_range(K_RUNS):
                    q_run = _channels(q_whole, r, K_RUNS)
                    q_sums = q_sums + (tl.sum(q_run, 1),)  # noqa: RUF005
                    qq = _query_operand(q_run + MAGIC, D // K_RUNS, PTX)
                    qqs = qqs + (qq,)  # noqa: RUF005

            accs, acc_offsets, weight_sums = (), (), ()
            for _ in tl.static_range(V_PIECES):
                accs = accs + (tl.zeros([HEADS, D // V_PIECES], tl.float32),)  # noqa: RUF005
            for _ in tl.static_range(V_RUNS):
                acc_offsets = acc_offsets + (tl.zeros([HEADS, 8], tl.float32),)  # noqa: RUF005
                weight_sums = weight_sums + (tl.zeros([HEADS, 8], tl.float32),)  # noqa: RUF005
            top = tl.full([HEADS], float("-inf"), tl.float32)
            total = tl.zeros([HEADS, 8], tl.float32)

            ROWS: tl.constexpr = TOKENS // K_PLANES // K_PARTS
            offs_r = tl.arange(0, ROWS)
            offs_v = tl.arange(0, D // V_PIECES)
            if K_PLANES == 1:
                row = (
                    (offs_r // 32) * 32 + (offs_r // 2 % 4) * 8 + (offs_r // 8 % 4) * 2 + offs_r % 2
                )
            elif K_PLANES == 2:
                row = (
                    (offs_r // 16) * 16 + (offs_r // 2 % 4) * 4 + (offs_r // 8 % 2) * 2 + offs_r % 2
                )
            else:
                row = offs_r

            table_ptr = sealed_tables_ptr + tl.load(rows_ptr + seq).to(tl.int64) * stride_table
            table_ptr += first_page
            for tile in tl.range(tile_from, tile_end, num_stages=STAGES):
                page = tl.load(table_ptr + tile // BLOCKS).to(tl.int64)
                block = tile % BLOCKS
                k_ptr = sealed_ptr + (page * NUM_KV_HEADS + head) * PAGE_BYTES
                v_ptr = k_ptr + K_BYTES
                k_numbers_ptr = k_ptr + K_CODES
                v_numbers_ptr = v_ptr + V_CODES
                k_high_ptr = k_ptr + PAGE_SIZE * D // 4 + block * (TOKENS * D // 8)
                k_codes_ptr = k_ptr + block * K_TABLE
                kks = ()
                for r in tl.static_range(K_RUNS):
                    x = load_planes(
                        k_codes_ptr + r * (D // K_RUNS),
                        k_high_ptr,
                        row,
                        D,
                        D // K_RUNS,
                        K_WIDTH,
                        PTX,
                    )
                    kks = kks + (x,)  # noqa: RUF005
                for r in tl.static_range(1, K_PARTS):
                    x = load_planes(k_codes_ptr, k_high_ptr, r * ROWS + row, D, D, K_WIDTH, PTX)
                    kks = kks + (x,)  # noqa: RUF005
                # Scales and offsets are asked for first, and in the order they lie in.
                first = block * TOKENS
                if V_OFFSET:  # | offsets [PAGE_SIZE, V_RUNS] | scales [PAGE_SIZE, V_RUNS] |
                    v_offset_ptr = v_numbers_ptr + 2 * V_RUNS * first
                    v_offset = _load_words(v_offset_ptr, TOKENS * V_RUNS, "bf16")
                    v_numbers_ptr += 2 * V_RUNS * PAGE_SIZE
                v_numbers_ptr += V_SCALE_BYTES * V_RUNS * first
                v_scale = _load_words(v_numbers_ptr, TOKENS * V_RUNS, V_SIDE.scale)
                if not V_OFFSET:
                    v_offset = v_scale
                if MODE == "token":
                    k_offset_ptr = k_numbers_ptr + 2 * K_RUNS * first
                    k_offset = _load_words(k_offset_ptr, TOKENS * K_RUNS, "bf16")
                    k_numbers_ptr += 2 * K_RUNS * PAGE_SIZE
                if MODE != "channel":
                    k_numbers_ptr += K_SCALE_BYTES * K_RUNS * first
                    k_scale = _load_words(k_numbers_ptr, TOKENS * K_RUNS, K_SIDE.scale)
                # Scores in the tile's order.
                tile_scale = q_scale
                if MODE == "channel":  # | offsets [runs, D] | scales [runs, D] |
                    run = first // K_RUN
                    k_offset_ptr = k_numbers_ptr + 2 * D * run
                    k_numbers_ptr += 2 * D * PAGE_SIZE // K_RUN + K_SCALE_BYTES * D * run
                    if K_PARTS == 1:
                        k_offset = _load_words(k_offset_ptr, D, "bf16")
                    else:
                        shifts = _shifts(q_exact, k_offset_ptr, offs_d, K_PARTS, HEADS) * qk_scale
                    for r in tl.static_range(K_PARTS):
                        k_scale_ptr = k_numbers_ptr + r * K_SCALE_BYTES * D
                        k_scale = _load_words(k_scale_ptr, D, K_SIDE.scale)
                        power = _power_above(k_scale, 0, 1, K_SIDE.scale)
                        k_scale = _in_chan_order(_numbers(k_scale, 0, 1, K_SIDE.scale))
                        qq = _query_operand(q_whole * k_scale[None, :] + power * MAGIC, D, PTX)
                        tile_scale = q_scale * power
                        x = _scores(qq, kks[r], _row_sums(qq), K_WIDTH, K_PLANES, K_TOP)
                        if r == 0:
                            s = x
                        if K_PARTS > 1:
                            x = _plus(x * tile_scale[:, None], _part_columns(shifts, r, K_PARTS))
                            s = x if r == 0 else _side_by_side(s, x, K_PLANES)
                    if K_PARTS == 1:
                        k_offset = _in_chan_order(_numbers(k_offset, 0, 1, "bf16"))
                        shift = tl.sum(q_whole * k_offset[None, :], 1) * q_scale
                        if HAS_SOFTCAP:
                            s = s * tile_scale[:, None] + shift[:, None]
                elif MODE == "level":
                    q_top = tl.broadcast_to(q_sum[:, None], [HEADS, 8])
                    s = _scores(qqs[0], kks[0], q_top, K_WIDTH, K_PLANES, K_TOP)
                    s = s - q_sum[:, None] * K_MIDDLE
                    k_scale = _in_score_order(_numbers(k_scale, 0, 1, K_SIDE.scale), K_PLANES)
                    s = s * k_scale[None, :]
                else:
                    for r in tl.static_range(K_RUNS):
                        q_top = tl.broadcast_to(q_sums[r][:, None], [HEADS, 8])
                        x = _scores(qqs[r], kks[r], q_top, K_WIDTH, K_PLANES, K_TOP)
                        scale = _numbers(k_scale, r, K_RUNS, K_SIDE.scale)
                        scale = _in_score_order(scale, K_PLANES)
                        offset = _in_score_order(_numbers(k_offset, r, K_RUNS, "bf16"), K_PLANES)
                        if K_WIDTH == 8:
                            offset = tl.fma(scale, tl.full([TOKENS], 128.0, tl.float32), offset)
                        scale = tl.broadcast_to(scale[None, :], [HEADS, TOKENS])
                        if r == 0:
                            s = x * scale
                        else:
                            s = tl.fma(x, scale, s)
                        s = tl.fma(
                            tl.broadcast_to(offset[None, :], [HEADS, TOKENS]),
                            tl.broadcast_to(q_sums[r][:, None], [HEADS, TOKENS]),
                            s,
                        )
                if HAS_SOFTCAP:
                    if MODE != "channel":
                        s = s * tile_scale[:, None]
                    s = (2.0 * tl.sigmoid(s * (2.0 / softcap)) - 1.0) * (
                        softcap * 1.4426950408889634
                    )
                if SCALED:
                    tile_top = tl.max(s, 1)
                    p = tl.exp2(s + -(tile_top - LOG2_LARGEST)[:, None])
                else:
                    tile_top = tl.max(s, 1) * tile_scale
                    p = tl.exp2(
                        tl.fma(
                            s,
                            tl.broadcast_to(tile_scale[:, None], [HEADS, TOKENS]),
                            tl.broadcast_to(-(tile_top - LOG2_LARGEST)[:, None], [HEADS, TOKENS]),
                        )
                    )
                    if MODE == "channel":
                        tile_top += shift
                new_top = tl.maximum(top, tile_top)
                keep = tl.exp2(top - new_top)
                gain = tl.exp2(tile_top - new_top)
                total = total * keep[:, None] + _column_sums(p) * gain[:, None]
                top = new_top

                v_high_ptr = v_ptr + PAGE_SIZE * D // 4 + block * (TOKENS * D // 8)
                v_codes_ptr = v_ptr + block * V_TABLE
                new_accs, new_offsets, new_sums = (), (), ()
                for j in tl.static_range(V_PARTS):
                    vv = load_planes(
                        v_codes_ptr,
                        v_high_ptr,
                        j * (D // V_PIECES) + offs_v,
                        TOKENS,
                        TOKENS,
                        V_WIDTH,
                        PTX,
                    )
                    for i in tl.static_range(V_PLANES):
                        if V_PARTS > 1 or i * V_RUNS % V_PIECES == 0:
                            pp, run_gain, offset, weights = _run_weights(
                                p,
                                keep,
                                gain,
                                v_scale,
                                v_offset,
                                acc_offsets[(j * V_PLANES + i) * V_RUNS // V_PIECES],
                                weight_sums[(j * V_PLANES + i) * V_RUNS // V_PIECES],
                                (i * V_PARTS + j) * V_RUNS // V_PIECES,
                                V_RUNS,
                                V_OFFSET,
                                V_MIDDLE != 0.0
                                or (V_TOP != 0.0 and i + max(1, V_PLANES // V_RUNS) == V_PLANES),
                                V_SIDE,
                                K_PLANES,
                                K_PARTS,
                                PTX,
                            )
                            new_offsets = new_offsets + (offset,)  # noqa: RUF005
                            new_sums = new_sums + (weights,)  # noqa: RUF005
                        x = _products(pp, vv, i, V_WIDTH)
                        x = tl.fma(
                            x,
                            tl.broadcast_to(run_gain[:, None], x.shape),
                            accs[j * V_PLANES + i] * keep[:, None],
                        )
                        new_accs = new_accs + (x,)  # noqa: RUF005
                accs, acc_offsets, weight_sums = new_accs, new_offsets, new_sums

            total = tl.sum(total, 1)
            norm = 1.0 / total
            for j in tl.static_range(V_PARTS):
                for i in tl.static_range(V_PLANES):
                    x = _outputs(
                        accs[j * V_PLANES + i],
                        tl.sum(acc_offsets[(j * V_PLANES + i) * V_RUNS // V_PIECES], 1),
                        tl.max(weight_sums[(j * V_PLANES + i) * V_RUNS // V_PIECES], 1),
                        i,
                        V_SIDE,
                    )
                    channel = (i * V_PARTS + j) * (D // V_PIECES) + offs_v
                    at = out_row[:, None] * D + channel[None, :]
                    mask = tl.broadcast_to(mask_g[:, None], at.shape)
                    tl.store(out_ptr + at, x * norm[:, None], mask=mask)
            lse = (top - LOG2_LARGEST + tl.log2(total)) * 0.6931471805599453
            tl.store(lse_ptr + out_row, lse, mask=mask_g)
        else:
            tl.store(lse_ptr + out_row, tl.full([HEADS], float("-inf"), tl.float32), mask=mask_g)
