"""Packed codes as the numbers that a floating-point tensor core multiplies, plane by plane.

A code at bits k to k + width - 1 of a 16-bit lane, k + width <= 7, can be the mantissa of a
bf16 number: with the exponent of 2^(7 - k) above it, the lane is 2^(7 - k) + code, and one
exact fused product-sum takes away the power. Four bytes become their codes, two to a
register, for about two instructions a code. Other dtypes go by integers, and so does
the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.base import Side
from kvmesh.kernels.formats.tiles_triton import as_int16, load, load_scale

# How planes of a byte, or of the low and high bits of width 3, are moved: (register, bits to the
# left), and the bit at which the code then begins. The last plane's highest bit is flipped.
_PLACES: dict[int, list[tuple[tuple[tuple[str, int], ...], int]]] = {
    4: [((("a", 3),), 3), ((("a", -1),), 3)],
    2: [((("a", 1),), 1), ((("a", 0),), 2), ((("a", 0),), 4), ((("a", -1),), 5)],
    3: [
        ((("a", 1), ("y", 1)), 1),
        ((("a", 0), ("y", 0)), 2),
        ((("a", 0), ("y", 0)), 4),
        ((("a", -2), ("y", -1)), 4),
        ((("b", 1), ("y", 2)), 1),
        ((("b", 0), ("y", 1)), 2),
        ((("b", 0), ("y", 1)), 4),
        ((("b", -2), ("y", 6)), 4),
    ],
}


@triton.constexpr_function
def planes_of(width: int) -> int:
    return {4: 2, 3: 4, 2: 4}[width]


def _bf16(x: float) -> int:
    """The bits of a number that has few of them."""
    power, size = 0, abs(x)
    while size >= 2.0:
        size, power = size / 2, power + 1
    assert size >= 1.0 and (size * 128).is_integer(), x
    return (0x8000 if x < 0 else 0) | (127 + power) << 7 | int((size - 1.0) * 128)


def numbers_ptx(width: int, middle: float) -> str:
    """PTX of four bytes to bf16 codes less `middle`, two registers a plane, in order; of width 3
    of the low bits of both halves of the columns and of the high bits, the planes of one half
    and then those of the other."""
    sources = ("a", "b", "y") if width == 3 else ("a",)
    planes, outputs = planes_of(width), 2 * len(_PLACES[width])
    lines, constants, moved = [], dict[int, str](), set[str]()

    def constant(lane: int) -> str:
        return constants.setdefault(lane, f"c{len(constants)}")

    def shifted(register: str, by: int) -> str:
        if by == 0:
            return register
        name = f"{register}{'l' if by > 0 else 'r'}{abs(by)}"
        if name not in moved:
            moved.add(name)
            opcode = "shl.b32" if by > 0 else "shr.u32"
            lines.append(f"{opcode} {name}, {register}, {abs(by)};")
        return name

    for i, source in enumerate(sources):
        for pair, selector in enumerate((0x4140, 0x4342)):  # two bytes, with zeros above them
            lines.append(f"prmt.b32 {source}{pair}, ${outputs + i}, 0, {selector:#x};")
    for pair in range(2):
        for index, (parts, at) in enumerate(_PLACES[width]):
            code, *high = (shifted(f"{name}{pair}", by) for name, by in parts)
            if high:
                # 0xe4: the first where the third is set, else the second
                lines.append(f"lop3.b32 t, {code}, {high[0]}, {_twice(3 << at)}, 0xe4;")
                code = "t"
            base = _bf16(2.0 ** (7 - at))
            if index % planes == planes - 1:
                base ^= 1 << (at + width - 1)
            # 0x6a: (the first & the second) ^ the third
            mask = ((1 << width) - 1) << at
            lines.append(f"lop3.b32 t, {code}, {_twice(mask)}, {_twice(base)}, 0x6a;")
            less = constant(_bf16(-(2.0 ** (7 - at)) - middle))
            lines.append(f"fma.rn.bf16x2 ${2 * index + pair}, t, {constant(_bf16(1.0))}, {less};")
    moves = [f"mov.b32 {name}, {_twice(lane)};" for lane, name in constants.items()]
    names = [f"{source}{pair}" for source in sources for pair in range(2)]
    names += [*sorted(moved), *constants.values(), "t"]
    return " ".join((f"{{ .reg .b32 {', '.join(names)};", *moves, *lines, "}"))


def _twice(lane: int) -> str:
    return f"{lane * 0x10001:#x}"


# What codes come less: nothing, half their range, or the middle between the least and the greatest.
MIDDLES = {4: (0.0, 8.0, 7.5), 3: (0.0, 4.0, 3.5), 2: (0.0, 2.0, 1.5)}
_PTX = {(width, x): numbers_ptx(width, x) for width, found in MIDDLES.items() for x in found}
# Two registers of each plane, or half a plane, and the words.
_REGISTERS = {
    width: ",".join(["=&r"] * (2 * planes) + ["r"] * words)
    for width, planes, words in ((4, 2, 1), (3, 8, 3), (2, 4, 1))
}


@triton.constexpr_function
def _ptx(width: int, middle: float) -> str:
    return _PTX[width, float(middle)]


@triton.constexpr_function
def _registers(width: int) -> str:
    return _REGISTERS[width]


@triton.constexpr_function
def has_planes(side: Side, page_size: int, head_dim: int, block_n: int, block_d: int) -> bool:
    """Whether a tile is planes of a whole block of a page, without padding."""
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
    """Codes less MIDDLE of the block that first_slot begins: a tuple of planes, each [tokens,
    channels] of keys and transposed of values, in DTYPE; HEAD_DIM and BLOCK are powers of two"""
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
    """Planes, as `load_planes` gives them -> keys [tokens, channels], values [channels, tokens]."""
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
def load_number(ptr, index, mask, STORED: tl.constexpr, DTYPE: tl.constexpr):
    """Stored bf16 or e5m3 numbers: in bf16, where DTYPE is that, without a conversion; else fp32"""
    if DTYPE != tl.bfloat16:  # noqa: SIM300
        return load_scale(ptr, index, mask, STORED)
    elif STORED == "bf16":
        return load(as_int16(ptr) + index, mask).to(tl.bfloat16, bitcast=True)
    else:
        bits = ((load(ptr + index, mask).to(tl.int16) & 255) << 4) + (107 << 7)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def fused(x, scale, offset, DTYPE: tl.constexpr):
    """x * scale + offset rounded once; scale and offset as `load_number` gives them, broadcast"""
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
