"""Triton functions of `NonUniform`.

Keys come as two tiles, the first and the second channels of the RoPE pairs, rotated by their
whole position: by the token's angle in the page plus the angles of the position's digits
(`table.py`). Sealing sums in a different order than the reference and agrees up to rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.nuq import reference, table
from kvmesh.kernels.formats.nuq.side import NonUniform
from kvmesh.kernels.formats.packing_triton import (
    block_channels,
    block_slots,
    block_tokens,
    load_codes,
    load_codes_of,
    packed_bytes,
    store_codes,
)
from kvmesh.kernels.formats.pairs_triton import padded_half, pair_channels
from kvmesh.kernels.formats.scales import E5M3_MAX, E5M3_MIN
from kvmesh.kernels.formats.tiles_triton import (
    SideKernels,
    from_e5m3,
    load,
    load_bf16,
    store_bf16,
    to_e5m3,
)

MAX_INPUT = tl.constexpr(reference.MAX_INPUT)
STEPS = tl.constexpr(reference.OFFSET_STEPS)
BASE = tl.constexpr(table.BASE)
DIGITS = tl.constexpr(table.DIGITS)
MIN_SCALE = tl.constexpr(E5M3_MIN)
MAX_SCALE = tl.constexpr(E5M3_MAX)
INFINITY = tl.constexpr(float("inf"))


@triton.constexpr_function
def outliers(side: NonUniform, head_dim: int) -> int:
    return side.outliers(head_dim)


@triton.constexpr_function
def phases_start(side: NonUniform) -> int:
    """Where the cosines begin in the keys' table."""
    return 2 * 2**side.width


@triton.constexpr_function
def numbers_of_digits(head_dim: int) -> int:
    """Number of cosines in `digits`."""
    return table.DIGITS * table.BASE * (head_dim // 2)


@triton.constexpr_function
def digits_start(side: NonUniform, page_size: int, head_dim: int) -> int:
    return 2 * 2**side.width + page_size * head_dim


@triton.constexpr_function
def heads_start(side: NonUniform, page_size: int, head_dim: int) -> int:
    return digits_start(side, page_size, head_dim) + 2 * numbers_of_digits(head_dim)


@triton.constexpr_function
def part_bytes(side: NonUniform, page_size: int, head_dim: int) -> int:
    return side.num_bytes(page_size, head_dim)


@triton.jit
def _with_outliers(
    x,
    part_ptr,
    slots,
    channels,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """x: [slots, channels] for keys, transposed for values"""
    COUNT: tl.constexpr = outliers(SIDE, HEAD_DIM)
    kept_ptr = part_ptr + packed_bytes(SIDE.width, PAGE_SIZE, HEAD_DIM)
    channel_ptr = kept_ptr + PAGE_SIZE * COUNT * 2
    for j in tl.static_range(COUNT):
        kept = load_bf16(kept_ptr, slots * COUNT + j)
        channel = tl.load(channel_ptr + slots * COUNT + j).to(tl.int32) & 255
        if SIDE.values:
            x = tl.where(channels[:, None] == channel[None, :], kept[None, :], x)
        else:
            x = tl.where(channels[None, :] == channel[:, None], kept[:, None], x)
    return x


@triton.jit
def _levels(codes, table_ptr, SIDE: tl.constexpr):
    """codes minus half their range -> fp32"""
    return tl.load(table_ptr + (1 << (SIDE.width - 1)) + codes)


@triton.jit
def _add_angles(cos, sin, more_cos, more_sin):
    return cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin


@triton.jit
def _position(part_ptr, SIDE: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    END: tl.constexpr = part_bytes(SIDE, PAGE_SIZE, HEAD_DIM)
    return tl.load((part_ptr + END - 4).to(tl.pointer_type(tl.int32), bitcast=True))


@triton.jit
def _page_phase(
    position,
    planes,
    mask,
    table_ptr,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """cos, sin of the angles of a page's first token, for some pairs"""
    SINES: tl.constexpr = numbers_of_digits(HEAD_DIM)
    PLANES: tl.constexpr = HEAD_DIM // 2
    digits_ptr = table_ptr + digits_start(SIDE, PAGE_SIZE, HEAD_DIM)
    row_ptr = digits_ptr + (position % BASE) * PLANES
    cos, sin = load(row_ptr + planes, mask), load(row_ptr + SINES + planes, mask)
    for i in tl.static_range(1, DIGITS):
        digit = position // (BASE**i) % BASE
        row_ptr = digits_ptr + (i * BASE + digit) * PLANES
        more = load(row_ptr + planes, mask)
        cos, sin = _add_angles(cos, sin, more, load(row_ptr + SINES + planes, mask))
    return cos, sin


@triton.jit
def _half_of_keys(
    part_ptr,
    table_ptr,
    head,
    first_slot,
    channels,
    mask_d,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some channels of keys before RoPE: [BLOCK_N, channels] fp32"""
    scale_ptr = table_ptr + heads_start(SIDE, PAGE_SIZE, HEAD_DIM) + head * (3 * HEAD_DIM)
    scale = load(scale_ptr + channels, mask_d)
    zero = load(scale_ptr + HEAD_DIM + channels, mask_d)
    codes = load_codes_of(
        part_ptr, first_slot, channels, mask_d, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N
    )
    x = _levels(codes, table_ptr, SIDE) * scale[None, :] + zero[None, :]
    slots = first_slot + tl.arange(0, BLOCK_N)
    return _with_outliers(x, part_ptr, slots, channels, SIDE, PAGE_SIZE, HEAD_DIM)


@triton.jit
def load_keys(
    part_ptr,
    table_ptr,
    head,
    first_slot,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    PLANES: tl.constexpr = HEAD_DIM // 2
    planes = tl.arange(0, padded_half(HEAD_DIM))
    mask = None if padded_half(HEAD_DIM) == PLANES else planes < PLANES
    channels = pair_channels(0, SIDE.rope, HEAD_DIM)
    first = _half_of_keys(
        part_ptr, table_ptr, head, first_slot, channels, mask, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N
    )
    channels = pair_channels(1, SIDE.rope, HEAD_DIM)
    second = _half_of_keys(
        part_ptr, table_ptr, head, first_slot, channels, mask, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N
    )
    mask_n = None if mask is None else mask[None, :]
    cos, sin = _page_phase(
        _position(part_ptr, SIDE, PAGE_SIZE, HEAD_DIM),
        planes,
        mask,
        table_ptr,
        SIDE,
        PAGE_SIZE,
        HEAD_DIM,
    )
    slots = first_slot + tl.arange(0, BLOCK_N)
    cos_ptr = table_ptr + phases_start(SIDE) + slots[:, None] * PLANES + planes[None, :]
    token_cos, token_sin = load(cos_ptr, mask_n), load(cos_ptr + PAGE_SIZE * PLANES, mask_n)
    cos, sin = _add_angles(token_cos, token_sin, cos[None, :], sin[None, :])
    first, second = _add_angles(first, second, cos, sin)
    return (first.to(DTYPE), second.to(DTYPE)), 1.0, 0.0


@triton.jit
def load_values(
    part_ptr,
    table_ptr,
    head,
    first_slot,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    slots = first_slot + tl.arange(0, BLOCK_N)
    codes = load_codes(part_ptr, first_slot, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D)
    scale_ptr = part_ptr + part_bytes(SIDE, PAGE_SIZE, HEAD_DIM) - 2 * PAGE_SIZE
    scale = from_e5m3(tl.load(scale_ptr + slots))
    offset = tl.load(scale_ptr + PAGE_SIZE + slots).to(tl.float32)
    zero = offset * (scale * (1.0 / STEPS))
    x = _levels(codes, table_ptr, SIDE) * scale[None, :] + zero[None, :]
    channels = tl.arange(0, BLOCK_D)
    x = _with_outliers(x, part_ptr, slots, channels, SIDE, PAGE_SIZE, HEAD_DIM)
    return tl.trans(x.to(DTYPE)), 1.0, 0.0


# Sealing: tokens by channels, in the orders of `block_slots` and `block_channels`.


@triton.jit
def _codes(t, table_ptr, SIDE: tl.constexpr):
    N: tl.constexpr = 1 << SIDE.width
    codes = tl.zeros(t.shape, tl.int32)
    for i in tl.static_range(N - 1):
        codes += (t > tl.load(table_ptr + N + i)).to(tl.int32)
    return codes


@triton.jit
def _store_outliers(
    x,
    missed,
    part_ptr,
    n,
    mask_n,
    channels,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """The numbers of each token with the largest `missed`, and their channels."""
    COUNT: tl.constexpr = outliers(SIDE, HEAD_DIM)
    kept_ptr = part_ptr + packed_bytes(SIDE.width, PAGE_SIZE, HEAD_DIM)
    channel_ptr = kept_ptr + PAGE_SIZE * COUNT * 2
    at = tl.arange(0, x.shape[1])
    for j in tl.static_range(COUNT):
        chosen = at[None, :] == tl.argmax(missed, 1)[:, None]
        missed = tl.where(chosen, -1.0, missed)
        channel = tl.sum(tl.where(chosen, channels[None, :], 0), 1)
        store_bf16(kept_ptr, n * COUNT + j, tl.sum(tl.where(chosen, x, 0.0), 1), mask_n)
        tl.store(channel_ptr + n * COUNT + j, channel.to(tl.int8), mask=mask_n)


@triton.jit
def seal_keys(
    hot_ptr,
    part_ptr,
    table_ptr,
    head,
    position,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    PLANES: tl.constexpr = HEAD_DIM // 2
    slots, mask_n = block_slots(PAGE_SIZE)
    channels, mask_d = block_channels(SIDE, HEAD_DIM)
    mask = mask_n[:, None] & mask_d[None, :]
    plane, partner, sign = _pair_of(channels, SIDE.rope)
    page_cos, page_sin = _page_phase(position, plane, mask_d, table_ptr, SIDE, PAGE_SIZE, HEAD_DIM)
    scale_ptr = table_ptr + heads_start(SIDE, PAGE_SIZE, HEAD_DIM) + head * (3 * HEAD_DIM)
    scale = tl.load(scale_ptr + channels, mask=mask_d, other=1.0)
    zero = tl.load(scale_ptr + HEAD_DIM + channels, mask=mask_d, other=0.0)
    importance = tl.load(scale_ptr + 2 * HEAD_DIM + channels, mask=mask_d, other=0.0)
    BLOCK: tl.constexpr = block_tokens(PAGE_SIZE)
    for block in range(PAGE_SIZE // BLOCK):
        n = block * BLOCK + slots
        row_ptr = hot_ptr + n[:, None] * HEAD_DIM
        x = tl.load(row_ptr + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        other = tl.load(row_ptr + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.minimum(tl.maximum(x, -MAX_INPUT), MAX_INPUT)
        other = tl.minimum(tl.maximum(other, -MAX_INPUT), MAX_INPUT)
        cos_ptr = table_ptr + phases_start(SIDE) + n[:, None] * PLANES + plane[None, :]
        cos = tl.load(cos_ptr, mask=mask, other=0.0)
        sin = tl.load(cos_ptr + PAGE_SIZE * PLANES, mask=mask, other=0.0)
        cos, sin = _add_angles(cos, sin, page_cos[None, :], page_sin[None, :])
        x = x * cos + other * (sin * sign[None, :])  # backwards
        x = tl.minimum(tl.maximum(x, -MAX_INPUT), MAX_INPUT)
        t = tl.math.div_rn(x - zero[None, :], tl.broadcast_to(scale[None, :], x.shape))
        codes = _codes(t, table_ptr, SIDE)
        levels = _levels(codes - (1 << (SIDE.width - 1)), table_ptr, SIDE)
        missed = tl.abs(levels * scale[None, :] + zero[None, :] - x) * importance[None, :]
        missed = tl.where(mask_d[None, :], missed, -1.0)
        _store_outliers(x, missed, part_ptr, n, mask_n, channels, SIDE, PAGE_SIZE, HEAD_DIM)
        store_codes(codes, part_ptr, block, SIDE, PAGE_SIZE, HEAD_DIM)
    END: tl.constexpr = part_bytes(SIDE, PAGE_SIZE, HEAD_DIM)
    tl.store((part_ptr + END - 4).to(tl.pointer_type(tl.int32), bitcast=True), position)


@triton.jit
def seal_values(
    hot_ptr,
    part_ptr,
    table_ptr,
    head,
    position,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    COUNT: tl.constexpr = outliers(SIDE, HEAD_DIM)
    slots, mask_n = block_slots(PAGE_SIZE)
    channels, mask_d = block_channels(SIDE, HEAD_DIM)
    mask = mask_n[:, None] & mask_d[None, :]
    scale_ptr = part_ptr + part_bytes(SIDE, PAGE_SIZE, HEAD_DIM) - 2 * PAGE_SIZE
    at = tl.arange(0, channels.shape[0])
    BLOCK: tl.constexpr = block_tokens(PAGE_SIZE)
    for block in range(PAGE_SIZE // BLOCK):
        n = block * BLOCK + slots
        x = tl.load(hot_ptr + n[:, None] * HEAD_DIM + channels[None, :], mask=mask, other=0.0)
        x = tl.minimum(tl.maximum(x.to(tl.float32), -MAX_INPUT), MAX_INPUT)
        # All but the farthest from the mean: these are mapped to [-1, 1].
        mean = tl.sum(x * (1.0 / HEAD_DIM), 1)
        away = tl.where(mask_d[None, :], tl.abs(x - mean[:, None]), -1.0)
        for _ in tl.static_range(COUNT):
            away = tl.where(at[None, :] == tl.argmax(away, 1)[:, None], -1.0, away)
        others = away >= 0.0
        low = tl.min(tl.where(others, x, INFINITY), 1)
        high = tl.max(tl.where(others, x, -INFINITY), 1)
        zero = (low + high) * 0.5
        scale = tl.maximum((high - low) * 0.5, tl.abs(zero) * 0.5)
        scale = tl.minimum(tl.maximum(scale, MIN_SCALE), MAX_SCALE)
        t = tl.math.div_rn(x - zero[:, None], tl.broadcast_to(scale[:, None], x.shape))
        codes = _codes(t, table_ptr, SIDE)
        levels = _levels(codes - (1 << (SIDE.width - 1)), table_ptr, SIDE)
        scale, zero = _unbiased(t, levels, others, scale, zero, HEAD_DIM - COUNT)
        stored = to_e5m3(scale)
        scale = from_e5m3(stored)
        offset = _nearest_even(tl.math.div_rn(zero, scale) * STEPS)
        offset = tl.minimum(tl.maximum(offset, -128.0), 127.0)
        tl.store(scale_ptr + n, stored, mask=mask_n)
        tl.store(scale_ptr + PAGE_SIZE + n, offset.to(tl.int32).to(tl.int8), mask=mask_n)
        zero = offset * (scale * (1.0 / STEPS))
        missed = tl.abs(levels * scale[:, None] + zero[:, None] - x)
        missed = tl.where(mask_d[None, :], missed, -1.0)
        _store_outliers(x, missed, part_ptr, n, mask_n, channels, SIDE, PAGE_SIZE, HEAD_DIM)
        store_codes(codes, part_ptr, block, SIDE, PAGE_SIZE, HEAD_DIM)


@triton.jit
def _unbiased(t, levels, others, scale, zero, COUNT: tl.constexpr):
    """Scale and zero that give <x, x^> = |x|² about the mean of the COUNT numbers `others`."""
    t = tl.where(others, t, 0.0)
    levels = tl.where(others, levels, 0.0)
    mean = tl.sum(t, 1) / COUNT
    mean_level = tl.sum(levels, 1) / COUNT
    centred = tl.where(others, t - mean[:, None], 0.0)
    shared = tl.maximum(tl.sum(centred * levels, 1), 1e-9)
    slope = tl.math.div_rn(tl.sum(centred * centred, 1), shared)
    scaled = scale * slope
    shifted = zero + scale * (mean - slope * mean_level)
    # If all numbers are equal, or the result cannot be stored, the range will do.
    plausible = (slope > 0.5) & (slope < 2.0) & (tl.abs(shifted) < 1.9 * scaled)
    return tl.where(plausible, scaled, scale), tl.where(plausible, shifted, zero)


@triton.jit
def _nearest_even(x):
    """For |x| < 2^22"""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _pair_of(channels, ROPE: tl.constexpr):
    """RoPE pair and partner of channels, and 1 for the first channel of a pair, otherwise -1."""
    PLANES: tl.constexpr = ROPE[0]
    pair = channels // 2
    second = channels % 2
    if not ROPE[1]:
        rotates = channels < 2 * PLANES
        pair = tl.where(rotates, channels % PLANES, pair)
        second = tl.where(rotates, channels // PLANES, second)
        partner = tl.where(rotates, (channels + PLANES) % (2 * PLANES), channels ^ 1)
    else:
        partner = channels ^ 1
    return pair, partner, tl.where(second == 0, 1.0, -1.0)


def kernels(side: NonUniform) -> SideKernels:
    if side.values:
        return SideKernels(load_values, folded=False, seal=seal_values, looks_up=True)
    return SideKernels(load_keys, folded=False, seal=seal_keys, looks_up=True)
