"""Dot products of a few weight rows with a few inputs, as vector instructions.

Numba does not vectorise a sum of floats in blocks, so its LLVM is written here, for any
processor: 16 weights are loaded, widened to fp32 and scaled once, then multiplied with 16
numbers of every input. An output has one accumulator of 16 lanes, which are added at the
end; so its bits do not depend on what else is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvmesh.kernels.linear.packed import BLOCK

LANES = 16

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_FLOATS = ir.VectorType(_F32, LANES)
_INTS = ir.VectorType(_I32, LANES)
_UNDEFINED = ir.Constant(_FLOATS, ir.Undefined)


def _widen_int8(b: Any, codes: Any) -> Any:
    return b.sitofp(b.sext(codes, _INTS), _FLOATS)


def _widen_bfloat16(b: Any, codes: Any) -> Any:
    """A bfloat16 is the upper half of an fp32."""
    return b.bitcast(b.shl(b.zext(codes, _INTS), ir.Constant(_INTS, [16] * LANES)), _FLOATS)


def _as_they_are(_b: Any, codes: Any) -> Any:
    return codes


# dtype of the codes -> its LLVM type, and how to make fp32 of 16 codes
_CODES: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
    "int8": (_I8, _widen_int8),
    "bfloat16": (_I16, _widen_bfloat16),
    "float32": (_F32, _as_they_are),
}
CODE_BYTES = {"int8": 1, "bfloat16": 2, "float32": 4}


@cache
def dots(dtype: str, num_rows: int, num_inputs: int) -> Any:
    """A function for code that Numba compiles, (codes, scales, num_blocks, x, out, out_stride):

    out[t, r] = sum over blocks of 32 inputs, scales[r, block] * codes[r, block] · x[t, block]

    for `num_rows` rows r of a weight and `num_inputs` inputs t. codes [num_rows, num_blocks * 32]
    of `dtype`; scales [num_rows, num_blocks] fp32, only read for int8; x [num_inputs,
    num_blocks * 32] fp32 and out [num_inputs, >= num_rows] fp32 are addresses, which the caller
    keeps in bounds; out_stride counts numbers.
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
        self._scaled = dtype == "int8"
        self._code_type, self._widen = _CODES[dtype]
        self._rows = range(num_rows)
        self._inputs = range(num_inputs)

    def generate(self, context: Any, b: Any, _signature: Any, args: Sequence[Any]) -> Any:
        """Called by Numba with an IRBuilder that stands where the call is."""
        codes, scales, num_blocks, x, out, out_stride = args
        codes, scales, x, out = (
            b.inttoptr(address, pointed.as_pointer())
            for address, pointed in (
                (codes, self._code_type),
                (scales, _F32),
                (x, _F32),
                (out, _F32),
            )
        )
        width = b.mul(num_blocks, _count(BLOCK))
        before = b.block
        loop, after = b.append_basic_block("blocks"), b.append_basic_block("sums")
        b.branch(loop)
        b.position_at_end(loop)
        block = b.phi(_I64)
        block.add_incoming(_count(0), before)
        sums = {(row, t): b.phi(_FLOATS) for row in self._rows for t in self._inputs}
        first = b.mul(block, _count(BLOCK))
        weights = [
            self._weights(b, codes, scales, width, num_blocks, block, row) for row in self._rows
        ]
        fma = _llvm(b, f"llvm.fma.v{LANES}f32", _FLOATS, [_FLOATS] * 3)
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
        self, b: Any, codes: Any, scales: Any, width: Any, num_blocks: Any, block: Any, row: int
    ) -> list[Any]:
        """The block's weights of one row, in fp32, in vectors of 16."""
        start = b.add(b.mul(block, _count(BLOCK)), b.mul(_count(row), width))
        vector = ir.VectorType(self._code_type, LANES)
        parts = [
            self._widen(b, _load(b, codes, b.add(start, _count(part)), vector))
            for part in range(0, BLOCK, LANES)
        ]
        if not self._scaled:
            return parts
        place = b.add(block, b.mul(_count(row), num_blocks))
        scale = b.insert_element(_UNDEFINED, b.load(b.gep(scales, [place])), ir.Constant(_I32, 0))
        everywhere = b.shuffle_vector(scale, _UNDEFINED, ir.Constant(_INTS, [0] * LANES))
        return [b.fmul(part, everywhere) for part in parts]


def _count(number: int) -> Any:
    return ir.Constant(_I64, number)


def _load(b: Any, pointer: Any, place: Any, vector: Any) -> Any:
    """A vector whose address need not be a multiple of its size."""
    loaded = b.load(b.bitcast(b.gep(pointer, [place]), vector.as_pointer()))
    loaded.align = 1
    return loaded


def _llvm(b: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)
