"""Packed codes as numbers for floating-point tensor cores, plane by plane.

In bf16 a few PTX instructions turn four bytes into codes (`numbers_ptx.py`). Other dtypes
use integer arithmetic, and so does the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.base import Side
from kvmesh.kernels.formats.numbers_ptx import MIDDLES, numbers_ptx
from kvmesh.kernels.formats.packing_triton import load_codes
from kvmesh.kernels.formats.tiles_triton import as_int16, load, load_scale

_PTX = {(width, x): numbers_ptx(width, x) for width, found in MIDDLES.items() for x in found}
# Two registers of each plane, or half a plane, and the words.
_REGISTERS = {
    width: ",".join(["=&r"] * (2 * planes) + ["r"] * words)
    for width, planes, words in ((4, 2, 1), (3, 8, 3), (2, 4, 1))
}


@triton.constexpr_function
def planes_of(width: int) -> int:
    return {4: 2, 3: 4, 2: 4}[width]


@triton.constexpr_function
def _ptx(width: int, middle: float) -> str:
    return _PTX[width, float(middle)]


@triton.constexpr_function
def _registers(width: int) -> str:
    return _REGISTERS[width]


@triton.constexpr_function
def has_planes(side: Side, page_size: int, head_dim: int, block_n: int, block_d: int) -> bool:
    """Whether a tile consists of planes of a whole block of a page, without padding."""
    return side.width in MIDDLES and block_d == head_dim and block_n == min(64, page_size)


@triton.jit
def load_planes(
    part_ptr,
    first_slot,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    MIDDLE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Codes minus MIDDLE of the block that begins at first_slot: a tuple of planes, each [tokens,
    channels] for keys, transposed for values, in DTYPE; HEAD_DIM and BLOCK are powers of two"""
    WIDTH: tl.constexpr = SIDE.width
    PLANES: tl.constexpr = planes_of(WIDTH)
    ROWS: tl.constexpr = (HEAD_DIM if SIDE.values else BLOCK) // PLANES
    COLUMNS: tl.constexpr = BLOCK if SIDE.values else HEAD_DIM
    block = first_slot // BLOCK
    row = tl.arange(0, ROWS)[:, None]
    codes_ptr = part_ptr + block * (ROWS * COLUMNS)
    PTX: tl.constexpr = tl.bfloat16 == DTYPE
    if WIDTH == 3:
        HALF: tl.constexpr = COLUMNS // 2
        at = row * COLUMNS + tl.arange(0, HALF)[None, :]
        high_at = row * HALF + tl.arange(0, HALF)[None, :]
        high_ptr = part_ptr + PAGE_SIZE * HEAD_DIM // 4 + block * (ROWS * HALF)
        a, b, y = (
            tl.load(codes_ptr + at),
            tl.load(codes_ptr + HALF + at),
            tl.load(high_ptr + high_at),
        )
        if PTX:
            x = tl.inline_asm_elementwise(
                _ptx(WIDTH, MIDDLE),
                _registers(WIDTH),
                [a, b, y],
                dtype=(
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                ),
                is_pure=True,
                pack=4,
            )
        else:
            z = y << 1
            x = (
                _less((a & 3) | (y & 4), MIDDLE, DTYPE),
                _less(((a >> 2) & 3) | ((y >> 2) & 4), MIDDLE, DTYPE),
                _less(((a >> 4) & 3) | ((y >> 4) & 4), MIDDLE, DTYPE),
                _less(((a >> 6) & 3) | (((y >> 5) & 4) ^ 4), MIDDLE, DTYPE),
                _less((b & 3) | (z & 4), MIDDLE, DTYPE),
                _less(((b >> 2) & 3) | ((z >> 2) & 4), MIDDLE, DTYPE),
                _less(((b >> 4) & 3) | ((z >> 4) & 4), MIDDLE, DTYPE),
                _less(((b >> 6) & 3) | (((y << 2) & 4) ^ 4), MIDDLE, DTYPE),
            )
        return (
            _side_by_side(x[0], x[4]),
            _side_by_side(x[1], x[5]),
            _side_by_side(x[2], x[6]),
            _side_by_side(x[3], x[7]),
        )
    else:
        x = tl.load(codes_ptr + row * COLUMNS + tl.arange(0, COLUMNS)[None, :])
        if WIDTH == 4:
            if PTX:
                return tl.inline_asm_elementwise(
                    _ptx(WIDTH, MIDDLE),
                    _registers(WIDTH),
                    [x],
                    dtype=(tl.bfloat16, tl.bfloat16),
                    is_pure=True,
                    pack=4,
                )
            else:
                return _less(x & 15, MIDDLE, DTYPE), _less(((x >> 4) & 15) ^ 8, MIDDLE, DTYPE)
        else:
            if PTX:
                return tl.inline_asm_elementwise(
                    _ptx(WIDTH, MIDDLE),
                    _registers(WIDTH),
                    [x],
                    dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                    is_pure=True,
                    pack=4,
                )
            else:
                return (
                    _less(x & 3, MIDDLE, DTYPE),
                    _less((x >> 2) & 3, MIDDLE, DTYPE),
                    _less((x >> 4) & 3, MIDDLE, DTYPE),
                    _less(((x >> 6) & 3) ^ 2, MIDDLE, DTYPE),
                )


@triton.jit
def _less(codes, MIDDLE: tl.constexpr, DTYPE: tl.constexpr):
    return (codes.to(tl.float32) - MIDDLE).to(DTYPE)


@triton.jit
def _side_by_side(a, b):
    """[rows, columns] twice -> [rows, 2 columns]"""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def together(planes, VALUES: tl.constexpr):
    """Planes from `load_planes` -> keys [tokens, channels], values [channels, tokens]."""
    R: tl.constexpr = planes[0].shape[0]
    C: tl.constexpr = planes[0].shape[1]
    if len(planes) == 2:
        x = tl.join(planes[0], planes[1])
        x = x.permute(2, 0, 1) if VALUES else x.permute(0, 2, 1)
        return x.reshape(2 * R, C)
    else:
        x = tl.join(tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3]))
        x = x.permute(2, 3, 0, 1) if VALUES else x.permute(0, 2, 3, 1)
        return x.reshape(4 * R, C)


@triton.jit
def load_numbers(
    part_ptr,
    first_slot,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIDDLE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Codes minus MIDDLE, exact in DTYPE: for keys [BLOCK_N, BLOCK_D], for values transposed"""
    if has_planes(SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D):
        planes = load_planes(
            part_ptr, first_slot, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, MIDDLE, DTYPE
        )
        return together(planes, SIDE.values)
    else:
        LESS: tl.constexpr = MIDDLE - (1 << (SIDE.width - 1))
        codes = load_codes(part_ptr, first_slot, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D)
        return (codes.to(tl.float32) - LESS).to(DTYPE)


@triton.jit
def load_number(ptr, index, mask, STORED: tl.constexpr, DTYPE: tl.constexpr):
    """Stored bf16 or e5m3 numbers: as bf16 without a conversion if DTYPE is bf16, otherwise fp32"""
    if DTYPE != tl.bfloat16:  # noqa: SIM300
        return load_scale(ptr, index, mask, STORED)
    elif STORED == "bf16":
        return load(as_int16(ptr) + index, mask).to(tl.bfloat16, bitcast=True)
    else:
        bits = ((load(ptr + index, mask).to(tl.int16) & 255) << 4) + (107 << 7)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def fused(x, scale, offset, DTYPE: tl.constexpr):
    """x * scale + offset, rounded once; scale and offset from `load_number`, broadcast"""
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
