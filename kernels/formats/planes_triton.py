"""Codes as integer tensor cores take them: planes of packed bytes, without shifts.

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


def _three_bits() -> str:
    """Words of four bytes: the low bits $8 and $9 of the two halves of the columns and their high
    bits $10 become planes 0 to 3 of one half, $0 to $3, and of the other, $4 to $7."""
    lines = ["{ .reg .b32 t, x, z;"]

    def plane(register: int, low: str, high: str, low_bits: int, all_bits: int) -> None:
        # 0xe4: low where low_bits are set, otherwise high
        lines.append(f"lop3.b32 t, {low}, {high}, {low_bits * 0x01010101:#x}, 0xe4;")
        lines.append(f"and.b32 ${register}, t, {all_bits * 0x01010101:#x};")

    plane(0, "$8", "$10", 0x03, 0x07)
    plane(1, "$8", "$10", 0x0C, 0x1C)
    plane(2, "$8", "$10", 0x30, 0x70)
    lines.append("shr.u32 x, $8, 1;")
    plane(3, "x", "$10", 0x60, 0xE0)
    lines.append("shl.b32 z, $10, 1;")
    plane(4, "$9", "z", 0x03, 0x07)
    plane(5, "$9", "z", 0x0C, 0x1C)
    plane(6, "$9", "z", 0x30, 0x70)
    lines.append("shr.u32 x, $9, 1; shl.b32 z, $10, 7;")
    plane(7, "x", "z", 0x60, 0xE0)
    return " ".join(lines) + " }"


THREE_BITS_PTX = tl.constexpr(_three_bits())
_EIGHT_OUT = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r")


@triton.jit
def load_planes(
    ptr,
    high_ptr,
    rows,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PTX: tl.constexpr,
):
    """Planes of a table of packed rows, each [rows, COLUMNS] int8; with width 3 eight halves.

    rows: the rows to load, in order
    STRIDE: bytes from row to row; with width 3 it is COLUMNS
    high_ptr: width 3: where the table's high bits start
    PTX: whether to use instructions that the interpreter does not support
    """
    offs = tl.arange(0, COLUMNS)[None, :]
    row_ptr = ptr + rows[:, None] * STRIDE
    if WIDTH == 8:
        return (tl.load(row_ptr + offs),)
    elif WIDTH == 4:
        x = tl.load(row_ptr + offs)
        return x & 15, x & -16
    elif WIDTH == 2:
        x = tl.load(row_ptr + offs)
        return x & 3, x & 12, x & 48, x & -64
    else:
        HALF: tl.constexpr = COLUMNS // 2
        offs = tl.arange(0, HALF)[None, :]
        a = tl.load(row_ptr + offs)
        b = tl.load(row_ptr + HALF + offs)
        y = tl.load(high_ptr + rows[:, None] * HALF + offs)
        if PTX:
            return tl.inline_asm_elementwise(
                THREE_BITS_PTX,
                _EIGHT_OUT,
                [a, b, y],
                dtype=(
                    tl.int8,
                    tl.int8,
                    tl.int8,
                    tl.int8,
                    tl.int8,
                    tl.int8,
                    tl.int8,
                    tl.int8,
                ),
                is_pure=True,
                pack=4,
            )
        else:
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
