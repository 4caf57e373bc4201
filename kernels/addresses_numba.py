"""Memory and loops by their addresses, for code that Numba compiles.

Numba takes a fraction of a microsecond to unpack each argument of a call from Python, and each
array of it several times that. So loops get integers: addresses, which their callers keep valid, of
numbers and of records of arguments, which are filled in once and used in many calls. A loop of
integers alone can also be called by its own address.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Record = npt.NDArray[np.void]


def record_of(dtype: np.dtype[Any], **values: float | tuple[int, ...]) -> Record:
    """One record, [1] of dtype. values: all its fields, addresses as integers"""
    if values.keys() != set(dtype.names or ()):
        raise TypeError(f"expected the fields {dtype.names}, got {tuple(values)}")
    return np.array([tuple(values[name] for name in dtype.names or ())], dtype)


def address_of(array: npt.NDArray[Any]) -> int:
    """Of its first number; the array is contiguous."""
    return array.ctypes.data


@cache
def entry_of(loop: Any, count: int) -> int:
    """Where compiled code can `call` a loop of `count` integers that returns one, which is compiled
    now if it was not yet."""
    signature = (numba.int64,) * count
    loop.compile(signature)
    compiled = loop.overloads[signature]
    address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)
    return address


@cache
def pointer(dtype: Any) -> Any:
    """A function from an address to what `carray` takes: numbers or records of the dtype."""
    number = numba.from_dtype(np.dtype(dtype))
    pointed = types.CPointer(number)

    @intrinsic
    def function(_context, address):  # type: ignore[no-untyped-def]
        def generate(context, b, _signature, arguments):  # type: ignore[no-untyped-def]
            return b.inttoptr(arguments[0], context.get_value_type(pointed))

        return pointed(types.int64), generate

    return function


floats = pointer(np.float32)
doubles = pointer(np.float64)
integers = pointer(np.int64)
narrow_integers = pointer(np.int32)
bytes_at = pointer(np.uint8)


@intrinsic
def call(_context, entry, arguments):  # type: ignore[no-untyped-def]
    """(address of a loop, its arguments): what it returns"""
    count = arguments.count

    def generate(_context, b, _signature, values):  # type: ignore[no-untyped-def]
        number = ir.IntType(64)
        loop = ir.FunctionType(number, [number] * count).as_pointer()
        return b.call(b.inttoptr(values[0], loop), cgutils.unpack_tuple(b, values[1], count))

    return types.int64(types.int64, arguments), generate
