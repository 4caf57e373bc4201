"""Dot products of a few weight rows with a few inputs, as vector instructions.

Numba does not vectorise a sum of floats in blocks, so its LLVM is written here, for any
processor: 16 weights are loaded, widened to fp32 and scaled once, then multiplied with 16
numbers of every input. An output has one accumulator of 16 lanes, which are added at the
end; so its bits do not depend on what else is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvmesh.kernels.linear.packed import BLOCK

LANES = 16
CACHE_LINE = 64

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_FLOATS = ir.VectorType(_F32, LANES)
_INTS = ir.VectorType(_I32, LANES)
_UNDEFINED = ir.Constant(_FLOATS, ir.Undefined)
_BYTES = _I8.as_pointer()


def _widen_int8(b: Any, codes: Any) -> list[Any]:
    return [b.sitofp(b.sext(part, _INTS), _FLOATS) for part in _halves(b, codes, _I8)]


def _widen_uint4(b: Any, codes: Any) -> list[Any]:
    """Byte i has the codes of inputs i and 16 + i in its low and its high half."""
    both = b.zext(_load(b, codes, _count(0), ir.VectorType(_I8, LANES)), _INTS)
    low = b.and_(both, ir.Constant(_INTS, [15] * LANES))
    high = b.lshr(both, ir.Constant(_INTS, [4] * LANES))
    return [b.sitofp(part, _FLOATS) for part in (low, high)]


def _widen_bfloat16(b: Any, codes: Any) -> list[Any]:
    """A bfloat16 is the upper half of an fp32."""
    sixteen = ir.Constant(_INTS, [16] * LANES)
    return [
        b.bitcast(b.shl(b.zext(part, _INTS), sixteen), _FLOATS) for part in _halves(b, codes, _I16)
    ]


def _as_they_are(b: Any, codes: Any) -> list[Any]:
    return _halves(b, codes, _F32)


@dataclass(frozen=True, slots=True)
class _Codes:
    """How a block of weights is stored.

    num_bytes: of a block's codes; scales: numbers of fp32 that a block has besides, a factor and
        then what is added
    widen: (builder, address of the block) -> its codes as fp32, in two vectors
    """

    num_bytes: int
    scales: int
    widen: Callable[[Any, Any], list[Any]]


# by the dtype of `PackedWeight.codes`
_CODES = {
    "uint8": _Codes(BLOCK // 2, 2, _widen_uint4),
    "int8": _Codes(BLOCK, 1, _widen_int8),
    "bfloat16": _Codes(2 * BLOCK, 0, _widen_bfloat16),
    "float32": _Codes(4 * BLOCK, 0, _as_they_are),
}


def block_bytes(dtype: str) -> tuple[int, int]:
    """Bytes of a block's codes and of its scales."""
    return _CODES[dtype].num_bytes, 4 * _CODES[dtype].scales


@cache
def dots(dtype: str, num_rows: int, num_inputs: int) -> Any:
    """A function for code that Numba compiles, (codes, scales, num_blocks, x, out, out_stride):

    out[t, r] = sum over blocks of 32 inputs, weights[r, block] · x[t, block]

    for `num_rows` rows r of a weight and `num_inputs` inputs t. codes and scales are those of a
    `PackedWeight` whose codes have the dtype, from a row on; x [num_inputs, num_blocks * 32] fp32
    and out [num_inputs, >= num_rows] fp32. All four are addresses, which the caller keeps in
    bounds; out_stride counts numbers.
    """
    tile = _Tile(dtype, num_rows, num_inputs)

    @intrinsic
    def function(typing_context, codes, scales, num_blocks, x, out, out_stride):  # type: ignore[no-untyped-def]
        address, count = types.uintp, types.int64
        return types.void(address, address, count, address, address, count), tile.generate

    return function


class _Tile:
    """Generates the code of `dots`: a loop over blocks, then the sums over lanes."""

    def __init__(self, dtype: str, num_rows: int, num_inputs: int) -> None:
        self._codes = _CODES[dtype]
        self._rows = range(num_rows)
        self._inputs = range(num_inputs)

    def generate(self, context: Any, b: Any, _signature: Any, args: Sequence[Any]) -> Any:
        """Called by Numba with an IRBuilder that stands where the call is."""
        codes, scales, num_blocks, x, out, out_stride = args
        codes = b.inttoptr(codes, _I8.as_pointer())
        scales, x, out = (b.inttoptr(address, _F32.as_pointer()) for address in (scales, x, out))
        width = b.mul(num_blocks, _count(BLOCK))
        before = b.block
        loop, after = b.append_basic_block("blocks"), b.append_basic_block("sums")
        b.branch(loop)
        b.position_at_end(loop)
        block = b.phi(_I64)
        block.add_incoming(_count(0), before)
        sums = {(row, t): b.phi(_FLOATS) for row in self._rows for t in self._inputs}
        first = b.mul(block, _count(BLOCK))
        fma = _llvm(b, f"llvm.fma.v{LANES}f32", _FLOATS, [_FLOATS] * 3)
        weights = [self._weights(b, fma, codes, scales, num_blocks, block, r) for r in self._rows]
        if len(self._rows) > 1:
            self._prefetch(b, codes, scales, num_blocks, block)
        totals: dict[tuple[int, int], Any] = dict(sums)
        for t in self._inputs:
            start = b.add(first, b.mul(_count(t), width))
            for part in range(BLOCK // LANES):
                numbers = _load(b, x, b.add(start, _count(part * LANES)), _FLOATS)
                for row in self._rows:
                    totals[row, t] = b.call(fma, [weights[row][part], numbers, totals[row, t]])
        following = b.add(block, _count(1))
        block.add_incoming(following, loop)
        for place, phi in sums.items():
            phi.add_incoming(ir.Constant(_FLOATS, [0.0] * LANES), before)
            phi.add_incoming(totals[place], loop)
        b.cbranch(b.icmp_signed("<", following, num_blocks), loop, after)
        b.position_at_end(after)
        add_lanes = _llvm(b, f"llvm.vector.reduce.fadd.v{LANES}f32", _F32, [_F32, _FLOATS])
        for (row, t), total in totals.items():
            # "reassoc" allows adding the lanes as a tree, always the same one.
            value = b.call(add_lanes, [ir.Constant(_F32, 0.0), total], fastmath=("reassoc",))
            b.store(value, b.gep(out, [b.add(b.mul(_count(t), out_stride), _count(row))]))
        return context.get_dummy_value()

    def _weights(
        self, b: Any, fma: Any, codes: Any, scales: Any, num_blocks: Any, block: Any, row: int
    ) -> list[Any]:
        """The block's weights of one row, in fp32, in vectors of 16."""
        place = b.add(block, b.mul(_count(row), num_blocks))
        parts = self._codes.widen(b, b.gep(codes, [b.mul(place, _count(self._codes.num_bytes))]))
        if not self._codes.scales:
            return parts
        numbers = b.gep(scales, [b.mul(place, _count(self._codes.scales))])
        factor, *more = (_everywhere(b, numbers, i) for i in range(self._codes.scales))
        if more:
            return [b.call(fma, [part, factor, more[0]]) for part in parts]
        return [b.fmul(part, factor) for part in parts]

    def _prefetch(self, b: Any, codes: Any, scales: Any, num_blocks: Any, block: Any) -> None:
        """Of the next rows, as much as these have in a block: processors see one row's next
        block coming, but not the end of several rows at a time."""
        there = b.mul(b.add(num_blocks, block), _count(len(self._rows)))
        for array, num_bytes in ((codes, self._codes.num_bytes), (scales, 4 * self._codes.scales)):
            start = b.gep(b.bitcast(array, _BYTES), [b.mul(there, _count(num_bytes))])
            for line in range(0, num_bytes * len(self._rows), CACHE_LINE):
                function = _llvm(b, "llvm.prefetch.p0i8", ir.VoidType(), [_BYTES, *[_I32] * 3])
                options = (ir.Constant(_I32, n) for n in (0, 3, 1))  # to read, kept, data
                b.call(function, [b.gep(start, [_count(line)]), *options])


def _halves(b: Any, codes: Any, number: Any) -> list[Any]:
    """A block of numbers as two vectors."""
    first = b.bitcast(codes, number.as_pointer())
    return [_load(b, first, _count(start), ir.VectorType(number, LANES)) for start in (0, LANES)]


def _everywhere(b: Any, numbers: Any, index: int) -> Any:
    """One number of fp32 in all lanes."""
    number = b.load(b.gep(numbers, [_count(index)]))
    vector = b.insert_element(_UNDEFINED, number, ir.Constant(_I32, 0))
    return b.shuffle_vector(vector, _UNDEFINED, ir.Constant(_INTS, [0] * LANES))


def _count(number: int) -> Any:
    return ir.Constant(_I64, number)


def _load(b: Any, pointer: Any, place: Any, vector: Any) -> Any:
    """A vector whose address need not be a multiple of its size."""
    loaded = b.load(b.bitcast(b.gep(pointer, [place]), vector.as_pointer()))
    loaded.align = 1
    return loaded


def _llvm(b: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)
