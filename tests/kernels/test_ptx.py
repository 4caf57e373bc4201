"""The unpacking that only a GPU can run, checked by emulating its instructions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvmesh.kernels.attention.triton_operands import MAGIC, SPLIT_PTX
from kvmesh.kernels.formats.fp8.triton import E4M3_PTX
from kvmesh.kernels.formats.packing import PLANES, pack
from kvmesh.kernels.formats.planes_ptx import PlanesPtx
from kvmesh.kernels.formats.planes_triton import MIDDLES
from kvmesh.kernels.linear.triton_tiles import HIGH_OFFSETS, HIGH_ZEROS, LOW_OFFSETS, LOW_ZEROS


def run(ptx: str, words: dict[str, int]) -> dict[str, int]:
    """Registers after a block of the opcodes below, from those in `words`."""
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


def prmt(a: int, b: int, selector: int) -> int:
    data = (b << 32) | a
    result = 0
    for i in range(4):
        pick = selector >> (4 * i)
        byte = (data >> (8 * (pick & 7))) & 0xFF
        if pick & 8:  # eight copies of its sign
            byte = 0xFF * (byte >> 7)
        result |= byte << (8 * i)
    return result


def fma(a: int, b: int, c: int) -> int:
    x, y, z = (np.array(bf16_pair(word), dtype=np.float64) for word in (a, b, c))
    rounded: list[int] = torch.from_numpy(x * y + z).to(torch.bfloat16).view(torch.int16).tolist()
    return (rounded[0] & 0xFFFF) | (rounded[1] & 0xFFFF) << 16


def bf16_pair(word: int) -> list[float]:
    bits = np.array([word & 0xFFFF, word >> 16], dtype=np.uint32) << 16
    return [float(x) for x in bits.view(np.float32)]


OPCODES: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, count: a >> count,
    "shr.b32": lambda a, count: a >> count,
    "shl.b32": lambda a, count: (a << count) & 0xFFFFFFFF,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": fma,
}


def test_e4m3_numbers() -> None:
    """All except the two NaNs."""
    for first in range(0, 256, 4):
        codes = [first, first + 1, first + 2, (first * 7) % 127]
        want = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        after = run(E4M3_PTX.value, {"$2": sum(code << (8 * i) for i, code in enumerate(codes))})
        got = torch.tensor(bf16_pair(after["$0"]) + bf16_pair(after["$1"]))
        assert torch.equal(got, want)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("zero", [None, 1, 7, 16])
def test_weights_of_4_bits(half: int, zero: int | None) -> None:
    """zero: None for an offset"""
    scales = torch.tensor([0.0123, -3.7, 1e-20, 250.0]).bfloat16()
    more = torch.tensor([-0.4, 33.0, 1e-19, -2000.0]).bfloat16()
    more = more if zero is None else torch.full((4,), -128.0 - zero).bfloat16()
    given = {"$3": more[:2], "$4": more[2:], "$5": scales[:2], "$6": scales[2:]}
    pairs = {name: words(pair.view(torch.int16))[0] for name, pair in given.items()}
    ptx = (LOW_OFFSETS, HIGH_OFFSETS) if zero is None else (LOW_ZEROS, HIGH_ZEROS)
    for first in range(16):
        codes = torch.tensor([first, 15 - first, (first * 7) % 16, (first + 5) % 16])
        others = (codes * 3 + 1) % 16
        stored = (codes << 4 | others) if half else (codes | others << 4)
        after = run(ptx[half].value, {"$2": words(stored.to(torch.uint8))[0], **pairs})
        got = torch.tensor(bf16_pair(after["$0"]) + bf16_pair(after["$1"]))
        want = codes.double() * scales.double() + more.double()
        if zero is not None:
            want = (codes - zero).double() * scales.double()
        assert torch.equal(got, want.bfloat16().float())


@pytest.mark.parametrize("power", [2.0**-100, 1.0, 2.0**60])
def test_integers_split_into_two_bytes(power: float) -> None:
    """256 hi + lo is the nearest integer in units of the given step."""
    steps = torch.cat((torch.tensor([-32639.0, 32639.0, 0.0, -0.5]), torch.randn(60) * 9000))
    numbers = (steps * power + MAGIC.value * power).view(torch.int32).view(-1, 4)
    his, los = [], []
    for four in numbers.tolist():
        after = run(SPLIT_PTX.value, {f"${2 + i}": x & 0xFFFFFFFF for i, x in enumerate(four)})
        his.append(after["$0"])
        los.append(after["$1"])
    whole = 256 * signed_bytes(his).double() + signed_bytes(los).double()
    assert (whole - steps.double()).abs().max() <= 0.5


def test_three_bit_planes() -> None:
    """A block of keys of 64 tokens and 256 channels: four planes of 16 rows."""
    codes = torch.randint(0, 8, (64, 256), dtype=torch.uint8)
    packed = pack(codes, 3, values=False)
    low, high = packed[: 16 * 256].view(16, 256), packed[16 * 256 :].view(16, 128)
    ptx = PlanesPtx(3, None).text()
    inputs = [words(x) for x in (low[:, :128], low[:, 128:], high)]
    outputs = [run(ptx, {"$8": a, "$9": b, "$10": y}) for a, b, y in zip(*inputs, strict=True)]
    for plane, unit in enumerate((1, 4, 16, 32)):
        want = codes[plane::4].int() * unit if plane < 3 else (codes[3::4].int() - 4) * 32
        for half in range(2):
            got = signed_bytes([output[f"${4 * half + plane}"] for output in outputs])
            assert torch.equal(got.view(16, 128).int(), want[:, 128 * half :][:, :128])


@pytest.mark.parametrize(("width", "middle"), [(w, x) for w in MIDDLES for x in MIDDLES[w]])
def test_codes_as_bf16_numbers(width: int, middle: float) -> None:
    """A block of keys of 64 tokens and 256 channels; width 3 by halves of the channels."""
    codes = torch.randint(0, 2**width, (64, 256), dtype=torch.uint8)
    packed = pack(codes, width, values=False)
    planes = PLANES[width]
    rows, halves = 64 // planes, 2 if width == 3 else 1
    parts = [packed[: rows * 256].view(rows, 256)]
    if halves == 2:
        parts = [*parts[0].chunk(2, dim=1), packed[rows * 256 :].view(rows, 128)]
    ptx, first_word = PlanesPtx(width, middle).text(), 2 * halves * planes
    after = [
        run(ptx, {f"${first_word + i}": word for i, word in enumerate(group)})
        for group in zip(*map(words, parts), strict=True)
    ]
    for index in range(halves * planes):
        pairs = [bf16_pair(x[f"${2 * index}"]) + bf16_pair(x[f"${2 * index + 1}"]) for x in after]
        half, plane = divmod(index, planes)
        want = codes[plane::planes].chunk(halves, dim=1)[half] - middle
        assert torch.equal(torch.tensor(pairs).view(rows, -1), want.float())


def words(x: torch.Tensor) -> list[int]:
    return x.contiguous().view(-1).numpy().view(np.uint32).tolist()  # type: ignore[no-any-return]


def signed_bytes(numbers: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(numbers, dtype=np.uint32).view(np.int8))
