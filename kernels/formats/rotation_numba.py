"""Rotations on CPUs: a fast Hadamard transform, head_dim · log2(head_dim) sums for a vector."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import torch
from numba.np.numpy_support import carray

from kvmesh.kernels.addresses_numba import floats
from kvmesh.kernels.formats.rotation import Rotation
from kvmesh.kernels.numba_cache import keep_on_disk
from kvmesh.kernels.threads import in_parts

# Handing work to a thread costs about as much as rotating this many numbers.
MIN_NUMBERS_PER_THREAD = 1 << 16


def rotated(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """x [..., head_dim] fp32 -> the same; factors: see `Rotation`"""
    out = x.clone(memory_format=torch.contiguous_format)
    head_dim = x.shape[-1]
    rotate, start = _ready_rotate(), out.data_ptr()

    def work(first: int, end: int) -> None:
        rotate(start + 4 * first * head_dim, end - first, head_dim, factors.data_ptr())

    in_parts(out.numel() // head_dim, out.numel() // MIN_NUMBERS_PER_THREAD, work)
    return out


def factors_address(rotation: Rotation | None) -> int:
    """For `rotate_loop`; 0 for none."""
    return 0 if rotation is None else rotation.factors.data_ptr()


# Without `fastmath`: sums in one order have the same bits wherever the compiler puts this.
@numba.njit(nogil=True)
def _transform_eight(x):  # type: ignore[no-untyped-def]
    a, b, c, d, e, f, g, h = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
    a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
    x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7] = (
        *(a + e, b + f, c + g, d + h),
        *(a - e, b - f, c - g, d - h),
    )


@numba.njit(nogil=True)
def _transform(x):  # type: ignore[no-untyped-def]
    """H x, in place, for a power of two of numbers"""
    size, half = x.shape[0], 1
    if size >= 8:  # in registers, as the compiler vectorises only longer rows
        for start in range(0, size, 8):
            _transform_eight(x[start : start + 8])
        half = 8
    while half < size:
        for start in range(0, size, 2 * half):
            low, high = x[start : start + half], x[start + half : start + 2 * half]
            for i in range(half):
                total, difference = low[i] + high[i], low[i] - high[i]
                low[i], high[i] = total, difference
        half *= 2


@cache
def rotate_loop() -> Any:
    """(x, count, head_dim, factors): addresses of `count` vectors, and of factors; in place"""

    @numba.njit(nogil=True)
    def rotate(x, count, head_dim, factors):  # type: ignore[no-untyped-def]
        both = carray(floats(factors), (2, head_dim))
        vectors = carray(floats(x), (count, head_dim))
        for n in range(count):
            vector = vectors[n]
            for d in range(head_dim):
                vector[d] *= both[0, d]
            start = 0
            while start < head_dim:
                size = 1
                while 2 * size <= head_dim - start:
                    size *= 2
                _transform(vector[start : start + size])
                start += size
            for d in range(head_dim):
                vector[d] *= both[1, d]
        return 0

    return rotate


@cache
def _ready_rotate() -> Any:
    """The loop, compiled now rather than in the first step."""
    loop = numba.njit(nogil=True)(rotate_loop().py_func)  # those called by others are not kept
    keep_on_disk(loop, "rotation")
    loop.compile((numba.int64,) * 4)
    return loop
