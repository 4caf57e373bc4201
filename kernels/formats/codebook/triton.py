"""Triton functions of `Codebook` without residual signs.

Tiles are folded: uniform levels are exact, as codes minus the middle, in halves;
others are rounded to the compute dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.codebook import reference
from kvmesh.kernels.formats.codebook.side import LLOYD_MAX, UNIFORM_STEP, Codebook
from kvmesh.kernels.formats.numbers_triton import load_numbers
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
    load_scale,
    store_scale,
)

BOUNDARIES = {
    (kind, width): reference.boundaries(Codebook(width, levels=kind)).tolist()
    for kind in ("uniform", "lloyd_max")
    for width in LLOYD_MAX
}


@triton.constexpr_function
def uniform_step(width: int) -> float:
    return UNIFORM_STEP[width]


@triton.constexpr_function
def positive_level(width: int, index: int) -> float:
    return LLOYD_MAX[width][index]


@triton.constexpr_function
def boundary(side: Codebook, index: int) -> float:
    return BOUNDARIES[side.levels, side.width][index]


@triton.jit
def levels(codes, SIDE: tl.constexpr):
    """codes minus half their range, int32 -> levels, fp32; uniform levels in units of their step"""
    if SIDE.levels == "uniform":
        return codes.to(tl.float32) + 0.5
    else:
        magnitude = tl.where(codes < 0, -1 - codes, codes)
        x = tl.full(codes.shape, positive_level(SIDE.width, 0), tl.float32)
        for i in tl.static_range(1, 1 << (SIDE.width - 1)):
            x = tl.where(magnitude == i, positive_level(SIDE.width, i), x)
        return tl.where(codes < 0, -x, x)


@triton.jit
def load_tile(
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
    UNIFORM: tl.constexpr = SIDE.levels == "uniform"
    if UNIFORM:
        MIDDLE: tl.constexpr = ((1 << SIDE.width) - 1) / 2
        tile = load_numbers(
            part_ptr, first_slot, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, MIDDLE, DTYPE
        )
    else:
        codes = load_codes(part_ptr, first_slot, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D)
        tile = levels(codes, SIDE).to(DTYPE)
    scale_ptr = part_ptr + packed_bytes(SIDE.width, PAGE_SIZE, HEAD_DIM)
    scale = load_scale(scale_ptr, slots, None, SIDE.scale)
    if UNIFORM:
        scale = scale * uniform_step(SIDE.width)
    return tl.trans(tile) if SIDE.values else tile, scale, None


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
    BLOCK: tl.constexpr = block_tokens(PAGE_SIZE)
    scale_ptr = part_ptr + packed_bytes(SIDE.width, PAGE_SIZE, HEAD_DIM)
    slots, mask_n = block_slots(PAGE_SIZE)
    channels, mask_d = block_channels(SIDE, HEAD_DIM)
    mask = mask_n[:, None] & mask_d[None, :]
    for block in range(PAGE_SIZE // BLOCK):
        n = block * BLOCK + slots
        at = n[:, None] * HEAD_DIM + channels[None, :]
        x = tl.load(hot_ptr + at, mask=mask, other=0.0).to(tl.float32)
        # Relative to the token's largest number, so that no square overflows or underflows.
        top = tl.maximum(tl.max(tl.abs(x), 1), SCALE_FLOOR)
        y = tl.math.div_rn(x, tl.broadcast_to(top[:, None], x.shape))
        squares = tl.sum(y * y, 1)
        rms = tl.maximum(tl.math.sqrt_rn(squares / HEAD_DIM), 1e-30)
        normal = tl.math.div_rn(y, tl.broadcast_to(rms[:, None], x.shape))
        codes = tl.zeros(x.shape, tl.int32)
        for i in tl.static_range((1 << SIDE.width) - 1):
            codes += (normal > boundary(SIDE, i)).to(tl.int32)
        if SIDE.norm == "eden":
            chosen = levels(codes - (1 << (SIDE.width - 1)), SIDE)
            if SIDE.levels == "uniform":
                chosen = chosen * uniform_step(SIDE.width)
            shared = tl.sum(y * chosen, 1)
            some = rms > 1e-30
            scale = tl.where(some, squares / tl.where(some, shared, 1.0), 0.0) * top
        else:
            scale = rms * top
        # A quarter of bf16's maximum: the outermost level times this is still finite.
        scale = tl.minimum(tl.maximum(scale, SCALE_FLOOR), 0.25 * BF16_MAX)
        store_scale(scale_ptr, n, scale, mask_n, SIDE.scale)
        store_codes(codes, part_ptr, block, SIDE, PAGE_SIZE, HEAD_DIM)


def kernels(side: Codebook) -> SideKernels:
    return SideKernels(load_tile, folded=True, seal=seal)
