"""Codes to levels, on CPUs: 8 at a time, as one permutation of a register.

LLVM does not turn a loop that indexes a small array into permutations but loads one number
at a time, which is ten times as slow. If the loop is written out lane by lane, LLVM emits a
permutation on processors that have it; on others the plain loop is faster.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from kvmesh.kernels.formats.tiles_numba import compiled

LANES = 8


@cache
def look_up(width: int) -> Any:
    """(levels, tile): codes of `width` bits, 2 to 4, become levels [2^width], both fp32, in place.
    The tile must be contiguous."""
    pick = _picker(2**width)
    permutes = bool(get_host_cpu_features().get("avx2"))

    @compiled
    def levels_of(levels, tile):  # type: ignore[no-untyped-def]
        x = tile.reshape(tile.size)
        whole = 0
        if permutes:
            whole = x.shape[0] // LANES * LANES
            for i in range(0, whole, LANES):
                pick(levels, x, i)
        for i in range(whole, x.shape[0]):
            x[i] = levels[np.int32(x[i])]

    return levels_of


def _picker(count: int) -> Any:
    """(levels, x, start): x[start : start + LANES], codes below `count`, become levels."""
    lane = ir.IntType(32)
    lanes, numbers = ir.VectorType(lane, LANES), ir.VectorType(ir.FloatType(), LANES)

    @intrinsic
    def pick(typingctx, levels, x, start):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            levels_ptr, x_ptr = (
                make_array(kind)(context, builder, array).data
                for kind, array in zip(signature.args[:2], arguments[:2], strict=True)
            )
            place = builder.bitcast(builder.gep(x_ptr, [arguments[2]]), numbers.as_pointer())
            codes = builder.fptosi(builder.load(place, align=4), lanes)
            in_register = builder.and_(codes, ir.Constant(lanes, [LANES - 1] * LANES))

            def permuted(first: int) -> Any:
                """Select by the codes' low bits from levels first to first + LANES."""
                size = min(count, LANES)
                at = builder.gep(levels_ptr, [ir.Constant(ir.IntType(64), first)])
                whole = ir.VectorType(ir.FloatType(), size).as_pointer()
                table = builder.load(builder.bitcast(at, whole), align=4)
                if size < LANES:
                    repeated = ir.Constant(lanes, [i % size for i in range(LANES)])
                    table = builder.shuffle_vector(table, table, repeated)
                chosen = ir.Constant(numbers, ir.Undefined)
                for i in range(LANES):
                    index = builder.extract_element(in_register, lane(i))
                    number = builder.extract_element(table, index)
                    chosen = builder.insert_element(chosen, number, lane(i))
                return chosen

            result = permuted(0)
            if count > LANES:
                in_first = builder.icmp_signed("<", codes, ir.Constant(lanes, [LANES] * LANES))
                result = builder.select(in_first, result, permuted(LANES))
            builder.store(result, place, align=4)
            return context.get_dummy_value()

        return numba.void(levels, x, numba.int64), generate

    return pick
