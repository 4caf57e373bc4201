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


def views(sealed: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The sealed arena as the tensors the tile functions read: codes, and metadata as the bits of bf16."""
    return sealed, sealed.view(torch.int16)


@triton.jit
def _load_meta(
    meta_ptr, page_row, slots, mask, V: tl.constexpr, PAGE_SIZE: tl.constexpr, CODES: tl.constexpr
):
    """CODES: bytes of a page's codes, K and V"""
    page_ptr = meta_ptr + page_row * (CODES // 2 + 4 * PAGE_SIZE) + CODES // 2
    offs = 2 * V * PAGE_SIZE + slots
    scale = tl.load(page_ptr + offs, mask=mask, other=0).to(tl.int32) << 16
    minimum = tl.load(page_ptr + PAGE_SIZE + offs, mask=mask, other=0).to(tl.int32) << 16
    return scale.to(tl.float32, bitcast=True), minimum.to(tl.float32, bitcast=True)


@triton.jit
def load_tile_8(
    data_ptr,
    meta_ptr,
    page_row,
    slots,
    mask,
    V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
):
    CODES: tl.constexpr = 2 * PAGE_SIZE * HEAD_DIM
    offs_d = tl.arange(0, HALF)
    mask_d = mask[:, None] & (offs_d < HEAD_DIM // 2)[None, :]
    page_ptr = data_ptr + page_row * (CODES + 8 * PAGE_SIZE)
    row_ptr = page_ptr + (V * PAGE_SIZE + slots)[:, None] * HEAD_DIM + offs_d[None, :]
    low = tl.load(row_ptr, mask=mask_d, other=128)
    high = tl.load(row_ptr + HEAD_DIM // 2, mask=mask_d, other=128)
    scale, minimum = _load_meta(meta_ptr, page_row, slots, mask, V, PAGE_SIZE, CODES)
    # code ^ 128 read as signed is code - 128
    low = (low ^ 128).to(tl.int8, bitcast=True).to(DTYPE)
    high = (high ^ 128).to(tl.int8, bitcast=True).to(DTYPE)
    return low, high, scale, minimum + 128.0 * scale


@triton.jit
def load_tile_4(
    data_ptr,
    meta_ptr,
    page_row,
    slots,
    mask,
    V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
):
    CODES: tl.constexpr = PAGE_SIZE * HEAD_DIM
    offs_d = tl.arange(0, HALF)
    mask_d = mask[:, None] & (offs_d < HEAD_DIM // 2)[None, :]
    page_ptr = data_ptr + page_row * (CODES + 8 * PAGE_SIZE)
    row_ptr = page_ptr + (V * PAGE_SIZE + slots)[:, None] * (HEAD_DIM // 2) + offs_d[None, :]
    byte = tl.load(row_ptr, mask=mask_d, other=0x88)
    scale, minimum = _load_meta(meta_ptr, page_row, slots, mask, V, PAGE_SIZE, CODES)
    # Flipping a nibble's top bit makes it its code less 8 in two's complement;
    # shifting it up and arithmetically down again extends the sign.
    signed = byte ^ 0x88
    low = ((signed << 4).to(tl.int8, bitcast=True) >> 4).to(DTYPE)
    high = (signed.to(tl.int8, bitcast=True) >> 4).to(DTYPE)
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
