"""Triton functions of `Codebook`. Tiles are folded: codes minus the middle, exact in 16 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.codebook import reference
from kvmesh.kernels.formats.codebook.side import UNIFORM_STEP, Codebook
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
    load_scale,
    store_scale,
)

BOUNDARIES = {width: reference.boundaries(width).tolist() for width in UNIFORM_STEP}


@triton.constexpr_function
def uniform_step(width: int) -> float:
    return UNIFORM_STEP[width]


@triton.constexpr_function
def boundary(width: int, index: int) -> float:
    return BOUNDARIES[width][index]


@triton.jit
def load_tile(part_ptr, first_slot, SIDE: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr):
    MIDDLE: tl.constexpr = ((1 << SIDE.width) - 1) / 2
    tile = load_numbers(part_ptr, first_slot, SIDE, MIDDLE, DTYPE, FORM)
    scale_ptr = part_ptr + packed_bytes(SIDE.width, FORM.page_size, FORM.head_dim)
    scale = load_scale(scale_ptr, first_slot + tl.arange(0, FORM.block_n), None, SIDE.scale)
    return tl.trans(tile) if SIDE.values else tile, scale * uniform_step(SIDE.width), None


@triton.jit
def seal(hot_ptr, part_ptr, SIDE: tl.constexpr, FORM: tl.constexpr):
    PAGE_SIZE: tl.constexpr = FORM.page_size
    HEAD_DIM: tl.constexpr = FORM.head_dim
    BLOCK: tl.constexpr = block_tokens(PAGE_SIZE)
    MIDDLE: tl.constexpr = ((1 << SIDE.width) - 1) / 2
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
            codes += (normal > boundary(SIDE.width, i)).to(tl.int32)
        chosen = (codes.to(tl.float32) - MIDDLE) * uniform_step(SIDE.width)
        shared = tl.sum(y * chosen, 1)
        some = rms > 1e-30
        scale = tl.where(some, squares / tl.where(some, shared, 1.0), 0.0) * top
        # A quarter of bf16's maximum: the outermost level times this is still finite.
        scale = tl.minimum(tl.maximum(scale, SCALE_FLOOR), 0.25 * BF16_MAX)
        store_scale(scale_ptr, n, scale, mask_n, SIDE.scale)
        store_codes(codes, part_ptr, block, SIDE, FORM)


def kernels(side: Codebook) -> SideKernels:
    return SideKernels(load_tile, folded=True, seal=seal)
