"""Decode attention over sealed pages on integer tensor cores, one warp a program.

Codes are multiplied as they are: no key and no value is dequantised. The sixteen rows of
a tensor core's tile are eight query heads, times the high and the low byte of a
16-bit number v = 256 hi + lo, |v| <= 32639. As such come

    q      once, or where keys have a scale a channel once a page, as q * scale
    P      once a tile: e^(score - the tile's greatest) * the value's scale, relative to
           the tile's greatest of both. The running maximum is not in it: tokens far
           below a sink would round to nothing

so that for the price of a 16-bit product both have 15 bits. A tile is 64 tokens: K
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
from kvmesh.kernels.formats.tiles_triton import as_int16, from_bf16, from_e5m3

HEADS = 8  # of a program, padded
TOKENS = 64  # of a tile
# No number may be divided by less: 32639 / FLOOR is finite, and what is smaller weighs nothing.
FLOOR = tl.constexpr(2.0**-100)


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
    """What the last plane's numbers lack."""
    return 0.0 if side.width == 8 else 2.0 ** (side.width - 1)


@triton.jit
def _split(x):
    """fp32, |x| <= 32639 -> hi, lo of the nearest whole number: with 1.5 * 2^23 + 128 added its
    lowest bits are those of the number + 128."""
    bits = (x + 12583040.0).to(tl.int32, bitcast=True)
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
def _query_operand(q, D: tl.constexpr):
    """q [HEADS, D] fp32 in the order `chan` -> [2 HEADS, D] int8, channels in order"""
    hi, lo = _split(q)
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
def _load_stored(ptr, COUNT: tl.constexpr, SCALE: tl.constexpr):
    """[COUNT] stored numbers in order, int16 or int8; bytes by words, or they would not be
    fetched ahead."""
    if SCALE == "bf16":
        return tl.load(as_int16(ptr) + tl.arange(0, COUNT))
    else:
        words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        words = tl.load(words_ptr + tl.arange(0, COUNT // 4))
        return (words[:, None] >> (tl.arange(0, 4) * 8)[None, :]).to(tl.int8).reshape(COUNT)


@triton.jit
def _numbers(stored, SCALE: tl.constexpr):
    if SCALE == "bf16":
        return from_bf16(stored)
    else:
        return from_e5m3(stored)


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
            q_most = tl.maximum(tl.max(tl.abs(q), 1), FLOOR)
            q_scale = q_most * (qk_scale * (step_of(K_SIDE) / LARGEST))
            q_whole = q * (LARGEST / q_most)[:, None]
            q_sum = tl.sum(q_whole, 1)
            if MODE != "channel":
                qq = _query_operand(q_whole, D)

            accs = ()
            for _ in tl.static_range(V_PLANES):
                accs = accs + (tl.zeros([HEADS, D // V_PLANES], tl.float32),)  # noqa: RUF005
            acc_offset = tl.zeros([HEADS], tl.float32)
            weight_sum = tl.zeros([HEADS], tl.float32)
            top = tl.full([HEADS], float("-inf"), tl.float32)
            total = tl.zeros([HEADS], tl.float32)

            ROWS: tl.constexpr = TOKENS // K_PLANES
            offs_r = tl.arange(0, ROWS)
            offs_v = tl.arange(0, D // V_PLANES)
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
            for tile in range(tile_from, tile_end):
                page = tl.load(table_ptr + tile // BLOCKS).to(tl.int64)
                block = tile % BLOCKS
                k_ptr = sealed_ptr + (page * NUM_KV_HEADS + head) * PAGE_BYTES
                v_ptr = k_ptr + K_BYTES
                k_numbers_ptr = k_ptr + K_CODES
                v_numbers_ptr = v_ptr + V_CODES
                kk = load_planes(
                    k_ptr + block * K_TABLE,
                    k_ptr + PAGE_SIZE * D // 4 + block * (TOKENS * D // 8),
                    row,
                    D,
                    K_WIDTH,
                    PTX,
                )
                # Scales and offsets are asked for first, and in the order they lie in.
                first = block * TOKENS
                if V_OFFSET:  # | offsets [PAGE_SIZE] | scales [PAGE_SIZE] |
                    v_offset = _load_stored(v_numbers_ptr + 2 * first, TOKENS, "bf16")
                    v_numbers_ptr += 2 * PAGE_SIZE
                v_numbers_ptr += V_SCALE_BYTES * first
                v_scale = _load_stored(v_numbers_ptr, TOKENS, V_SIDE.scale)
                if MODE == "token":
                    k_offset = _load_stored(k_numbers_ptr + 2 * first, TOKENS, "bf16")
                    k_numbers_ptr += 2 * PAGE_SIZE
                if MODE != "channel":
                    k_numbers_ptr += K_SCALE_BYTES * first
                    k_scale = _load_stored(k_numbers_ptr, TOKENS, K_SIDE.scale)
                if MODE == "channel":  # | offsets [D] | scales [D] |
                    k_offset = _load_stored(k_numbers_ptr, D, "bf16")
                    page_scale, u = _channel_scales(k_numbers_ptr + 2 * D, D, K_SIDE.scale)
                    qq = _query_operand(q_whole * u[None, :], D)
                    tile_scale = q_scale * page_scale
                    q_tops = tl.full([8, D], 1, tl.int8)
                    q_top = tl.max(_joined(_times(qq, q_tops)), 1)
                else:
                    tile_scale = q_scale
                    q_top = q_sum
                # Scores in the tile's order.
                if K_PLANES == 1:
                    s = _products(qq, kk, 0, K_WIDTH)
                elif K_PLANES == 2:
                    low = unit(_products(qq, kk, 0, K_WIDTH), 0, K_WIDTH)
                    high = unit(_products(qq, kk, 1, K_WIDTH), 1, K_WIDTH)
                    high += q_top[:, None] * K_TOP
                    s = tl.join(low, high).permute(0, 2, 1).reshape(HEADS, TOKENS)
                else:
                    s0 = unit(_products(qq, kk, 0, K_WIDTH), 0, K_WIDTH)
                    s1 = unit(_products(qq, kk, 1, K_WIDTH), 1, K_WIDTH)
                    s2 = unit(_products(qq, kk, 2, K_WIDTH), 2, K_WIDTH)
                    s3 = unit(_products(qq, kk, 3, K_WIDTH), 3, K_WIDTH)
                    s3 += q_top[:, None] * K_TOP
                    s = tl.join(tl.join(s0, s2), tl.join(s1, s3)).reshape(HEADS, ROWS, 4)
                    s = s.permute(0, 2, 1).reshape(HEADS, TOKENS)
                if MODE == "channel" and K_WIDTH == 8:
                    s += q_top[:, None] * 128.0
                if MODE == "level":
                    s = s - q_top[:, None] * K_MIDDLE
                    k_scale = _numbers(_in_score_order(k_scale, K_PLANES), K_SIDE.scale)
                    s = s * k_scale[None, :]
                elif MODE == "token":
                    k_scale = _numbers(_in_score_order(k_scale, K_PLANES), K_SIDE.scale)
                    k_offset = from_bf16(_in_score_order(k_offset, K_PLANES))
                    if K_WIDTH == 8:
                        k_offset = tl.fma(k_scale, tl.full([TOKENS], 128.0, tl.float32), k_offset)
                    s = s * k_scale[None, :]
                    s = tl.fma(
                        tl.broadcast_to(k_offset[None, :], [HEADS, TOKENS]),
                        tl.broadcast_to(q_sum[:, None], [HEADS, TOKENS]),
                        s,
                    )
                if MODE == "channel":
                    k_offset = from_bf16(_in_chan_order(k_offset))
                    shift = tl.sum(q_whole * k_offset[None, :], 1) * q_scale
                if HAS_SOFTCAP:
                    s = s * tile_scale[:, None]
                    if MODE == "channel":
                        s += shift[:, None]
                    s = (2.0 * tl.sigmoid(s * (2.0 / softcap)) - 1.0) * (
                        softcap * 1.4426950408889634
                    )
                    tile_top = tl.max(s, 1)
                    p = tl.exp2(s - tile_top[:, None])
                else:
                    tile_top = tl.max(s, 1) * tile_scale
                    p = tl.exp2(
                        tl.fma(
                            s,
                            tl.broadcast_to(tile_scale[:, None], [HEADS, TOKENS]),
                            tl.broadcast_to(-tile_top[:, None], [HEADS, TOKENS]),
                        )
                    )
                    if MODE == "channel":
                        tile_top += shift
                new_top = tl.maximum(top, tile_top)
                keep = tl.exp2(top - new_top)
                gain = tl.exp2(tile_top - new_top)
                total = total * keep + tl.sum(p, 1) * gain
                top = new_top

                vv = load_planes(
                    v_ptr + block * V_TABLE,
                    v_ptr + PAGE_SIZE * D // 4 + block * (TOKENS * D // 8),
                    offs_v,
                    TOKENS,
                    V_WIDTH,
                    PTX,
                )
                v_scale = _numbers(_in_score_order(v_scale, K_PLANES), V_SIDE.scale)
                if V_OFFSET:
                    v_offset = from_bf16(_in_score_order(v_offset, K_PLANES))
                    if V_WIDTH == 8:
                        v_offset = tl.fma(v_scale, tl.full([TOKENS], 128.0, tl.float32), v_offset)
                    acc_offset = acc_offset * keep + tl.sum(p * v_offset[None, :], 1) * gain
                v_most = tl.maximum(tl.max(v_scale, 0), FLOOR)
                w = p * (v_scale * (LARGEST / v_most))[None, :]
                gain = gain * (v_most * (step_of(V_SIDE) / LARGEST))
                if V_WIDTH != 8:
                    weight_sum = weight_sum * keep + tl.sum(w, 1) * gain
                hi, lo = _split(w)
                pp = _stack(hi, lo)
                if K_PLANES == 1:
                    pp = pp.reshape(2 * HEADS, TOKENS // 32, 4, 4, 2).permute(0, 1, 3, 2, 4)
                elif K_PLANES == 2:
                    pp = pp.reshape(2 * HEADS, 2, TOKENS // 32, 2, 4, 2).permute(0, 2, 4, 3, 5, 1)
                else:
                    pp = pp.reshape(2 * HEADS, 4, TOKENS // 4).permute(0, 2, 1)
                pp = pp.reshape(2 * HEADS, TOKENS)
                new_accs = ()
                for i in tl.static_range(V_PLANES):
                    x = _products(pp, vv, i, V_WIDTH)
                    x = tl.fma(x, tl.broadcast_to(gain[:, None], x.shape), accs[i] * keep[:, None])
                    new_accs = new_accs + (x,)  # noqa: RUF005
                accs = new_accs

            norm = 1.0 / total
            acc_offset -= weight_sum * V_MIDDLE
            for i in tl.static_range(V_PLANES):
                x = unit(accs[i], i, V_WIDTH) + acc_offset[:, None]
                if i == V_PLANES - 1:
                    x += (weight_sum * V_TOP)[:, None]
                at = out_row[:, None] * D + (i * (D // V_PLANES) + offs_v)[None, :]
                mask = tl.broadcast_to(mask_g[:, None], at.shape)
                tl.store(out_ptr + at, x * norm[:, None], mask=mask)
            lse = (top + tl.log2(total)) * 0.6931471805599453
            tl.store(lse_ptr + out_row, lse, mask=mask_g)
        else:
            tl.store(lse_ptr + out_row, tl.full([HEADS], float("-inf"), tl.float32), mask=mask_g)


@triton.jit
def _channel_scales(scales_ptr, D: tl.constexpr, SCALE: tl.constexpr):
    """A page's scales [D] as S and u, in the order `chan`: scale = S u, u <= 1, so that q u fits
    into 15 bits whatever the page."""
    if SCALE == "e5m3":
        # (8 + m) 2^(e - 23) has the biased exponent e + 107. S is 2^(e - 19), e that of the
        # greatest scale: dividing by it is less exponent.
        codes = tl.load(scales_ptr + tl.arange(0, D))
        e = tl.max(codes.to(tl.int32) & 255, 0) >> 3
        page_scale = ((e + 108) << 23).to(tl.float32, bitcast=True)
        codes = _in_chan_order(codes).to(tl.int32) & 255
        u = ((codes << 20) + ((126 - e) << 23)).to(tl.float32, bitcast=True)
        return page_scale, u
    else:
        stored = _load_stored(scales_ptr, D, "bf16")
        page_scale = tl.maximum(tl.max(from_bf16(stored), 0), FLOOR)
        return page_scale, from_bf16(_in_chan_order(stored)) * (1.0 / page_scale)
