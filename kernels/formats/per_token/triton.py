"""Tile functions of the formats `int8` and `int4` for the Triton kernels.

The layout and the rounding are the reference's; encoding gives equal bytes. It
uses only operations that IEEE 754 defines (correctly rounded division, floor,
bit masks), and the one product that a compiler might fuse is by a power of two.

Loading gives codes less their middle (128 or 8) rather than dequantised
numbers: the attention loop folds the scale into scores and weights, and the
middle into the minimum. Centred codes keep q·codes and p·codes as small as the
numbers they stand for, so that rounding p to 16 bits costs no more than for
exact values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvmesh.kernels.formats.base import KVFormat, TileKernels

# Four codes in a register, $2, become two registers of two bf16 numbers each. A
# bf16 number from 128 to 255 holds the low 7 bits of its whole part as its
# mantissa: 0x4300 | (code & 127) is 128 + (code & 127). From it comes 128 (0x4300)
# where the code's top bit is set, else 256 (0x4380); a fused multiply-add is the
# subtraction that sm_80 has.
CENTRED_8_PTX = tl.constexpr("""{
    .reg .b32 x, y, a, b, minus;
    mov.b32 minus, 0xbf80bf80;
    prmt.b32 x, $2, 0, 0x4140;
    prmt.b32 y, $2, 0, 0x4342;
    lop3.b32 a, x, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, x, 0x00800080, 0x43004300, 0xae;
    fma.rn.bf16x2 $0, b, minus, a;
    lop3.b32 a, y, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, y, 0x00800080, 0x43004300, 0xae;
    fma.rn.bf16x2 $1, b, minus, a;
}""")

# Four bytes in $4 become the low nibbles, then the high ones, less 8: 128 + code,
# less 136.
CENTRED_4_PTX = tl.constexpr("""{
    .reg .b32 x, y, a, b, one, less;
    mov.b32 one, 0x3f803f80;
    mov.b32 less, 0xc308c308;
    prmt.b32 x, $4, 0, 0x4140;
    prmt.b32 y, $4, 0, 0x4342;
    lop3.b32 a, x, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 b, y, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, a, one, less;
    fma.rn.bf16x2 $1, b, one, less;
    shr.b32 x, x, 4;
    shr.b32 y, y, 4;
    lop3.b32 a, x, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 b, y, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $2, a, one, less;
    fma.rn.bf16x2 $3, b, one, less;
}""")


def views(sealed: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The sealed arena as the tile functions read it: codes, and the bits of bf16 metadata."""
    return sealed, sealed.view(torch.int16)


@triton.jit
def _load_meta(
    meta_ptr, page_row, slots, V: tl.constexpr, PAGE_SIZE: tl.constexpr, CODES: tl.constexpr
):
    """CODES: bytes of a page's codes, K and V"""
    page_ptr = meta_ptr + page_row * (CODES // 2 + 4 * PAGE_SIZE) + CODES // 2
    offs = 2 * V * PAGE_SIZE + slots
    scale = tl.load(page_ptr + offs).to(tl.int32) << 16
    minimum = tl.load(page_ptr + PAGE_SIZE + offs).to(tl.int32) << 16
    return scale.to(tl.float32, bitcast=True), minimum.to(tl.float32, bitcast=True)


@triton.jit
def _centred_8(codes, DTYPE: tl.constexpr):
    """[N, HALF] uint8 -> codes - 128"""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            CENTRED_8_PTX,
            "=r,=r,r",
            [codes],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        # code ^ 128 read as signed is code - 128
        return (codes ^ 128).to(tl.int8, bitcast=True).to(DTYPE)


@triton.jit
def _centred_4(pairs, DTYPE: tl.constexpr):
    """[N, HALF] uint8, two codes each -> low codes - 8, high codes - 8"""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            CENTRED_4_PTX,
            "=r,=r,=r,=r,r",
            [pairs],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        # Flipping a nibble's top bit makes it its code less 8 in two's complement;
        # shifting it up and arithmetically down again extends the sign.
        signed = pairs ^ 0x88
        low = ((signed << 4).to(tl.int8, bitcast=True) >> 4).to(DTYPE)
        return low, (signed.to(tl.int8, bitcast=True) >> 4).to(DTYPE)


@triton.jit
def load_tile_8(
    data_ptr,
    meta_ptr,
    page_row,
    slots,
    V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
):
    CODES: tl.constexpr = 2 * PAGE_SIZE * HEAD_DIM
    offs_d = tl.arange(0, HALF)
    page_ptr = data_ptr + page_row * (CODES + 8 * PAGE_SIZE)
    row_ptr = page_ptr + (V * PAGE_SIZE + slots)[:, None] * HEAD_DIM + offs_d[None, :]
    if HALF * 2 == HEAD_DIM:
        low = tl.load(row_ptr)
        high = tl.load(row_ptr + HEAD_DIM // 2)
    else:
        mask_d = (offs_d < HEAD_DIM // 2)[None, :]
        low = tl.load(row_ptr, mask=mask_d, other=128)
        high = tl.load(row_ptr + HEAD_DIM // 2, mask=mask_d, other=128)
    scale, minimum = _load_meta(meta_ptr, page_row, slots, V, PAGE_SIZE, CODES)
    return _centred_8(low, DTYPE), _centred_8(high, DTYPE), scale, minimum + 128.0 * scale


@triton.jit
def load_tile_4(
    data_ptr,
    meta_ptr,
    page_row,
    slots,
    V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
):
    CODES: tl.constexpr = PAGE_SIZE * HEAD_DIM
    offs_d = tl.arange(0, HALF)
    page_ptr = data_ptr + page_row * (CODES + 8 * PAGE_SIZE)
    row_ptr = page_ptr + (V * PAGE_SIZE + slots)[:, None] * (HEAD_DIM // 2) + offs_d[None, :]
    if HALF * 2 == HEAD_DIM:
        pairs = tl.load(row_ptr)
    else:
        pairs = tl.load(row_ptr, mask=(offs_d < HEAD_DIM // 2)[None, :], other=0x88)
    scale, minimum = _load_meta(meta_ptr, page_row, slots, V, PAGE_SIZE, CODES)
    low, high = _centred_4(pairs, DTYPE)
    return low, high, scale, minimum + 8.0 * scale


@triton.jit
def _round_up_to_bf16(x):
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _round_down_to_bf16(x):
    bits = x.to(tl.int32, bitcast=True)
    away = tl.where(x < 0, 0xFFFF, 0)
    rounded = ((bits + away) & -65536).to(tl.float32, bitcast=True)
    return tl.maximum(rounded, -3.3895313892515355e38)


@triton.jit
def _encode(low, high, offs_d, HEAD_DIM: tl.constexpr, LEVELS: tl.constexpr):
    """Codes as fp32 whole numbers, scale and minimum; see the reference."""
    used = (offs_d < HEAD_DIM // 2)[None, :]
    low = low.to(tl.float32) * 0.5
    high = high.to(tl.float32) * 0.5
    least = tl.minimum(
        tl.min(tl.where(used, low, float("inf")), 1), tl.min(tl.where(used, high, float("inf")), 1)
    )
    most = tl.maximum(
        tl.max(tl.where(used, low, float("-inf")), 1),
        tl.max(tl.where(used, high, float("-inf")), 1),
    )
    minimum = _round_down_to_bf16(least * 2.0)
    half_min = minimum * 0.5
    half_scale = tl.math.div_rn(most - half_min, tl.full(most.shape, LEVELS, tl.float32))
    scale = _round_up_to_bf16(tl.maximum(half_scale * 2.0, 2.350988701644575e-38))
    step = tl.broadcast_to((scale * 0.5)[:, None], low.shape)
    low = tl.floor(tl.math.div_rn(low - half_min[:, None], step) + 0.5)
    high = tl.floor(tl.math.div_rn(high - half_min[:, None], step) + 0.5)
    low = tl.minimum(tl.maximum(low, 0.0), LEVELS)
    high = tl.minimum(tl.maximum(high, 0.0), LEVELS)
    return low.to(tl.uint8), high.to(tl.uint8), scale, minimum


@triton.jit
def _store_meta(
    scale,
    minimum,
    meta_ptr,
    page_row,
    slots,
    mask,
    V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CODES: tl.constexpr,
):
    page_ptr = meta_ptr + page_row * (CODES // 2 + 4 * PAGE_SIZE) + CODES // 2
    offs = 2 * V * PAGE_SIZE + slots
    scale = scale.to(tl.int32, bitcast=True) >> 16  # rounded to bf16 already: nothing is lost
    minimum = minimum.to(tl.int32, bitcast=True) >> 16
    tl.store(page_ptr + offs, scale.to(tl.int16), mask=mask)
    tl.store(page_ptr + PAGE_SIZE + offs, minimum.to(tl.int16), mask=mask)


@triton.jit
def store_tile_8(
    low,
    high,
    data_ptr,
    meta_ptr,
    page_row,
    slots,
    mask,
    V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    CODES: tl.constexpr = 2 * PAGE_SIZE * HEAD_DIM
    offs_d = tl.arange(0, HALF)
    mask_d = mask[:, None] & (offs_d < HEAD_DIM // 2)[None, :]
    low, high, scale, minimum = _encode(low, high, offs_d, HEAD_DIM, 255.0)
    page_ptr = data_ptr + page_row * (CODES + 8 * PAGE_SIZE)
    row_ptr = page_ptr + (V * PAGE_SIZE + slots)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(row_ptr, low, mask=mask_d)
    tl.store(row_ptr + HEAD_DIM // 2, high, mask=mask_d)
    _store_meta(scale, minimum, meta_ptr, page_row, slots, mask, V, PAGE_SIZE, CODES)


@triton.jit
def store_tile_4(
    low,
    high,
    data_ptr,
    meta_ptr,
    page_row,
    slots,
    mask,
    V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    CODES: tl.constexpr = PAGE_SIZE * HEAD_DIM
    offs_d = tl.arange(0, HALF)
    mask_d = mask[:, None] & (offs_d < HEAD_DIM // 2)[None, :]
    low, high, scale, minimum = _encode(low, high, offs_d, HEAD_DIM, 15.0)
    page_ptr = data_ptr + page_row * (CODES + 8 * PAGE_SIZE)
    row_ptr = page_ptr + (V * PAGE_SIZE + slots)[:, None] * (HEAD_DIM // 2) + offs_d[None, :]
    tl.store(row_ptr, low | (high << 4), mask=mask_d)
    _store_meta(scale, minimum, meta_ptr, page_row, slots, mask, V, PAGE_SIZE, CODES)


def kernels(fmt: KVFormat) -> TileKernels:
    if fmt.k_bits == 8:
        return TileKernels(views, load_tile_8, store_tile_8, affine=True)
    return TileKernels(views, load_tile_4, store_tile_4, affine=True)
