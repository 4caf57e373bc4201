"""The unpacking that only a GPU can run, checked by emulating its instructions."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvmesh.kernels.attention.triton_operands import MAGIC, SPLIT_PTX
from kvmesh.kernels.formats.fp8.triton import E4M3_PTX
from kvmesh.kernels.formats.packing import PLANES, pack
from kvmesh.kernels.formats.planes_ptx import PlanesPtx
from kvmesh.kernels.formats.planes_triton import MIDDLES
from kvmesh.kernels.linear.triton_tiles import HIGH_OFFSETS, HIGH_ZEROS, LOW_OFFSETS, LOW_ZEROS

Words = NDArray[np.uint32]  # a register of each thread, or a constant


def run(ptx: str, words: dict[str, list[int]]) -> dict[str, Words]:
    """Registers after a block of the opcodes below, from those in `words`."""
    registers = {name: np.array(values, np.uint32) for name, values in words.items()}
    for line in ptx.strip("{} \n").split(";"):
        opcode, _, rest = line.strip().partition(" ")
        if opcode in ("", ".reg"):
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        sources = [
            registers[operand] if operand in registers else np.array(int(operand, 0), np.uint32)
            for operand in operands
        ]
        registers[target] = OPCODES[opcode](*sources)
    return registers


def lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    cases: list[Words] = [
        (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        for case in range(8)
        if table >> case & 1
    ]
    return functools.reduce(operator.or_, cases)


def prmt(a: Words, b: Words, selector: Words) -> Words:
    result = np.zeros_like(a)
    for i in range(4):
        pick = int(selector) >> (4 * i)
        byte = (b if pick & 4 else a) >> (8 * (pick & 3)) & 0xFF
        if pick & 8:  # eight copies of its sign
            byte = 0xFF * (byte >> 7)
        result |= byte << (8 * i)
    return result


def fma(a: Words, b: Words, c: Words) -> Words:
    x, y, z = (bf16_pairs(register).double() for register in (a, b, c))
    halves = (x * y + z).bfloat16().view(torch.int16).numpy()
    return halves.view(np.uint32)[..., 0]


def bf16_pairs(register: Words) -> torch.Tensor:
    """The two numbers of each word, fp32."""
    halves = np.stack([register << 16, register & 0xFFFF0000], axis=-1)
    return torch.from_numpy(halves.view(np.float32))


OPCODES: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, count: a >> count,
    "shr.b32": lambda a, count: a >> count,
    "shl.b32": lambda a, count: a << count,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": fma,
}


def test_e4m3_numbers() -> None:
    """All except the two NaNs."""
    every = torch.arange(256, dtype=torch.uint8)
    codes = torch.cat([every.roll(i) for i in range(4)])  # in each byte of a word
    codes[codes & 127 == 127] = 0
    after = run(E4M3_PTX.value, {"$2": words(codes)})
    got = torch.cat((bf16_pairs(after["$0"]), bf16_pairs(after["$1"])), dim=1)
    assert torch.equal(got.flatten(), codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("zero", [None, 1, 7, 16])
def test_weights_of_4_bits(half: int, zero: int | None) -> None:
    """zero: None for an offset"""
    scales = torch.tensor([0.0123, -3.7, 1e-20, 250.0]).bfloat16()
    more = torch.tensor([-0.4, 33.0, 1e-19, -2000.0]).bfloat16()
    more = more if zero is None else torch.full((4,), -128.0 - zero).bfloat16()
    given = {"$3": more[:2], "$4": more[2:], "$5": scales[:2], "$6": scales[2:]}
    pairs = {name: words(pair.view(torch.int16)) * 16 for name, pair in given.items()}
    ptx = (LOW_OFFSETS, HIGH_OFFSETS) if zero is None else (LOW_ZEROS, HIGH_ZEROS)
    first = torch.arange(16, dtype=torch.uint8)
    codes = torch.stack((first, 15 - first, first * 7 % 16, (first + 5) % 16), dim=1)
    others = (codes * 3 + 1) % 16
    stored = (codes << 4 | others) if half else (codes | others << 4)
    after = run(ptx[half].value, {"$2": words(stored), **pairs})
    got = torch.cat((bf16_pairs(after["$0"]), bf16_pairs(after["$1"])), dim=1)
    want = codes.double() * scales.double() + more.double()
    if zero is not None:
        want = (codes.double() - zero) * scales.double()
    assert torch.equal(got, want.bfloat16().float())


@pytest.mark.parametrize("power", [2.0**-100, 1.0, 2.0**60])
def test_integers_split_into_two_bytes(power: float) -> None:
    """256 hi + lo is the nearest integer in units of the given step."""
    steps = torch.cat((torch.tensor([-32639.0, 32639.0, 0.0, -0.5]), torch.randn(60) * 9000))
    numbers = (steps * power + MAGIC.value * power).view(torch.int32).view(-1, 4)
    after = run(SPLIT_PTX.value, {f"${2 + i}": words(x) for i, x in enumerate(numbers.T)})
    whole = 256 * signed_bytes(after["$0"]).double() + signed_bytes(after["$1"]).double()
    assert (whole - steps.double()).abs().max() <= 0.5


def test_three_bit_planes() -> None:
    """A block of keys of 64 tokens and 256 channels: four planes of 16 rows."""
    codes = torch.randint(0, 8, (64, 256), dtype=torch.uint8)
    packed = pack(codes, 3, values=False)
    low, high = packed[: 16 * 256].view(16, 256), packed[16 * 256 :].view(16, 128)
    ptx = PlanesPtx(3, None).text()
    inputs = {"$8": low[:, :128], "$9": low[:, 128:], "$10": high}
    after = run(ptx, {name: words(x) for name, x in inputs.items()})
    for plane, unit in enumerate((1, 4, 16, 32)):
        want = codes[plane::4].int() * unit if plane < 3 else (codes[3::4].int() - 4) * 32
        for half in range(2):
            got = signed_bytes(after[f"${4 * half + plane}"])
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
    after = run(ptx, {f"${first_word + i}": words(part) for i, part in enumerate(parts)})
    for index in range(halves * planes):
        got = torch.cat([bf16_pairs(after[f"${2 * index + i}"]) for i in range(2)], dim=1)
        half, plane = divmod(index, planes)
        want = codes[plane::planes].chunk(halves, dim=1)[half] - middle
        assert torch.equal(got.view(rows, -1), want.float())


def words(x: torch.Tensor) -> list[int]:
    return x.contiguous().view(-1).numpy().view(np.uint32).tolist()  # type: ignore[no-any-return]


def signed_bytes(register: Words) -> torch.Tensor:
    return torch.from_numpy(register.view(np.int8))
