"""PTX that turns four packed bytes (`packing.py`) into planes: of int8 or of bf16 numbers.

int8   A plane's numbers are the codes where they lie in their bytes, see `planes_triton.py`; only
       width 3, whose codes lie in two bytes, needs more than an AND.
bf16   A code at bits k to k + width - 1 of a 16-bit lane, k + width <= 7, can be the mantissa of a
       bf16 number: with the exponent of 2^(7 - k) above it, the lane is 2^(7 - k) + code, and one
       exact fused multiply-add removes the power. Four bytes become their codes, two per
       register, for about two instructions per code.
"""

from __future__ import annotations

# How a plane's bits are moved: (source, bits to the left) for the bytes of width 2 and 4, or for
# the low and the high bits of width 3; and the bit of the lane at which the code then begins.
# Sources are the bytes, with width 3 those of both halves of the columns; y has their high bits.
Place = tuple[tuple[tuple[str, int], ...], int]
_INT8: dict[int, list[Place]] = {
    3: [
        ((("a", 0), ("y", 0)), 0),
        ((("a", 0), ("y", 0)), 2),
        ((("a", 0), ("y", 0)), 4),
        ((("a", -1), ("y", 0)), 5),
        ((("b", 0), ("y", 1)), 0),
        ((("b", 0), ("y", 1)), 2),
        ((("b", 0), ("y", 1)), 4),
        ((("b", -1), ("y", 7)), 5),
    ],
}
_BF16: dict[int, list[Place]] = {
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


class PlanesPtx:
    """One block of instructions. Its operands are the outputs, plane by plane, then the sources.

    middle: None for int8; for bf16 what is subtracted from codes
    """

    def __init__(self, width: int, middle: float | None) -> None:
        self.places = (_INT8 if middle is None else _BF16)[width]
        self.sources = ("a", "b", "y") if width == 3 else ("a",)
        self.words = 1 if middle is None else 2  # registers of a plane
        self._width, self._middle = width, middle
        self._lines: list[str] = []
        self._names: dict[str, str] = {}  # registers, and the constants that they begin with

    @property
    def constraints(self) -> str:
        """As `inline_asm_elementwise` takes them."""
        return ",".join(["=&r"] * (self.words * len(self.places)) + ["r"] * len(self.sources))

    def text(self) -> str:
        outputs = self.words * len(self.places)
        for i, source in enumerate(self.sources):
            if self._middle is None:
                self._name(f"{source}0")
                self._lines.append(f"mov.b32 {source}0, ${outputs + i};")
                continue
            for word, selector in enumerate((0x4140, 0x4342)):  # two bytes, with zeros above them
                self._name(f"{source}{word}")
                self._lines.append(f"prmt.b32 {source}{word}, ${outputs + i}, 0, {selector:#x};")
        for word in range(self.words):
            for plane, place in enumerate(self.places):
                self._plane(plane, word, *place)
        moves = [f"mov.b32 {name}, {value};" for name, value in self._names.items() if value]
        declared = f"{{ .reg .b32 {', '.join([*self._names, 't'])};"
        return " ".join((declared, *moves, *self._lines, "}"))

    def _plane(self, plane: int, word: int, parts: tuple[tuple[str, int], ...], at: int) -> None:
        code, *high = (self._shifted(f"{name}{word}", by) for name, by in parts)
        if high:
            # 0xe4: the first where the third is set, otherwise the second
            self._lines.append(f"lop3.b32 t, {code}, {high[0]}, {self._lanes(3 << at)}, 0xe4;")
            code = "t"
        mask = self._lanes(((1 << self._width) - 1) << at)
        if self._middle is None:
            self._lines.append(f"and.b32 ${plane}, {code}, {mask};")
            return
        base = _bf16(2.0 ** (7 - at))
        count = len(self.places) // (2 if self._width == 3 else 1)
        if plane % count == count - 1:  # its highest bit is stored flipped
            base ^= 1 << (at + self._width - 1)
        # 0x6a: (the first & the second) ^ the third
        self._lines.append(f"lop3.b32 t, {code}, {mask}, {self._lanes(base)}, 0x6a;")
        less = self._constant(_bf16(-(2.0 ** (7 - at)) - self._middle))
        one = self._constant(_bf16(1.0))
        self._lines.append(f"fma.rn.bf16x2 ${self.words * plane + word}, t, {one}, {less};")

    def _shifted(self, register: str, by: int) -> str:
        if by == 0:
            return register
        name = f"{register}{'l' if by > 0 else 'r'}{abs(by)}"
        if name not in self._names:
            opcode = "shl.b32" if by > 0 else "shr.u32"
            self._lines.append(f"{opcode} {self._name(name)}, {register}, {abs(by)};")
        return name

    def _constant(self, lane: int) -> str:
        return self._name(f"c{lane:x}", self._lanes(lane))

    def _name(self, name: str, value: str = "") -> str:
        self._names.setdefault(name, value)
        return name

    def _lanes(self, lane: int) -> str:
        """A word with that number in every lane."""
        return f"{lane * (0x01010101 if self._middle is None else 0x10001):#x}"


def _bf16(x: float) -> int:
    """The bits of a number that bf16 represents exactly."""
    power, size = 0, abs(x)
    while size >= 2.0:
        size, power = size / 2, power + 1
    assert size >= 1.0 and (size * 128).is_integer(), x
    return (0x8000 if x < 0 else 0) | (127 + power) << 7 | int((size - 1.0) * 128)
