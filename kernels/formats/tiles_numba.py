"""What a side supplies for attention on CPUs, and readers of stored numbers.

Numba compiles these for the machine they run on, per side and geometry, once per process.
Pages are bytes; a tile is one head's keys or values of one page as fp32 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from kvmesh.kernels.formats.scales import E5M3_BIAS

# Sums may be reordered and multiply-adds fused; infinities and NaN are preserved.
compiled = numba.njit(
    nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"}
)


DENSE, BY_TOKEN, BY_CHANNEL = 0, 1, 2


@dataclass(frozen=True, slots=True)
class SideLoad:
    """How a side's part of a page becomes numbers.

    load: (part, tile, numbers) -> the tile, fp32 [page_size, head_dim], or
        [head_dim, page_size] if `transposed`; it is `tile` or a view of the bytes. part
        [num_bytes] uint8 of one head and page; numbers [numbers_size] fp32 is scratch memory
    grid: DENSE: the tile is keys or values. BY_TOKEN (BY_CHANNEL, for keys): they are tile *
        scale + offset, with scales of n tokens (channels) in numbers[:n], offsets in numbers[n:2n]
    """

    load: Any
    transposed: bool = False
    grid: int = DENSE
    numbers_size: int = 0


@intrinsic
def float_of(typingctx, bits):  # type: ignore[no-untyped-def]
    """int32 bits -> the fp32 number"""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.FloatType())

    return numba.float32(numba.int32), generate


@intrinsic
def prefetch(typingctx, array, offset):  # type: ignore[no-untyped-def]
    """Prefetch the cache line of byte `offset` of a uint8 array."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.gep(data, [arguments[1]])
        function = builder.module.declare_intrinsic(
            "llvm.prefetch",
            fnty=ir.FunctionType(ir.VoidType(), [pointer.type, *[ir.IntType(32)] * 3]),
            tys=[pointer.type],
        )
        read, near, data_cache = (ir.Constant(ir.IntType(32), n) for n in (0, 2, 1))
        builder.call(function, [pointer, read, near, data_cache])
        return context.get_dummy_value()

    return numba.void(array, numba.int64), generate


@compiled
def read_bf16(part, start, count, out):  # type: ignore[no-untyped-def]
    """`count` bf16 numbers starting at byte `start` -> out [count] fp32"""
    stored = part[start : start + 2 * count].view(np.uint16)
    for i in range(count):
        out[i] = float_of(np.int32(stored[i]) << np.int32(16))


@compiled
def _read_e5m3(part, start, count, out):  # type: ignore[no-untyped-def]
    stored = part[start : start + count]
    for i in range(count):
        out[i] = float_of((np.int32(stored[i]) << np.int32(20)) + np.int32(E5M3_BIAS << 16))


@cache
def scale_reader(kind: str) -> Any:
    """(part, start, count, out) for "bf16" or "e5m3" scales."""
    return {"bf16": read_bf16, "e5m3": _read_e5m3}[kind]
