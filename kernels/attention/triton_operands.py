"""Queries and weights as operands of integer tensor cores, and the results of their products.

A 16-bit number v = 256 hi + lo, |v| <= 32639, is stored as two rows of int8; the row of low
bytes lies eight rows below that of high bytes. Orders and shapes are chosen so that all data
stays in a thread's registers, see `triton_sealed.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.planes_triton import unit
from kvmesh.kernels.formats.tiles_triton import from_bf16

# 1.5 * 2^23 + 128. The lowest bits of x + MAGIC are those of x + 128 rounded to an integer.
# The lowest bits of x + MAGIC * 2^k are those of x / 2^k + 128, rounded.
MAGIC = tl.constexpr(12583040.0)
LOG2_LARGEST = tl.constexpr(14.994309420105886)


# The second and first bytes of the numbers $2 to $5 go to $0 and $1.
SPLIT_PTX = tl.constexpr("""{
    .reg .b32 a, b;
    prmt.b32 a, $2, $3, 0x5140;
    prmt.b32 b, $4, $5, 0x5140;
    prmt.b32 $0, a, b, 0x7632;
    prmt.b32 a, a, b, 0x5410;
    xor.b32 $1, a, 0x80808080;
}""")


@triton.jit
def split(x, PTX: tl.constexpr):
    """Numbers with `_magic` added -> hi, lo of the nearest integer, int8."""
    bits = x.to(tl.int32, bitcast=True)
    if PTX:
        return tl.inline_asm_elementwise(
            SPLIT_PTX, "=&r,=&r,r,r,r,r", [bits], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        return (bits >> 8).to(tl.int8), bits.to(tl.int8) ^ (-128)


@triton.jit
def stack(hi, lo):
    """[HEADS, X] twice -> [2 HEADS, X]"""
    return tl.join(hi, lo).permute(2, 0, 1).reshape(2 * hi.shape[0], hi.shape[1])


@triton.jit
def joined(x):
    """Products with hi and lo, [2 HEADS, X] int32 -> products with v, [HEADS, X] fp32"""
    hi, lo = tl.split(x.reshape(2, x.shape[0] // 2, x.shape[1]).permute(1, 2, 0))
    return (hi * 256 + lo).to(tl.float32)


@triton.jit
def halves(x):
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def times(a, b):
    return tl.dot(a, tl.trans(b), out_dtype=tl.int32)


@triton.jit
def products(a, planes, P: tl.constexpr, WIDTH: tl.constexpr):
    """a [2 HEADS, X] int8 -> sums over the numbers of plane P, [HEADS, rows] fp32"""
    if WIDTH == 3:
        first, second = halves(a)
        x = times(first, planes[P])
        x = tl.dot(second, tl.trans(planes[4 + P]), x, out_dtype=tl.int32)
        return joined(x)
    else:
        return joined(times(a, planes[P]))


@triton.jit
def row_sums(a):
    """a [2 HEADS, X] int8 -> the sum of each row, [HEADS, 8] fp32: repeated eight times in the
    layout of products, so that no data moves between threads"""
    return joined(times(a, tl.full([8, a.shape[1]], 1, tl.int8)))


@triton.jit
def column_sums(x):
    """[HEADS, X] -> the sums of every 8th column, [HEADS, 8]: each thread's part of a row; the
    parts are added up after the loop"""
    return tl.sum(x.reshape(x.shape[0], x.shape[1] // 8, 8), 1)


@triton.jit
def plus(x, sums):
    """x [HEADS, X] + sums [HEADS, 8], whose columns are equal"""
    parts = x.reshape(x.shape[0], x.shape[1] // 8, 8) + sums[:, None, :]
    return parts.reshape(x.shape[0], x.shape[1])


@triton.jit
def scores(qq, planes, q_top, WIDTH: tl.constexpr, PLANES: tl.constexpr, TOP: tl.constexpr):
    """Products of queries with keys, [HEADS, PLANES * rows]: plane by plane, in units of codes.

    q_top: [HEADS, 8], sums of the queries; the last plane's numbers are too small by TOP
    """
    x = products(qq, planes, 0, WIDTH)
    H: tl.constexpr = x.shape[0]
    ROWS: tl.constexpr = x.shape[1]
    if PLANES == 1:
        s = x
        if TOP != 0.0:
            s = plus(s, q_top * TOP)
    elif PLANES == 2:
        last = unit(products(qq, planes, 1, WIDTH), 1, WIDTH)
        last = plus(last, q_top * TOP)
        s = tl.join(x, last).permute(0, 2, 1).reshape(H, 2 * ROWS)
    else:
        s1 = unit(products(qq, planes, 1, WIDTH), 1, WIDTH)
        s2 = unit(products(qq, planes, 2, WIDTH), 2, WIDTH)
        last = unit(products(qq, planes, 3, WIDTH), 3, WIDTH)
        last = plus(last, q_top * TOP)
        s = tl.join(tl.join(x, s2), tl.join(s1, last)).reshape(H, ROWS, 4)
        s = s.permute(0, 2, 1).reshape(H, 4 * ROWS)
    return s


@triton.jit
def side_by_side(first, second, PLANES: tl.constexpr):
    """Scores of two runs of tokens, from `scores` -> scores of both."""
    H: tl.constexpr = first.shape[0]
    X: tl.constexpr = first.shape[1]
    first = first.reshape(H, PLANES, X // PLANES)
    second = second.reshape(H, PLANES, X // PLANES)
    return tl.join(first, second).permute(0, 1, 3, 2).reshape(H, 2 * X)


@triton.jit
def channels(x, R: tl.constexpr, RUNS: tl.constexpr):
    """[HEADS, D] -> channels of run R"""
    if RUNS == 1:
        return x
    else:
        first, second = halves(x)
        if 2 * R < RUNS:
            return channels(first, R, RUNS // 2)
        else:
            return channels(second, R - RUNS // 2, RUNS // 2)


@triton.jit
def query_operand(q, D: tl.constexpr, PTX: tl.constexpr):
    """q [HEADS, D] fp32 in the order `chan`, magic added -> [2 HEADS, D] int8, in natural order"""
    hi, lo = split(q, PTX)
    rows = stack(hi, lo).reshape(2 * q.shape[0], D // 32, 4, 4, 2)
    return rows.permute(0, 1, 3, 2, 4).reshape(2 * q.shape[0], D)


@triton.jit
def in_chan_order(x):
    """[X] in natural order -> in the order `chan`, which is also that of scores over 8-bit keys."""
    X: tl.constexpr = x.shape[0]
    return x.reshape(X // 32, 4, 4, 2).permute(0, 2, 1, 3).reshape(X)


@triton.jit
def in_score_order(x, PLANES: tl.constexpr):
    """[TOKENS] in natural order -> in the column order of scores"""
    X: tl.constexpr = x.shape[0]
    if PLANES == 1:
        return in_chan_order(x)
    elif PLANES == 2:
        return x.reshape(X // 32, 4, 2, 2, 2).permute(4, 0, 2, 1, 3).reshape(X)
    else:
        return x.reshape(X // 4, 4).permute(1, 0).reshape(X)


@triton.jit
def weight_operand(w, PLANES: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr):
    """w [HEADS, TOKENS] fp32 in the order of scores, magic added -> [2 HEADS, TOKENS] int8, in
    natural order"""
    H: tl.constexpr = 2 * w.shape[0]
    X: tl.constexpr = w.shape[1]
    if PARTS == 1:
        hi, lo = split(w, PTX)
    else:
        # One run of tokens after the other: the four numbers of a word are combined.
        w = w.reshape(H // 2, PLANES, 2, X // PLANES // 2)
        first, second = tl.split(w.permute(0, 1, 3, 2))
        hi, lo = split(first, PTX)
        second_hi, second_lo = split(second, PTX)
        hi = tl.join(hi, second_hi).permute(0, 1, 3, 2).reshape(H // 2, X)
        lo = tl.join(lo, second_lo).permute(0, 1, 3, 2).reshape(H // 2, X)
    pp = stack(hi, lo)
    if PLANES == 1:
        pp = pp.reshape(H, X // 32, 4, 4, 2).permute(0, 1, 3, 2, 4)
    elif PLANES == 2:
        pp = pp.reshape(H, 2, X // 32, 2, 4, 2).permute(0, 2, 4, 3, 5, 1)
    else:
        pp = pp.reshape(H, 4, X // 4).permute(0, 2, 1)
    return pp.reshape(H, X)


@triton.jit
def exact_operand(q, DTYPE: tl.constexpr):
    """q [HEADS, D] fp32 in the order `chan` -> [2 HEADS, D]: the original numbers with zeros below
    them, in the order in which a thread holds an operand."""
    q = q.to(DTYPE)
    q = stack(q, tl.zeros_like(q)).reshape(2 * q.shape[0], q.shape[1] // 16, 2, 4, 2)
    return q.permute(0, 1, 3, 2, 4).reshape(q.shape[0], q.shape[1] * 16)


@triton.jit
def offset_products(q, offset_ptr, offs_d, PARTS: tl.constexpr, HEADS: tl.constexpr):
    """Products of queries, from `exact_operand`, with the keys' offsets [PARTS, D], bf16
    -> [HEADS, 8], column r for part r % PARTS"""
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
def part_columns(x, R: tl.constexpr, PARTS: tl.constexpr):
    """x [HEADS, 8] from `offset_products` -> part R's number in all columns; PARTS is 2"""
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    one = even if R == 0 else odd
    return tl.broadcast_to(one[:, :, None], [x.shape[0], x.shape[1] // 2, 2]).reshape(x.shape)
