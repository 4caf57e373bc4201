"""Triton functions of `Fp8`, in integer arithmetic, so that GPUs without e4m3 can run them.

An e4m3 number's bits, shifted to a 16-bit number's exponent and mantissa, give the number
divided by a power of two, 2^8 or 2^120 (the difference of the exponents' biases). This also
holds for subnormal numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.fp8 import reference
from kvmesh.kernels.formats.fp8.side import Fp8
from kvmesh.kernels.formats.packing_triton import block_tokens, load_codes
from kvmesh.kernels.formats.tiles_triton import (
    SideKernels,
    from_bf16,
    load_bf16,
    padded,
    store_bf16,
    to_bf16,
)

E4M3_MAX = tl.constexpr(reference.E4M3_MAX)
FLOOR = tl.constexpr(reference.SCALE_FLOOR)
ROWS = tl.constexpr(16)

# Four bytes in $2 become two registers of two bf16 numbers each. Each byte, with eight copies of
# its sign above it, is shifted left by 4, which puts the sign and the number's bits in place.
E4M3_PTX = tl.constexpr("""{
    .reg .b32 x, y, more, none;
    mov.b32 more, 0x7b807b80;
    mov.b32 none, 0x80008000;
    prmt.b32 x, $2, 0, 0x9180;
    prmt.b32 y, $2, 0, 0xb3a2;
    shl.b32 x, x, 4;
    shl.b32 y, y, 4;
    and.b32 x, x, 0x87f087f0;
    and.b32 y, y, 0x87f087f0;
    fma.rn.bf16x2 $0, x, more, none;
    fma.rn.bf16x2 $1, y, more, none;
}""")


@triton.jit
def from_e4m3(byte, DTYPE: tl.constexpr):
    """int8 -> DTYPE"""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            E4M3_PTX, "=&r,=&r,r", [byte], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        byte = byte.to(tl.int32)
        bits = ((byte & 0x7F) << 7) | ((byte & 0x80) << 8)
        return (bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(DTYPE)


@triton.jit
def to_e4m3(x):
    """fp32, at most 448 -> int8, rounded to nearest even"""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.abs(x)
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the steps are 2^-9: adding 1.5 * 2^14 leaves them in the lowest bits.
    small = (size + 24576.0).to(tl.int32, bitcast=True) & 15
    return (sign | tl.where(size < 2.0**-6, small, normal)).to(tl.int8)


@triton.jit
def _scale_ptr(part_ptr, SIDE: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    END: tl.constexpr = PAGE_SIZE * HEAD_DIM + (2 * HEAD_DIM if SIDE.centred else 0)
    return (part_ptr + END).to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def load_tile(part_ptr, first_slot, SIDE: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr):
    BLOCK_N: tl.constexpr = FORM.block_n
    # Numbers are laid out like 8-bit codes.
    x = from_e4m3(load_codes(part_ptr, first_slot, SIDE, FORM).to(tl.int8), DTYPE)
    scale = tl.load(_scale_ptr(part_ptr, SIDE, FORM.page_size, FORM.head_dim))
    scales = tl.zeros([BLOCK_N], tl.float32) + scale
    return tl.trans(x) if SIDE.values else x, scales, None


@triton.jit
def load_centre(part_ptr, FORM: tl.constexpr):
    offs_d = tl.arange(0, FORM.block_d)
    mask_d = None if FORM.block_d == FORM.head_dim else offs_d < FORM.head_dim
    return load_bf16(part_ptr + FORM.page_size * FORM.head_dim, offs_d, mask_d)


@triton.jit
def _place(n, d, SIDE: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where the number of slot n and channel d is stored."""
    if SIDE.values:
        BLOCK: tl.constexpr = block_tokens(PAGE_SIZE)
        return (n // BLOCK * HEAD_DIM + d) * BLOCK + n % BLOCK
    else:
        return n * HEAD_DIM + d


@triton.jit
def seal(hot_ptr, part_ptr, SIDE: tl.constexpr, FORM: tl.constexpr):
    PAGE_SIZE: tl.constexpr = FORM.page_size
    HEAD_DIM: tl.constexpr = FORM.head_dim
    offs_d = tl.arange(0, padded(HEAD_DIM))
    mask_d = offs_d < HEAD_DIM
    half_centre = tl.zeros(offs_d.shape, tl.float32)
    if SIDE.centred:
        for first in range(0, PAGE_SIZE, ROWS):
            # Divided first, so that no sum overflows.
            half_centre += tl.sum(_halves(hot_ptr, first, offs_d, HEAD_DIM) / PAGE_SIZE, 0)
        centre = from_bf16(to_bf16(half_centre * 2.0))
        store_bf16(part_ptr + PAGE_SIZE * HEAD_DIM, offs_d, centre, mask_d)
        half_centre = centre * 0.5
    largest = tl.zeros(offs_d.shape, tl.float32)
    for first in range(0, PAGE_SIZE, ROWS):
        half = _halves(hot_ptr, first, offs_d, HEAD_DIM) - half_centre[None, :]
        largest = tl.maximum(largest, tl.max(tl.abs(half), 0))
    half_scale = tl.maximum(tl.math.div_rn(tl.max(largest, 0), E4M3_MAX), FLOOR)
    # The scale, and zeros.
    offs_s = tl.arange(0, 4)
    scale_ptr = _scale_ptr(part_ptr, SIDE, PAGE_SIZE, HEAD_DIM)
    tl.store(scale_ptr + offs_s, tl.where(offs_s == 0, half_scale * 2.0, 0.0))
    for first in range(0, PAGE_SIZE, ROWS):
        half = _halves(hot_ptr, first, offs_d, HEAD_DIM) - half_centre[None, :]
        x = tl.math.div_rn(half, tl.zeros(half.shape, tl.float32) + half_scale)
        x = tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX)
        slots = (first + tl.arange(0, ROWS))[:, None]
        at = _place(slots, offs_d[None, :], SIDE, PAGE_SIZE, HEAD_DIM)
        mask = tl.broadcast_to(mask_d[None, :], at.shape)
        tl.store(part_ptr + at, to_e4m3(x), mask=mask)


@triton.jit
def _halves(hot_ptr, first, offs_d, HEAD_DIM: tl.constexpr):
    """Half of each number in 16 rows of the page, [16, channels] fp32; page_size % 16 == 0."""
    at = (first + tl.arange(0, ROWS))[:, None] * HEAD_DIM + offs_d[None, :]
    mask = tl.broadcast_to((offs_d < HEAD_DIM)[None, :], at.shape)
    return tl.load(hot_ptr + at, mask=mask, other=0.0).to(tl.float32) * 0.5


def kernels(side: Fp8) -> SideKernels:
    centre = load_centre if side.centred else None
    return SideKernels(load_tile, folded=True, seal=seal, load_centre=centre, one_warp=True)
