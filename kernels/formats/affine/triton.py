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
from kvmesh.kernels.formats.packing_triton import (
    block_channels,
    block_slots,
    block_tokens,
    packed_bytes,
    store_codes,
)
from kvmesh.kernels.formats.planes_triton import load_numbers
from kvmesh.kernels.formats.tiles_triton import (
    BF16_MAX,
    SCALE_FLOOR,
    SideKernels,
    as_int16,
    from_bf16,
    load,
    load_bf16,
    load_scale,
    padded,
    rounded_scale,
    store_bf16,
    store_scale,
    to_bf16,
)

SCALE_CEILING = tl.constexpr(reference.SCALE_CEILING)
FIT_ROUNDS = tl.constexpr(reference.FIT_ROUNDS)
FIT_NUMBERS = 4096  # of a page, fitted at a time
FIRST_SHARE = {width: reference.FIRST_SHARE.get(width, 1.0) for width in WIDTHS}


@triton.constexpr_function
def first_share(width: int) -> float:
    return FIRST_SHARE[width]


@triton.constexpr_function
def fit_rows(runs: int, padded_run: int) -> int:
    return min(triton.next_power_of_2(runs), max(1, FIT_NUMBERS // padded_run))


@triton.jit
def load_folded(part_ptr, first_slot, SIDE: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr):
    """For a grid per token."""
    HALF_RANGE: tl.constexpr = 1 << (SIDE.width - 1)
    offset_ptr = part_ptr + packed_bytes(SIDE.width, FORM.page_size, FORM.head_dim)
    slots = first_slot + tl.arange(0, FORM.block_n)
    codes = load_numbers(part_ptr, first_slot, SIDE, HALF_RANGE, DTYPE, FORM)
    scale = load_scale(offset_ptr + FORM.page_size * 2, slots, None, SIDE.scale)
    offset = load_bf16(offset_ptr, slots) + HALF_RANGE * scale
    return tl.trans(codes) if SIDE.values else codes, scale, offset


@triton.jit
def load_dense(part_ptr, first_slot, SIDE: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr):
    ALONG_TOKEN: tl.constexpr = SIDE.along == "token"
    RUNS: tl.constexpr = FORM.page_size if ALONG_TOKEN else FORM.head_dim
    offset_ptr = part_ptr + packed_bytes(SIDE.width, FORM.page_size, FORM.head_dim)
    scale_ptr = offset_ptr + RUNS * 2
    mask = None
    if ALONG_TOKEN:
        run = first_slot + tl.arange(0, FORM.block_n)
    else:
        run = tl.arange(0, FORM.block_d)
        if FORM.block_d != FORM.head_dim:
            mask = run < FORM.head_dim
    # Columns are tokens in tiles of values, channels in tiles of keys.
    if SIDE.values == ALONG_TOKEN:
        run = run[None, :]
        mask = None if mask is None else mask[None, :]
    else:
        run = run[:, None]
        mask = None if mask is None else mask[:, None]
    x = load_numbers(part_ptr, first_slot, SIDE, 0, DTYPE, FORM)
    scale = _load_number(scale_ptr, run, mask, SIDE.scale, DTYPE)
    offset = _load_number(offset_ptr, run, mask, "bf16", DTYPE)
    x = _fused(x, scale, offset, DTYPE)
    return tl.trans(x) if SIDE.values else x, 1.0, 0.0


@triton.jit
def _load_number(ptr, index, mask, STORED: tl.constexpr, DTYPE: tl.constexpr):
    """Stored bf16 or e5m3 numbers: as bf16 without a conversion if DTYPE is bf16, otherwise fp32"""
    if DTYPE != tl.bfloat16:  # noqa: SIM300
        return load_scale(ptr, index, mask, STORED)
    elif STORED == "bf16":
        return load(as_int16(ptr) + index, mask).to(tl.bfloat16, bitcast=True)
    else:
        bits = ((load(ptr + index, mask).to(tl.int16) & 255) << 4) + (107 << 7)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _fused(x, scale, offset, DTYPE: tl.constexpr):
    """x * scale + offset, rounded once; scale and offset from `_load_number`, broadcast"""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [x, scale, offset],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return (x.to(tl.float32) * scale + offset).to(DTYPE)


@triton.jit
def seal(hot_ptr, part_ptr, SIDE: tl.constexpr, FORM: tl.constexpr):
    """First scales and offsets, of tokens or of channels; then codes against the stored ones."""
    PAGE_SIZE: tl.constexpr = FORM.page_size
    HEAD_DIM: tl.constexpr = FORM.head_dim
    ALONG_TOKEN: tl.constexpr = SIDE.along == "token"
    RUN: tl.constexpr = HEAD_DIM if ALONG_TOKEN else PAGE_SIZE
    RUNS: tl.constexpr = PAGE_SIZE if ALONG_TOKEN else HEAD_DIM
    LEVELS: tl.constexpr = (1 << SIDE.width) - 1.0
    offset_ptr = part_ptr + packed_bytes(SIDE.width, PAGE_SIZE, HEAD_DIM)
    scale_ptr = offset_ptr + RUNS * 2
    ROWS: tl.constexpr = fit_rows(RUNS, padded(RUN))
    offs_i = tl.arange(0, padded(RUN))
    for first in range(0, RUNS, ROWS):
        runs = first + tl.arange(0, ROWS)
        mask_r = runs < RUNS
        mask = mask_r[:, None] & (offs_i < RUN)[None, :]
        if ALONG_TOKEN:
            at = runs[:, None] * HEAD_DIM + offs_i[None, :]
        else:
            at = offs_i[None, :] * HEAD_DIM + runs[:, None]
        half = tl.load(hot_ptr + at, mask=mask, other=0.0).to(tl.float32) * 0.5
        lowest = tl.min(tl.where(mask, half, float("inf")), 1)
        highest = tl.max(tl.where(mask, half, float("-inf")), 1)
        lowest = tl.where(mask_r, lowest, 0.0)
        highest = tl.where(mask_r, highest, 0.0)
        if SIDE.fit == "range":
            offset, scale = _fit_range(lowest, highest, LEVELS, SIDE.scale)
        else:
            offset, scale = _fit_least_squares(half, lowest, highest, mask, RUN, LEVELS, SIDE)
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
        run = tl.broadcast_to(n if ALONG_TOKEN else d, mask.shape)
        half_offset = load_bf16(offset_ptr, run, mask) * 0.5
        half_scale = load_scale(scale_ptr, run, mask, SIDE.scale) * 0.5
        half_scale = tl.where(mask, half_scale, 1.0)
        codes = tl.floor(tl.math.div_rn(half - half_offset, half_scale) + 0.5)
        codes = tl.minimum(tl.maximum(codes, 0.0), LEVELS).to(tl.int32)
        store_codes(codes, part_ptr, block, SIDE, FORM)


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
    # The numbers in steps of the run's range above its minimum.
    half_step = tl.maximum((highest - lowest) / LEVELS, 0.5 * SCALE_FLOOR)
    steps = tl.where(mask, (half - lowest[:, None]) / half_step[:, None], 0.0)
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
    scale = tl.minimum(tl.maximum(half_step * a * 2.0, SCALE_FLOOR), SCALE_CEILING)
    scale = rounded_scale(scale, SIDE.scale)
    b = mean - scale * 0.5 / half_step * q_mean
    half_offset = lowest + half_step * b
    half_offset = tl.minimum(tl.maximum(half_offset, -0.5 * BF16_MAX), 0.5 * BF16_MAX)
    return from_bf16(to_bf16(half_offset * 2.0)), scale


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
    if side.along == "token":
        return SideKernels(load_folded, folded=True, seal=seal, load_dense=load_dense)
    return SideKernels(load_dense, folded=False, seal=seal)
