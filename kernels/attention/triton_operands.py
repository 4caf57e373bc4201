"""Queries and weights as operands of integer tensor cores, and the results of their products.

A 16-bit number v = 256 hi + lo, |v| <= 32639, is stored as two rows of int8; the row of low
bytes lies eight rows below that of high bytes. Orders and shapes are chosen so that all data
stays in a thread's registers, see `triton_sealed.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.planes_triton import unit

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
def weight_operand(w, PLANES: tl.constexpr, PTX: tl.constexpr):
    """w [HEADS, TOKENS] fp32 in the order of scores, magic added -> [2 HEADS, TOKENS] int8, in
    natural order"""
    H: tl.constexpr = 2 * w.shape[0]
    X: tl.constexpr = w.shape[1]
    hi, lo = split(w, PTX)
    pp = stack(hi, lo)
    if PLANES == 1:
        pp = pp.reshape(H, X // 32, 4, 4, 2).permute(0, 1, 3, 2, 4)
    elif PLANES == 2:
        pp = pp.reshape(H, 2, X // 32, 2, 4, 2).permute(0, 2, 4, 3, 5, 1)
    else:
        pp = pp.reshape(H, 4, X // 4).permute(0, 2, 1)
    return pp.reshape(H, X)
