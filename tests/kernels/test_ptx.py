"""The unpacking that only a GPU can run, checked by carrying its instructions out here."""

from __future__ import annotations

import re

import numpy as np
import torch

from kvmesh.kernels.formats.packing import pack
from kvmesh.kernels.formats.planes_triton import THREE_BITS_PTX


def run(ptx: str, words: dict[str, int]) -> dict[str, int]:
    """Registers after a block of lop3, and, shr and shl, from those in `words`."""
    registers = dict(words)
    for line in ptx.strip("{} \n").split(";"):
        opcode, _, rest = line.strip().partition(" ")
        if opcode in ("", ".reg"):
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        sources = [
            registers[operand] if operand in registers else int(operand, 0) for operand in operands
        ]
        registers[target] = OPCODES[opcode](*sources)
    return registers


def lop3(a: int, b: int, c: int, table: int) -> int:
    bits = [((a >> i) & 1) << 2 | ((b >> i) & 1) << 1 | ((c >> i) & 1) for i in range(32)]
    return sum(((table >> bit) & 1) << i for i, bit in enumerate(bits))


OPCODES = {
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, count: a >> count,
    "shl.b32": lambda a, count: (a << count) & 0xFFFFFFFF,
    "lop3.b32": lop3,
}


def test_the_evaluator_knows_every_instruction() -> None:
    assert set(re.findall(r"\b[a-z0-9]+\.[bu]32\b", THREE_BITS_PTX.value)) == set(OPCODES)


def test_three_bit_planes() -> None:
    """A block of keys of 64 tokens and 256 channels: four planes of 16 rows."""
    codes = torch.randint(0, 8, (64, 256), dtype=torch.uint8)
    packed = pack(codes, 3, values=False)
    low, high = packed[: 16 * 256].view(16, 256), packed[16 * 256 :].view(16, 128)
    inputs = [words(x) for x in (low[:, :128], low[:, 128:], high)]
    outputs = [
        run(THREE_BITS_PTX.value, {"$8": a, "$9": b, "$10": y})
        for a, b, y in zip(*inputs, strict=True)
    ]
    for plane, unit in enumerate((1, 4, 16, 32)):
        want = codes[plane::4].int() * unit if plane < 3 else (codes[3::4].int() - 4) * 32
        for half in range(2):
            got = signed_bytes([output[f"${4 * half + plane}"] for output in outputs])
            assert torch.equal(got.view(16, 128).int(), want[:, 128 * half :][:, :128])


def words(x: torch.Tensor) -> list[int]:
    return x.contiguous().view(-1).numpy().view(np.uint32).tolist()  # type: ignore[no-any-return]


def signed_bytes(numbers: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(numbers, dtype=np.uint32).view(np.int8))
