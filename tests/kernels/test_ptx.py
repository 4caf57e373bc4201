"""The unpacking that only a GPU can run, checked by carrying its instructions out here."""

from __future__ import annotations

import numpy as np
import torch

from kvmesh.kernels.formats.per_token.triton import CENTRED_4_PTX, CENTRED_8_PTX


def run(ptx: str, word: int) -> dict[str, int]:
    """Registers after a block of prmt, lop3, shr, mov and bf16x2 fma; `$n` that is read is word."""
    registers: dict[str, int] = {}

    def value(operand: str) -> int:
        if operand in registers:
            return registers[operand]
        return word if operand.startswith("$") else int(operand, 0)

    for line in ptx.strip("{} \n").split(";"):
        opcode, _, rest = line.strip().partition(" ")
        if opcode in ("", ".reg"):
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        sources = [value(operand) for operand in operands]
        registers[target] = OPCODES[opcode](*sources)
    return registers


def prmt(a: int, b: int, selector: int) -> int:
    data = (b << 32) | a
    picked = [(data >> (8 * ((selector >> (4 * i)) & 7))) & 0xFF for i in range(4)]
    return sum(byte << (8 * i) for i, byte in enumerate(picked))


def lop3(a: int, b: int, c: int, table: int) -> int:
    bits = [((a >> i) & 1) << 2 | ((b >> i) & 1) << 1 | ((c >> i) & 1) for i in range(32)]
    return sum(((table >> bit) & 1) << i for i, bit in enumerate(bits))


def fma(a: int, b: int, c: int) -> int:
    x, y, z = (np.array(halves(word), dtype=np.float64) for word in (a, b, c))
    rounded = torch.from_numpy(x * y + z).to(torch.bfloat16).view(torch.int16).tolist()
    return (rounded[0] & 0xFFFF) | (rounded[1] & 0xFFFF) << 16


def halves(word: int) -> list[float]:
    bits = np.array([word & 0xFFFF, word >> 16], dtype=np.uint32) << 16
    return [float(x) for x in bits.view(np.float32)]


OPCODES = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, count: a >> count,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": fma,
}


def test_eight_bit_codes() -> None:
    for first in range(0, 256, 4):
        codes = [first, 255 - first, (first * 7) % 256, first + 3]
        registers = run(CENTRED_8_PTX.value, sum(code << (8 * i) for i, code in enumerate(codes)))
        got = halves(registers["$0"]) + halves(registers["$1"])
        assert got == [code - 128 for code in codes]


def test_four_bit_codes() -> None:
    for first in range(256):
        pairs = [first, 255 - first, (first * 7) % 256, (first + 85) % 256]
        registers = run(CENTRED_4_PTX.value, sum(pair << (8 * i) for i, pair in enumerate(pairs)))
        low, high = (
            halves(registers[a]) + halves(registers[b]) for a, b in (("$0", "$1"), ("$2", "$3"))
        )
        assert low == [(pair & 15) - 8 for pair in pairs]
        assert high == [(pair >> 4) - 8 for pair in pairs]
