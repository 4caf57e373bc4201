"""Decode attention over sealed pages on integer tensor cores, with one warp per program.

Codes are multiplied without dequantising any key or value. The sixteen rows of a tensor
core's tile are eight query heads, once times the high byte and once times the low byte of a
16-bit number v = 256 hi + lo, |v| <= 32639. These numbers are

    q      quantised once, or, if keys have a scale per channel, once per run of tokens as
           q * scale
    P      quantised once per tile and run of channels: e^(score - the tile's maximum) * the
           value's scale, in steps of the power of two above the tile's maximum of both. The
           running maximum is left out: tokens far below a sink would be rounded to 0

so both have 14 to 15 bits for the cost of a 16-bit product. If runs of a token's channels share
scales, the keys' products are summed and scaled per run, and the values get separate weights
for each run. If 32 tokens share the keys' scales, a tile is two halves of rows, each with its
own query operand.

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
    channels,
    column_sums,
    exact_operand,
    in_chan_order,
    in_score_order,
    offset_products,
    part_columns,
    plus,
    products,
    query_operand,
    row_sums,
    scores,
    side_by_side,
    weight_operand,
)
from kvmesh.kernels.attention.triton_sides import (
    channel_runs,
    grid_of,
    load_words,
    middle_of,
    numbers,
    planes_of,
    power_above,
    scale_bytes,
    step_of,
    token_run,
    top_offset,
)
from kvmesh.kernels.formats.packing_triton import packed_bytes
from kvmesh.kernels.formats.planes_triton import load_planes, unit

HEADS = 8  # per program, padded
# Lower bound of divisors: 32639 / FLOOR is finite, and smaller numbers have no weight.
FLOOR = tl.constexpr(2.0**-100)


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
    """The weights of the values' run R as an operand, the factor of products with it, and the
    sums over all tiles of weights times offsets and of weights.

    p: [HEADS, TOKENS]; keep, gain: [HEADS], factors of the previous sums and of this tile
    """
    if grid_of(SIDE) == "constant":
        w = weight_operand(p + MAGIC, K_PLANES, K_PARTS, PTX)
    else:
        power = power_above(scales, R, RUNS, SIDE.scale)
        scale = in_score_order(numbers(scales, R, RUNS, SIDE.scale), K_PLANES)
        if HAS_OFFSET:
            offset = in_score_order(numbers(offsets, R, RUNS, "bf16"), K_PLANES)
            if SIDE.width == 8:
                offset = tl.fma(scale, tl.full(scale.shape, 128.0, tl.float32), offset)
            sums = column_sums(p * offset[None, :])
            acc_offset = acc_offset * keep[:, None] + sums * gain[:, None]
        w = weight_operand(p * scale[None, :] + power * MAGIC, K_PLANES, K_PARTS, PTX)
        gain = gain * (power * step_of(SIDE))
    if WANTS_SUM:
        weight_sum = weight_sum * keep[:, None] + row_sums(w) * gain[:, None]
    return w, gain, acc_offset, weight_sum


@triton.jit
def _outputs(acc, acc_offset, weight_sum, P: tl.constexpr, SIDE: tl.constexpr):
    """Sums over the numbers of plane P -> sums over the values, [HEADS, channels]"""
    MIDDLE: tl.constexpr = middle_of(SIDE)
    x = unit(acc, P, SIDE.width) + (acc_offset - weight_sum * MIDDLE)[:, None]
    PLANES: tl.constexpr = planes_of(SIDE)
    if P + 1 == PLANES:
        TOP: tl.constexpr = top_offset(SIDE)
        x += (weight_sum * TOP)[:, None]
    return x


@triton.jit
def integer_part(
    q_ptr,
    out_ptr,
    lse_ptr,
    query,
    out_row,
    pages,
    tables,
    head,
    part,
    from_page,
    end_page,
    softmax,
    FORM: tl.constexpr,
):
    """Sealed pages [from_page, end_page), at least one, of a decoding sequence whose new token is
    row `query` of q, for the part-th eight query heads of a KV head.

    out, lse: fp32 [rows, query heads, HEAD_DIM] and without HEAD_DIM; row out_row / query heads
    is written
    """
    qk_scale, softcap, _ = softmax
    _, sealed_ptr, _, table_ptr = pages
    k_table_ptr, v_table_ptr = tables
    K_SIDE: tl.constexpr = FORM.k_side
    V_SIDE: tl.constexpr = FORM.v_side
    K_BYTES: tl.constexpr = FORM.k_bytes
    PAGE_BYTES: tl.constexpr = FORM.page_bytes
    HAS_SOFTCAP: tl.constexpr = FORM.has_softcap
    NUM_KV_HEADS: tl.constexpr = FORM.num_kv_heads
    GROUP: tl.constexpr = FORM.group
    PAGE_SIZE: tl.constexpr = FORM.page_size
    D: tl.constexpr = FORM.head_dim
    HEADS: tl.constexpr = FORM.heads
    TOKENS: tl.constexpr = FORM.block_n
    PTX: tl.constexpr = FORM.ptx
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
    V_MODE: tl.constexpr = grid_of(V_SIDE)
    V_OFFSET: tl.constexpr = V_MODE == "token"
    # Keys: runs of channels, and runs of tokens, of which a tile has K_PARTS.
    K_RUNS: tl.constexpr = channel_runs(K_SIDE, D)
    K_RUN: tl.constexpr = token_run(K_SIDE, PAGE_SIZE, D)
    K_PARTS: tl.constexpr = max(1, TOKENS // K_RUN)
    # Values: a plane has V_PARTS runs of channels, or a run several planes.
    V_RUNS: tl.constexpr = channel_runs(V_SIDE, D)
    V_PARTS: tl.constexpr = max(1, V_RUNS // V_PLANES)
    V_PIECES: tl.constexpr = V_PLANES * V_PARTS
    SCALED: tl.constexpr = HAS_SOFTCAP or K_PARTS > 1  # scores, before they are compared
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    BLOCKS: tl.constexpr = PAGE_SIZE // TOKENS
    K_CODES: tl.constexpr = packed_bytes(K_WIDTH, PAGE_SIZE, D)
    V_CODES: tl.constexpr = packed_bytes(V_WIDTH, PAGE_SIZE, D)
    K_TABLE: tl.constexpr = TOKENS * D // K_PLANES
    V_TABLE: tl.constexpr = TOKENS * D // V_PLANES
    K_SCALE_BYTES: tl.constexpr = scale_bytes(K_SIDE)
    V_SCALE_BYTES: tl.constexpr = scale_bytes(V_SIDE)

    tile_from = from_page * BLOCKS
    tile_end = end_page * BLOCKS

    offs_g = tl.arange(0, HEADS)
    group_head = part * HEADS + offs_g
    mask_g = group_head < GROUP
    q_head = head * GROUP + group_head
    out_row = out_row + q_head
    offs_d = tl.arange(0, D)
    offs_m = tl.arange(0, 2 * HEADS)
    # The queries, twice, in the layout of the tensor core's results, which a product
    # with the identity produces.
    chan = (offs_d // 32) * 32 + (offs_d // 2 % 4) * 8 + (offs_d // 8 % 4) * 2 + offs_d % 2
    m_head = part * HEADS + offs_m % HEADS
    q_row = query * NUM_HEADS + head * GROUP + m_head
    at = q_row[:, None] * D + chan[None, :]
    q = tl.load(q_ptr + at, mask=(m_head < GROUP)[:, None], other=0.0)
    one = (offs_m[:, None] == offs_m[None, :]).to(q.dtype)
    q = tl.dot(one, q, input_precision="ieee")
    q, _ = tl.split(q.reshape(2, HEADS, D).permute(1, 2, 0))
    if K_PARTS > 1:
        q_exact = exact_operand(q, one.dtype)
    if MODE == "constant":
        k_scale_ptr = k_table_ptr + head * (2 * D) + chan
        shift = tl.sum(q * tl.load(k_scale_ptr + D)[None, :], 1) * qk_scale
        q = q * tl.load(k_scale_ptr)[None, :]
    q_max = tl.maximum(tl.max(tl.abs(q), 1), FLOOR)
    q_scale = q_max * (qk_scale * (step_of(K_SIDE) / LARGEST))
    q_whole = q * (LARGEST / q_max)[:, None]
    q_sum = tl.sum(q_whole, 1)
    q_sums, qqs = (), ()
    if MODE != "channel":
        for r in tl.static_range(K_RUNS):
            q_run = channels(q_whole, r, K_RUNS)
            q_sums = q_sums + (tl.sum(q_run, 1),)  # noqa: RUF005
            qq = query_operand(q_run + MAGIC, D // K_RUNS, PTX)
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
        row = (offs_r // 32) * 32 + (offs_r // 2 % 4) * 8 + (offs_r // 8 % 4) * 2 + offs_r % 2
    elif K_PLANES == 2:
        row = (offs_r // 16) * 16 + (offs_r // 2 % 4) * 4 + (offs_r // 8 % 2) * 2 + offs_r % 2
    else:
        row = offs_r

    for tile in tl.range(tile_from, tile_end, num_stages=FORM.stages):
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
        # Scales and offsets are loaded first, in the order in which they lie.
        first = block * TOKENS
        if V_OFFSET:  # | offsets [PAGE_SIZE, V_RUNS] | scales [PAGE_SIZE, V_RUNS] |
            v_offset_ptr = v_numbers_ptr + 2 * V_RUNS * first
            v_offset = load_words(v_offset_ptr, TOKENS * V_RUNS, "bf16")
            v_numbers_ptr += 2 * V_RUNS * PAGE_SIZE
        v_numbers_ptr += V_SCALE_BYTES * V_RUNS * first
        v_scale = None
        if V_MODE != "constant":
            v_scale = load_words(v_numbers_ptr, TOKENS * V_RUNS, V_SIDE.scale)
        if not V_OFFSET:
            v_offset = v_scale
        if MODE == "token":
            k_offset_ptr = k_numbers_ptr + 2 * K_RUNS * first
            k_offset = load_words(k_offset_ptr, TOKENS * K_RUNS, "bf16")
            k_numbers_ptr += 2 * K_RUNS * PAGE_SIZE
        if MODE == "token" or MODE == "level":
            k_numbers_ptr += K_SCALE_BYTES * K_RUNS * first
            k_scale = load_words(k_numbers_ptr, TOKENS * K_RUNS, K_SIDE.scale)
        # Scores in the tile's order.
        tile_scale = q_scale
        if MODE == "channel":  # | offsets [runs, D] | scales [runs, D] |
            run = first // K_RUN
            k_offset_ptr = k_numbers_ptr + 2 * D * run
            k_numbers_ptr += 2 * D * PAGE_SIZE // K_RUN + K_SCALE_BYTES * D * run
            if K_PARTS == 1:
                k_offset = load_words(k_offset_ptr, D, "bf16")
            else:
                shifts = offset_products(q_exact, k_offset_ptr, offs_d, K_PARTS, HEADS) * qk_scale
            for r in tl.static_range(K_PARTS):
                k_scale_ptr = k_numbers_ptr + r * K_SCALE_BYTES * D
                k_scale = load_words(k_scale_ptr, D, K_SIDE.scale)
                power = power_above(k_scale, 0, 1, K_SIDE.scale)
                k_scale = in_chan_order(numbers(k_scale, 0, 1, K_SIDE.scale))
                qq = query_operand(q_whole * k_scale[None, :] + power * MAGIC, D, PTX)
                tile_scale = q_scale * power
                x = scores(qq, kks[r], row_sums(qq), K_WIDTH, K_PLANES, K_TOP)
                if r == 0:
                    s = x
                if K_PARTS > 1:
                    x = plus(x * tile_scale[:, None], part_columns(shifts, r, K_PARTS))
                    s = x if r == 0 else side_by_side(s, x, K_PLANES)
            if K_PARTS == 1:
                k_offset = in_chan_order(numbers(k_offset, 0, 1, "bf16"))
                shift = tl.sum(q_whole * k_offset[None, :], 1) * q_scale
                if HAS_SOFTCAP:
                    s = s * tile_scale[:, None] + shift[:, None]
        elif MODE == "constant":
            s = products(qqs[0], kks[0], 0, K_WIDTH)
            if HAS_SOFTCAP:
                s = s * tile_scale[:, None] + shift[:, None]
        elif MODE == "level":
            q_top = tl.broadcast_to(q_sum[:, None], [HEADS, 8])
            s = scores(qqs[0], kks[0], q_top, K_WIDTH, K_PLANES, K_TOP)
            s = s - q_sum[:, None] * K_MIDDLE
            k_scale = in_score_order(numbers(k_scale, 0, 1, K_SIDE.scale), K_PLANES)
            s = s * k_scale[None, :]
        else:
            for r in tl.static_range(K_RUNS):
                q_top = tl.broadcast_to(q_sums[r][:, None], [HEADS, 8])
                x = scores(qqs[r], kks[r], q_top, K_WIDTH, K_PLANES, K_TOP)
                scale = numbers(k_scale, r, K_RUNS, K_SIDE.scale)
                scale = in_score_order(scale, K_PLANES)
                offset = in_score_order(numbers(k_offset, r, K_RUNS, "bf16"), K_PLANES)
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
            if MODE == "token" or MODE == "level":
                s = s * tile_scale[:, None]
            s = (2.0 * tl.sigmoid(s * (2.0 / softcap)) - 1.0) * (softcap * 1.4426950408889634)
        if SCALED:
            tile_top = tl.max(s, 1)
            p = tl.exp2(s - (tile_top - LOG2_LARGEST)[:, None])
        else:
            tile_top = tl.max(s, 1) * tile_scale
            p = tl.exp2(
                tl.fma(
                    s,
                    tl.broadcast_to(tile_scale[:, None], [HEADS, TOKENS]),
                    tl.broadcast_to(-(tile_top - LOG2_LARGEST)[:, None], [HEADS, TOKENS]),
                )
            )
            if MODE == "channel" or MODE == "constant":
                tile_top += shift
        new_top = tl.maximum(top, tile_top)
        keep = tl.exp2(top - new_top)
        gain = tl.exp2(tile_top - new_top)
        total = total * keep[:, None] + column_sums(p) * gain[:, None]
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
                x = products(pp, vv, i, V_WIDTH)
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
            x = x * norm[:, None]
            if V_MODE == "constant":
                v_scale_ptr = v_table_ptr + head * (2 * D) + channel
                x = x * tl.load(v_scale_ptr)[None, :] + tl.load(v_scale_ptr + D)[None, :]
            at = out_row[:, None] * D + channel[None, :]
            mask = tl.broadcast_to(mask_g[:, None], at.shape)
            tl.store(out_ptr + at, x, mask=mask)
    lse = (top - LOG2_LARGEST + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + out_row, lse, mask=mask_g)
