"""Triton functions of `Affine`.

The layout and the rounding are the reference's. "range" gives identical bytes: it uses
only operations that IEEE 754 defines (correctly rounded division, floor, bit
masks), and the only product that a compiler might fuse is by a power of two. The
other fits sum in a different order and agree up to rounding.

For few queries, grids per token are folded: the tile is codes minus half their range, which
16 bits hold exactly, so that rounding a tile costs nothing. Other tiles are dequantised.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.affine import reference
from kvmesh.kernels.formats.affine.side import WIDTHS, Affine
from kvmesh.kernels.formats.numbers_triton import (
    fused,
    has_planes,
    load_number,
    load_numbers,
    load_planes,
    together,
)
from kvmesh.kernels.formats.packing_triton import (
    block_channels,
    block_slots,
    block_tokens,
    load_codes,
    packed_bytes,
    store_codes,
)
from kvmesh.kernels.formats.tiles_triton import (
    BF16_MAX,
    SCALE_FLOOR,
    SideKernels,
    from_bf16,
    load_bf16,
    load_scale,
    padded,
    rounded_scale,
    run_length,
    store_bf16,
    store_scale,
    to_bf16,
)

SCALE_CEILING = tl.constexpr(reference.SCALE_CEILING)
FIT_ROUNDS = tl.constexpr(reference.FIT_ROUNDS)
HQQ_ROUNDS = tl.constexpr(reference.HQQ_ROUNDS)
HQQ_BETA = tl.constexpr(reference.HQQ_BETA)
HQQ_KAPPA = tl.constexpr(reference.HQQ_KAPPA)
HQQ_POWER = tl.constexpr(reference.HQQ_NORM - 1.0)
FIT_NUMBERS = 4096  # of a page, fitted at a time
FIRST_SHARE = {width: reference.FIRST_SHARE.get(width, 1.0) for width in WIDTHS}


@triton.constexpr_function
def first_share(width: int) -> float:
    return FIRST_SHARE[width]


@triton.constexpr_function
def fit_rows(runs: int, padded_run: int) -> int:
    return min(triton.next_power_of_2(runs), max(1, FIT_NUMBERS // padded_run))


@triton.jit
def _run_index(n, d, SIDE: tl.constexpr, RUN: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The run that the number of slot n and channel d belongs to."""
    if SIDE.along == "token":
        return n * (HEAD_DIM // RUN) + d // RUN
    else:
        return (n // RUN) * HEAD_DIM + d


@triton.jit
def load_folded(
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
    """For a grid per token."""
    HALF_RANGE: tl.constexpr = 1 << (SIDE.width - 1)
    offset_ptr = part_ptr + packed_bytes(SIDE.width, PAGE_SIZE, HEAD_DIM)
    slots = first_slot + tl.arange(0, BLOCK_N)
    codes = load_numbers(
        part_ptr, first_slot, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, HALF_RANGE, DTYPE
    )
    scale = load_scale(offset_ptr + PAGE_SIZE * 2, slots, None, SIDE.scale)
    offset = load_bf16(offset_ptr, slots) + HALF_RANGE * scale
    return tl.trans(codes) if SIDE.values else codes, scale, offset


@triton.jit
def load_dense(
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
    RUN: tl.constexpr = run_length(SIDE, PAGE_SIZE, HEAD_DIM)
    offset_ptr = part_ptr + packed_bytes(SIDE.width, PAGE_SIZE, HEAD_DIM)
    scale_ptr = offset_ptr + PAGE_SIZE * HEAD_DIM // RUN * 2
    slots = first_slot + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    if SIDE.values:  # columns are tokens
        n, d = slots[None, :], channels[:, None]
    else:
        n, d = slots[:, None], channels[None, :]
    if SIDE.along == "token" and RUN == HEAD_DIM:
        index, mask = n, None
    else:
        index = _run_index(n, d, SIDE, RUN, HEAD_DIM)
        mask = None if BLOCK_D == HEAD_DIM else d < HEAD_DIM
    if has_planes(SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D):
        planes = load_planes(part_ptr, first_slot, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, 0, DTYPE)
        scale = load_number(scale_ptr, index, mask, SIDE.scale, DTYPE)
        offset = load_number(offset_ptr, index, mask, "bf16", DTYPE)
        x = fused(together(planes, SIDE.values), scale, offset, DTYPE)
    else:
        HALF_RANGE: tl.constexpr = 1 << (SIDE.width - 1)
        codes = load_codes(part_ptr, first_slot, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D)
        scale = load_scale(scale_ptr, index, mask, SIDE.scale)
        offset = load_bf16(offset_ptr, index, mask) + HALF_RANGE * scale
        x = (codes.to(tl.float32) * scale + offset).to(DTYPE)
    return tl.trans(x) if SIDE.values else x, 1.0, 0.0


@triton.jit
def seal(
    hot_ptr,
    part_ptr,
    table_ptr,
    head,
    position,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """First the runs, whose scales and offsets are stored; then codes against the stored ones."""
    RUN: tl.constexpr = run_length(SIDE, PAGE_SIZE, HEAD_DIM)
    RUNS: tl.constexpr = PAGE_SIZE * HEAD_DIM // RUN
    LEVELS: tl.constexpr = (1 << SIDE.width) - 1.0
    offset_ptr = part_ptr + packed_bytes(SIDE.width, PAGE_SIZE, HEAD_DIM)
    scale_ptr = offset_ptr + RUNS * 2
    ROWS: tl.constexpr = fit_rows(RUNS, padded(RUN))
    offs_i = tl.arange(0, padded(RUN))
    for first in range(0, RUNS, ROWS):
        runs = first + tl.arange(0, ROWS)
        mask_r = runs < RUNS
        mask = mask_r[:, None] & (offs_i < RUN)[None, :]
        if SIDE.along == "token":
            at = runs[:, None] * RUN + offs_i[None, :]
        else:
            token = (runs // HEAD_DIM * RUN)[:, None] + offs_i[None, :]
            at = token * HEAD_DIM + (runs % HEAD_DIM)[:, None]
        half = tl.load(hot_ptr + at, mask=mask, other=0.0).to(tl.float32) * 0.5
        lowest = tl.min(tl.where(mask, half, float("inf")), 1)
        highest = tl.max(tl.where(mask, half, float("-inf")), 1)
        lowest = tl.where(mask_r, lowest, 0.0)
        highest = tl.where(mask_r, highest, 0.0)
        if SIDE.fit == "range":
            offset, scale = _fit_range(lowest, highest, LEVELS, SIDE.scale)
        elif SIDE.fit == "least_squares":
            offset, scale = _fit_least_squares(half, lowest, highest, mask, RUN, LEVELS, SIDE)
        else:
            offset, scale = _fit_half_quadratic(half, lowest, highest, mask, RUN, LEVELS, SIDE)
        store_bf16(offset_ptr, runs, offset, mask_r)
        store_scale(scale_ptr, runs, scale, mask_r, SIDE.scale)
    tl.debug_barrier()  # other threads read what one thread has stored

    slots, mask_n = block_slots(PAGE_SIZE)
    channels, mask_d = block_channels(SIDE, HEAD_DIM)
    mask = mask_n[:, None] & mask_d[None, :]
    BLOCK: tl.constexpr = block_tokens(PAGE_SIZE)
    for block in range(PAGE_SIZE // BLOCK):
        n = (block * BLOCK + slots)[:, None]
        d = channels[None, :]
        half = tl.load(hot_ptr + n * HEAD_DIM + d, mask=mask, other=0.0).to(tl.float32) * 0.5
        index = _run_index(n, d, SIDE, RUN, HEAD_DIM)
        half_offset = load_bf16(offset_ptr, index, mask) * 0.5
        half_scale = load_scale(scale_ptr, index, mask, SIDE.scale) * 0.5
        half_scale = tl.where(mask, half_scale, 1.0)
        codes = tl.floor(tl.math.div_rn(half - half_offset, half_scale) + 0.5)
        codes = tl.minimum(tl.maximum(codes, 0.0), LEVELS).to(tl.int32)
        store_codes(codes, part_ptr, block, SIDE, PAGE_SIZE, HEAD_DIM)


@triton.jit
def _fit_range(lowest, highest, LEVELS: tl.constexpr, SCALE: tl.constexpr):
    offset = _round_down_to_bf16(lowest * 2.0)
    levels = tl.full(highest.shape, LEVELS, tl.float32)
    half_scale = tl.math.div_rn(highest - offset * 0.5, levels)
    scale = _round_up_to_bf16(tl.maximum(half_scale * 2.0, SCALE_FLOOR))
    return offset, rounded_scale(scale, SCALE)


@triton.jit
def _fit_least_squares(
    half, lowest, highest, mask, RUN: tl.constexpr, LEVELS: tl.constexpr, SIDE: tl.constexpr
):
    steps, half_step = _in_steps(half, lowest, highest, mask, LEVELS)
    mean = tl.sum(steps, 1) / RUN
    about_mean = tl.where(mask, steps - mean[:, None], 0.0)
    a = tl.full(mean.shape, first_share(SIDE.width), tl.float32)
    b = (0.5 * LEVELS) * (1.0 - a)
    q_mean = tl.zeros_like(mean)
    for _ in range(FIT_ROUNDS):
        q = tl.floor((steps - b[:, None]) / a[:, None] + 0.5)
        q = tl.where(mask, tl.minimum(tl.maximum(q, 0.0), LEVELS), 0.0)
        q_mean = tl.sum(q, 1) / RUN
        q = tl.where(mask, q - q_mean[:, None], 0.0)
        spread = tl.sum(q * q, 1)
        slope = tl.sum(q * about_mean, 1) / tl.maximum(spread, 1e-9)
        a = tl.where(spread > 1e-9, tl.maximum(slope, 1e-3), a)
        b = mean - a * q_mean
    scale = _stored_scale(half_step * a * 2.0, SIDE.scale)
    b = mean - scale * 0.5 / half_step * q_mean
    return _stored_offset(lowest, half_step, b), scale


@triton.jit
def _fit_half_quadratic(
    half, lowest, highest, mask, RUN: tl.constexpr, LEVELS: tl.constexpr, SIDE: tl.constexpr
):
    steps, half_step = _in_steps(half, lowest, highest, mask, LEVELS)
    z = tl.zeros_like(half_step)
    inverse_beta = 1.0 / HQQ_BETA
    for _ in range(HQQ_ROUNDS):
        q = tl.floor(steps + z[:, None] + 0.5)
        q = tl.minimum(tl.maximum(q, 0.0), LEVELS)
        error = steps - (q - z[:, None])
        size = tl.abs(error)
        power = tl.exp2(tl.log2(tl.maximum(size, 1e-9)) * HQQ_POWER)
        kept = tl.maximum(size - power * inverse_beta, 0.0)
        kept = tl.where(error < 0.0, -kept, kept)
        z = tl.sum(tl.where(mask, q - (steps - kept), 0.0), 1) / RUN
        inverse_beta = inverse_beta / HQQ_KAPPA
    return _stored_offset(lowest, half_step, -z), _stored_scale(half_step * 2.0, SIDE.scale)


@triton.jit
def _in_steps(half, lowest, highest, mask, LEVELS: tl.constexpr):
    """The numbers in steps of the run's range above its minimum, and half a step."""
    half_step = tl.maximum((highest - lowest) / LEVELS, 0.5 * SCALE_FLOOR)
    steps = (half - lowest[:, None]) / half_step[:, None]
    return tl.where(mask, steps, 0.0), half_step


@triton.jit
def _stored_scale(scale, SCALE: tl.constexpr):
    return rounded_scale(tl.minimum(tl.maximum(scale, SCALE_FLOOR), SCALE_CEILING), SCALE)


@triton.jit
def _stored_offset(lowest, half_step, steps):
    half = lowest + half_step * steps
    half = tl.minimum(tl.maximum(half, -0.5 * BF16_MAX), 0.5 * BF16_MAX)
    return from_bf16(to_bf16(half * 2.0))


@triton.jit
def _round_up_to_bf16(x):
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _round_down_to_bf16(x):
    bits = x.to(tl.int32, bitcast=True)
    away = tl.where(x < 0, 0xFFFF, 0)
    rounded = ((bits + away) & -65536).to(tl.float32, bitcast=True)
    return tl.maximum(rounded, -BF16_MAX)


def kernels(side: Affine) -> SideKernels:
    if side.along == "token" and side.run is None:
        return SideKernels(load_folded, folded=True, seal=seal, load_dense=load_dense)
    return SideKernels(load_dense, folded=False, seal=seal)
