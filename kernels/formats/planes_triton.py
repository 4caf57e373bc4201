"""Codes of whole blocks of a page, plane by plane: as integer tensor cores take them, and as
numbers for floating-point ones.

The layout is that of `packing.py`: a byte holds codes of several rows, and one
AND leaves those of a single row, plane p, at their bits:

    width   plane p of a row of bytes is    numbers in it, as int8
    8       the bytes                       code - 128
    4       bytes & 15, bytes & -16         code, 16 (code - 8)
    2       & 3, 12, 48, -64                code 4^p, the last 64 (code - 2)
    3       as 2, with high bits merged     code (1, 4, 16), the last 32 (code - 4);
                                            first for one half of the columns, then
                                            for the other

`unit` divides sums over a plane by the factor of its numbers. The caller adds the
last plane's offset, half the range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.base import Side
from kvmesh.kernels.formats.packing import PLANES
from kvmesh.kernels.formats.packing_triton import load_codes
from kvmesh.kernels.formats.planes_ptx import PlanesPtx

# What is subtracted from codes: nothing, half their range, or the midpoint of their range.
MIDDLES = {4: (0.0, 8.0, 7.5), 3: (0.0, 4.0, 3.5), 2: (0.0, 2.0, 1.5)}
_NUMBERS = {
    (width, middle): (PlanesPtx(width, middle).text(), PlanesPtx(width, middle).constraints)
    for width, middles in MIDDLES.items()
    for middle in middles
}
THREE_BITS = tl.constexpr(PlanesPtx(3, None).text())
_EIGHT = tl.constexpr(PlanesPtx(3, None).constraints)


@triton.constexpr_function
def planes_of(width: int) -> int:
    return PLANES[width]


@triton.constexpr_function
def _ptx(width: int, middle: float) -> str:
    return _NUMBERS[width, float(middle)][0]


@triton.constexpr_function
def _constraints(width: int, middle: float) -> str:
    return _NUMBERS[width, float(middle)][1]


@triton.constexpr_function
def _bf16_planes(width: int) -> tuple[tl.dtype, ...]:
    """The types of what the instructions return."""
    return (tl.bfloat16,) * (8 if width == 3 else PLANES[width])


@triton.jit
def _load_bytes(part_ptr, block, rows, SIDE: tl.constexpr, FORM: tl.constexpr):
    """Packed rows of a block of a page, [rows, columns] int8; with width 3 two halves of the
    columns, and the high bits of both."""
    WIDTH: tl.constexpr = SIDE.width
    COLUMNS: tl.constexpr = FORM.block_n if SIDE.values else FORM.head_dim
    SIZE: tl.constexpr = FORM.block_n * FORM.head_dim
    row_ptr = part_ptr + block * (SIZE // planes_of(WIDTH)) + rows[:, None] * COLUMNS
    if WIDTH == 3:
        HALF: tl.constexpr = COLUMNS // 2
        high_ptr = part_ptr + FORM.page_size * FORM.head_dim // 4 + block * (SIZE // 8)
        offs = tl.arange(0, HALF)[None, :]
        a, b = tl.load(row_ptr + offs), tl.load(row_ptr + HALF + offs)
        return a, b, tl.load(high_ptr + rows[:, None] * HALF + offs)
    else:
        return (tl.load(row_ptr + tl.arange(0, COLUMNS)[None, :]),)


@triton.jit
def _planes(x, WIDTH: tl.constexpr, PTX: tl.constexpr):
    """Bytes from `_load_bytes` -> int8 planes; with width 3 eight halves"""
    if WIDTH == 8:
        return x
    elif WIDTH == 4:
        return x[0] & 15, x[0] & -16
    elif WIDTH == 2:
        return x[0] & 3, x[0] & 12, x[0] & 48, x[0] & -64
    elif PTX:
        FOUR: tl.constexpr = (tl.int8, tl.int8, tl.int8, tl.int8)
        return tl.inline_asm_elementwise(
            THREE_BITS, _EIGHT, [x[0], x[1], x[2]], dtype=FOUR + FOUR, is_pure=True, pack=4
        )
    else:
        a, b, y = x
        z = y << 1
        return (
            (a & 3) | (y & 4),
            (a & 12) | (y & 16),
            (a & 48) | (y & 64),
            ((a >> 1) & 96) | (y & -128),
            (b & 3) | (z & 4),
            (b & 12) | (z & 16),
            (b & 48) | (z & 64),
            ((b >> 1) & 96) | ((y << 7) & -128),
        )


@triton.jit
def load_planes(part_ptr, block, rows, SIDE: tl.constexpr, FORM: tl.constexpr):
    """Planes of a block of a page, each [rows, columns] int8; with width 3 eight halves.

    rows: the packed rows to load, in order
    """
    return _planes(_load_bytes(part_ptr, block, rows, SIDE, FORM), SIDE.width, FORM.ptx)


@triton.jit
def unit(sums, P: tl.constexpr, WIDTH: tl.constexpr):
    """Sums over plane P's numbers -> sums over codes, for the last plane minus half their range."""
    if P == 0:
        return sums
    elif WIDTH == 4:
        return sums * 0.0625
    elif P == 1:
        return sums * 0.25
    elif P == 2:
        return sums * 0.0625
    elif WIDTH == 2:
        return sums * 0.015625
    else:
        return sums * 0.03125


@triton.constexpr_function
def has_planes(side: Side, form) -> bool:
    """Whether a tile consists of planes of a whole block of a page, without padding."""
    whole = form.block_d == form.head_dim and form.block_n == min(64, form.page_size)
    return side.width in MIDDLES and whole


@triton.jit
def load_numbers(
    part_ptr,
    first_slot,
    SIDE: tl.constexpr,
    MIDDLE: tl.constexpr,
    DTYPE: tl.constexpr,
    FORM: tl.constexpr,
):
    """Codes minus MIDDLE of a tile of sealed keys that begins at first_slot, exact in DTYPE: for
    keys [block_n, block_d], for values transposed."""
    WIDTH: tl.constexpr = SIDE.width
    if has_planes(SIDE, FORM):
        ROWS: tl.constexpr = (FORM.head_dim if SIDE.values else FORM.block_n) // planes_of(WIDTH)
        x = _load_bytes(part_ptr, first_slot // FORM.block_n, tl.arange(0, ROWS), SIDE, FORM)
        return _together(_numbers(x, WIDTH, MIDDLE, DTYPE), SIDE.values)
    else:
        LESS: tl.constexpr = MIDDLE - (1 << (WIDTH - 1))
        codes = load_codes(part_ptr, first_slot, SIDE, FORM)
        return (codes.to(tl.float32) - LESS).to(DTYPE)


@triton.jit
def _numbers(x, WIDTH: tl.constexpr, MIDDLE: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes from `_load_bytes` -> planes of codes minus MIDDLE, in DTYPE"""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        y = tl.inline_asm_elementwise(
            _ptx(WIDTH, MIDDLE),
            _constraints(WIDTH, MIDDLE),
            x,
            dtype=_bf16_planes(WIDTH),
            is_pure=True,
            pack=4,
        )
        return _of_halves(y) if WIDTH == 3 else y
    else:
        PLANES: tl.constexpr = planes_of(WIDTH)
        TOP: tl.constexpr = 1 << (WIDTH - 1)  # of the last plane
        planes = _planes(x, WIDTH, False)
        if WIDTH == 3:
            planes = _of_halves(planes)
        found = ()
        for p in tl.static_range(PLANES):
            less = MIDDLE - (TOP if p == PLANES - 1 else 0)
            y = unit(planes[p].to(tl.float32), p, WIDTH) - less
            found = found + (y.to(DTYPE),)  # noqa: RUF005
        return found


@triton.jit
def _of_halves(x):
    return (
        _side_by_side(x[0], x[4]),
        _side_by_side(x[1], x[5]),
        _side_by_side(x[2], x[6]),
        _side_by_side(x[3], x[7]),
    )


@triton.jit
def _side_by_side(a, b):
    """[rows, columns] twice -> [rows, 2 columns]"""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def _together(planes, VALUES: tl.constexpr):
    """Planes -> keys [tokens, channels], values [channels, tokens]."""
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
