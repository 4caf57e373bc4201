"""PTX that turns packed codes into bf16 numbers, for `numbers_triton.py`.

A code at bits k to k + width - 1 of a 16-bit lane, k + width <= 7, can be the mantissa of a
bf16 number: with the exponent of 2^(7 - k) above it, the lane is 2^(7 - k) + code, and one
exact fused multiply-add removes the power. Four bytes become their codes, two per
register, for about two instructions per code.
"""

from __future__ import annotations

# How planes of a byte, or of the low and high bits of width 3, are shifted: (register, bits to the
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


# What is subtracted from codes: nothing, half their range, or the midpoint of their range.
MIDDLES = {4: (0.0, 8.0, 7.5), 3: (0.0, 4.0, 3.5), 2: (0.0, 2.0, 1.5)}


def numbers_ptx(width: int, middle: float) -> str:
    """PTX that turns four bytes into bf16 codes minus `middle`, two registers per plane, in order.
    With width 3 it takes the low bits of both halves of the columns and the high bits, and gives
    the planes of one half and then those of the other."""
    sources = ("a", "b", "y") if width == 3 else ("a",)
    planes, outputs = len(_PLACES[width]) // (2 if width == 3 else 1), 2 * len(_PLACES[width])
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
                # 0xe4: the first where the third is set, otherwise the second
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


def _bf16(x: float) -> int:
    """The bits of a number that bf16 represents exactly."""
    power, size = 0, abs(x)
    while size >= 2.0:
        size, power = size / 2, power + 1
    assert size >= 1.0 and (size * 128).is_integer(), x
    return (0x8000 if x < 0 else 0) | (127 + power) << 7 | int((size - 1.0) * 128)
