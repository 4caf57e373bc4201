"""Decode attention over sealed pages on integer tensor cores, with one warp per program.

Codes are multiplied without dequantising any key or value. The sixteen rows of a tensor
core's tile are eight query heads, once times the high byte and once times the low byte of a
16-bit number v = 256 hi + lo, |v| <= 32639. These numbers are

    q      quantised once, or, if keys have a scale per channel, once per tile as q * scale
    P      quantised once per tile: e^(score - the tile's maximum) * the value's scale, in steps of
           the power of two above the tile's maximum of both. The running maximum is left out:
           tokens far below a sink would be rounded to 0

so both have 14 to 15 bits for the cost of a 16-bit product.

A tile is 64 tokens: K [tokens, D] and V [D, tokens] are the second operands of the products.
The axis that is summed over comes last, which is the layout of packing.py; `load_planes` gives
planes of codes. A plane of keys is every 4th (2nd) token, a plane of values a run of channels.

A single warp needs no barriers and reduces in registers. To turn q and P into operands
without going through shared memory, values are computed where the tensor core expects
them: channels of q and rows of K are taken in the orders `chan` and `row`, and all related
numbers are permuted into the same orders.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.attention.triton_operands import (
    LOG2_LARGEST,
    MAGIC,
    column_sums,
    in_chan_order,
    in_score_order,
    products,
    query_operand,
    row_sums,
    scores,
    weight_operand,
)
from kvmesh.kernels.attention.triton_parts import page_of
from kvmesh.kernels.attention.triton_sides import (
    grid_of,
    load_words,
    middle_of,
    numbers,
    power_above,
    scale_bytes,
    step_of,
    top_offset,
)
from kvmesh.kernels.formats.packing_triton import packed_bytes
from kvmesh.kernels.formats.planes_triton import load_planes, planes_of, unit

HEADS = 8  # per program, padded
# Lower bound of divisors: 32639 / FLOOR is finite, and smaller numbers have no weight.
FLOOR = tl.constexpr(2.0**-100)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def integer_part(
    q_ptr,
    out_ptr,
    lse_ptr,
    query,
    out_row,
    pages,
    heads,
    from_page,
    end_page,
    softmax,
    FORM: tl.constexpr,
):
    """Sealed pages [from_page, end_page), at least one, of a decoding sequence whose new token is
    row `query` of q, for the part-th eight query heads of a KV head.

    heads: (KV head, part)
    out, lse: fp32 [rows, query heads, HEAD_DIM] and without HEAD_DIM; row out_row / query heads
    is written
    """
    head, part = heads
    _, sealed_ptr, _, table_ptr = pages
    HEADS: tl.constexpr = FORM.heads
    BLOCKS: tl.constexpr = FORM.page_size // FORM.block_n
    K_PLANES: tl.constexpr = planes_of(FORM.k_side.width)
    V_PLANES: tl.constexpr = planes_of(FORM.v_side.width)
    queries = _queries(q_ptr, query, head, part, softmax, FORM)

    accs = ()
    for _ in tl.static_range(V_PLANES):
        accs = accs + (tl.zeros([HEADS, FORM.head_dim // V_PLANES], tl.float32),)  # noqa: RUF005
    acc_offset = tl.zeros([HEADS, 8], tl.float32)
    weight_sum = tl.zeros([HEADS, 8], tl.float32)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS, 8], tl.float32)

    offs_r = tl.arange(0, FORM.block_n // K_PLANES)
    offs_v = tl.arange(0, FORM.head_dim // V_PLANES)
    if K_PLANES == 1:
        row = (offs_r // 32) * 32 + (offs_r // 2 % 4) * 8 + (offs_r // 8 % 4) * 2 + offs_r % 2
    elif K_PLANES == 2:
        row = (offs_r // 16) * 16 + (offs_r // 2 % 4) * 4 + (offs_r // 8 % 2) * 2 + offs_r % 2
    else:
        row = offs_r

    for tile in tl.range(from_page * BLOCKS, end_page * BLOCKS, num_stages=FORM.stages):
        page = page_of(table_ptr, tile // BLOCKS)
        block = tile % BLOCKS
        k_ptr = sealed_ptr + (page * FORM.num_kv_heads + head) * FORM.page_bytes
        v_ptr = k_ptr + FORM.k_bytes
        k_planes = load_planes(k_ptr, block, row, FORM.k_side, FORM)
        # Scales and offsets are loaded first, in the order in which they lie.
        v_offset, v_scale = _load_grid(v_ptr, block, FORM.v_side, FORM)
        k_offset, k_scale = _load_grid(k_ptr, block, FORM.k_side, FORM)
        p, tile_top = _tile_weights(queries, k_planes, k_offset, k_scale, softmax, FORM)
        new_top = tl.maximum(top, tile_top)
        keep = tl.exp2(top - new_top)
        gain = tl.exp2(tile_top - new_top)
        total = total * keep[:, None] + column_sums(p) * gain[:, None]
        top = new_top

        v_planes = load_planes(v_ptr, block, offs_v, FORM.v_side, FORM)
        pp, gain, acc_offset, weight_sum = _value_weights(
            p, keep, gain, v_scale, v_offset, acc_offset, weight_sum, FORM
        )
        new_accs = ()
        for i in tl.static_range(V_PLANES):
            x = products(pp, v_planes, i, FORM.v_side.width)
            x = tl.fma(x, tl.broadcast_to(gain[:, None], x.shape), accs[i] * keep[:, None])
            new_accs = new_accs + (x,)  # noqa: RUF005
        accs = new_accs

    group_head = part * HEADS + tl.arange(0, HEADS)
    mask_g = group_head < FORM.group
    out_row = out_row + head * FORM.group + group_head
    total = tl.sum(total, 1)
    norm = 1.0 / total
    for i in tl.static_range(V_PLANES):
        x = _outputs(accs[i], tl.sum(acc_offset, 1), tl.max(weight_sum, 1), i, FORM.v_side)
        channel = i * (FORM.head_dim // V_PLANES) + offs_v
        at = out_row[:, None] * FORM.head_dim + channel[None, :]
        tl.store(out_ptr + at, x * norm[:, None], mask=tl.broadcast_to(mask_g[:, None], at.shape))
    lse = (top - LOG2_LARGEST + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + out_row, lse, mask=mask_g)


@triton.jit
def _queries(q_ptr, query, head, part, softmax, FORM: tl.constexpr):
    """(numbers [HEADS, D] in the order `chan`, their sums, their step times the scores' scale, and,
    for keys with a scale per token, the operand)"""
    D: tl.constexpr = FORM.head_dim
    HEADS: tl.constexpr = FORM.heads
    LARGEST: tl.constexpr = 32639.0  # 127 * 256 + 127
    offs_d = tl.arange(0, D)
    offs_m = tl.arange(0, 2 * HEADS)
    # The queries, twice, in the layout of the tensor core's results, which a product
    # with the identity produces.
    chan = (offs_d // 32) * 32 + (offs_d // 2 % 4) * 8 + (offs_d // 8 % 4) * 2 + offs_d % 2
    m_head = part * HEADS + offs_m % HEADS
    q_row = query * FORM.num_heads + head * FORM.group + m_head
    at = q_row[:, None] * D + chan[None, :]
    q = tl.load(q_ptr + at, mask=(m_head < FORM.group)[:, None], other=0.0)
    one = (offs_m[:, None] == offs_m[None, :]).to(q.dtype)
    q = tl.dot(one, q, input_precision="ieee")
    q, _ = tl.split(q.reshape(2, HEADS, D).permute(1, 2, 0))
    q_max = tl.maximum(tl.max(tl.abs(q), 1), FLOOR)
    q_scale = q_max * (softmax[0] / LARGEST)
    whole = q * (LARGEST / q_max)[:, None]
    if grid_of(FORM.k_side) == "channel":
        return whole, whole, q_scale, whole
    else:
        return whole, tl.sum(whole, 1), q_scale, query_operand(whole + MAGIC, D, FORM.ptx)


@triton.jit
def _load_grid(part_ptr, block, SIDE: tl.constexpr, FORM: tl.constexpr):
    """Words of a block's offsets (of its scales if there are none) and scales"""
    ptr = part_ptr + packed_bytes(SIDE.width, FORM.page_size, FORM.head_dim)
    if grid_of(SIDE) == "channel":  # | offsets [D] | scales [D] |
        offset = load_words(ptr, FORM.head_dim, "bf16")
        return offset, load_words(ptr + 2 * FORM.head_dim, FORM.head_dim, SIDE.scale)
    else:
        first = block * FORM.block_n
        if grid_of(SIDE) == "token":  # | offsets [PAGE_SIZE] | scales [PAGE_SIZE] |
            offset = load_words(ptr + 2 * first, FORM.block_n, "bf16")
            scale_ptr = ptr + 2 * FORM.page_size + scale_bytes(SIDE) * first
            return offset, load_words(scale_ptr, FORM.block_n, SIDE.scale)
        else:
            scale = load_words(ptr + scale_bytes(SIDE) * first, FORM.block_n, SIDE.scale)
            return scale, scale


@triton.jit
def _tile_weights(queries, planes, offset, scale, softmax, FORM: tl.constexpr):
    """p [HEADS, TOKENS]: 32639 times 2^(score - the tile's maximum), in the order of scores; and
    the maximum"""
    whole, q_sum, q_scale, qq = queries
    SIDE: tl.constexpr = FORM.k_side
    PLANES: tl.constexpr = planes_of(SIDE.width)
    TOP: tl.constexpr = top_offset(SIDE)
    H: tl.constexpr = FORM.heads
    X: tl.constexpr = FORM.block_n
    CHANNEL: tl.constexpr = grid_of(SIDE) == "channel"
    if CHANNEL:
        power = power_above(scale, SIDE.scale)
        scale = in_chan_order(numbers(scale, SIDE.scale))
        qq = query_operand(whole * scale[None, :] + power * MAGIC, FORM.head_dim, FORM.ptx)
        tile_scale = q_scale * power
        s = scores(qq, planes, row_sums(qq), SIDE.width, PLANES, TOP)
        offset = in_chan_order(numbers(offset, "bf16"))
        shift = tl.sum(whole * offset[None, :], 1) * q_scale
        if FORM.has_softcap:
            s = s * tile_scale[:, None] + shift[:, None]
    else:
        q_top = tl.broadcast_to(q_sum[:, None], [H, 8])
        x = scores(qq, planes, q_top, SIDE.width, PLANES, TOP)
        scale = in_score_order(numbers(scale, SIDE.scale), PLANES)
        offset = in_score_order(numbers(offset, "bf16"), PLANES)
        if SIDE.width == 8:
            offset = tl.fma(scale, tl.full([X], 128.0, tl.float32), offset)
        s = x * tl.broadcast_to(scale[None, :], [H, X])
        q_sums = tl.broadcast_to(q_sum[:, None], [H, X])
        s = tl.fma(tl.broadcast_to(offset[None, :], [H, X]), q_sums, s)
        tile_scale = q_scale
        if FORM.has_softcap:
            s = s * tile_scale[:, None]
    if FORM.has_softcap:
        softcap = softmax[1]
        s = (2.0 * tl.sigmoid(s * (2.0 / softcap)) - 1.0) * (softcap * LOG2_E)
        tile_top = tl.max(s, 1)
        return tl.exp2(s - (tile_top - LOG2_LARGEST)[:, None]), tile_top
    else:
        tile_top = tl.max(s, 1) * tile_scale
        factor = tl.broadcast_to(tile_scale[:, None], [H, X])
        p = tl.exp2(tl.fma(s, factor, tl.broadcast_to(-(tile_top - LOG2_LARGEST)[:, None], [H, X])))
        if CHANNEL:
            tile_top += shift
        return p, tile_top


@triton.jit
def _value_weights(p, keep, gain, scale, offset, acc_offset, weight_sum, FORM: tl.constexpr):
    """The weights of the values as an operand, the factor of products with it, and the
    sums over all tiles of weights times offsets and of weights.

    p: from `_tile_weights`; keep, gain: [HEADS], factors of the previous sums and of this tile
    """
    SIDE: tl.constexpr = FORM.v_side
    K_PLANES: tl.constexpr = planes_of(FORM.k_side.width)
    power = power_above(scale, SIDE.scale)
    if grid_of(SIDE) == "token":
        scales = in_score_order(numbers(scale, SIDE.scale), K_PLANES)
        offsets = in_score_order(numbers(offset, "bf16"), K_PLANES)
        if SIDE.width == 8:
            offsets = tl.fma(scales, tl.full(scales.shape, 128.0, tl.float32), offsets)
        sums = column_sums(p * offsets[None, :])
        acc_offset = acc_offset * keep[:, None] + sums * gain[:, None]
    else:
        scales = in_score_order(numbers(scale, SIDE.scale), K_PLANES)
    w = weight_operand(p * scales[None, :] + power * MAGIC, K_PLANES, FORM.ptx)
    gain = gain * (power * step_of(SIDE))
    if middle_of(SIDE) != 0.0 or top_offset(SIDE) != 0.0:
        weight_sum = weight_sum * keep[:, None] + row_sums(w) * gain[:, None]
    return w, gain, acc_offset, weight_sum


@triton.jit
def _outputs(acc, acc_offset, weight_sum, P: tl.constexpr, SIDE: tl.constexpr):
    """Sums over the numbers of plane P -> sums over the values, [HEADS, channels]"""
    MIDDLE: tl.constexpr = middle_of(SIDE)
    x = unit(acc, P, SIDE.width) + (acc_offset - weight_sum * MIDDLE)[:, None]
    LAST: tl.constexpr = planes_of(SIDE.width) - 1
    if P == LAST:
        TOP: tl.constexpr = top_offset(SIDE)
        x += (weight_sum * TOP)[:, None]
    return x
