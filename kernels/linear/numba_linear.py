"""`linear` on CPUs, in compiled loops over the rows of the weight."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import torch
import torch.nn.functional as F
from torch import Tensor

from kvmesh.kernels.linear.dots_numba import block_bytes, dots
from kvmesh.kernels.linear.packed import BLOCK, PackedWeight
from kvmesh.kernels.numba_cache import keep_on_disk
from kvmesh.kernels.threads import in_parts

# Handing work to a thread costs about as much as this many products.
MIN_PRODUCTS_PER_THREAD = 1 << 19
# Inputs that one pass over the weights multiplies with, so that they stay in the L2 cache.
_INPUTS_PER_PASS = 64


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """x: [T, in_features] fp32 -> [T, out_features]; see `kernels.linear.linear`"""
    num_tokens, num_rows, num_blocks = x.shape[0], weight.codes.shape[0], weight.num_blocks
    out = torch.empty((num_tokens, num_rows), dtype=torch.float32)
    if not out.numel():
        return out
    more = num_blocks * BLOCK - x.shape[1]
    padded = (F.pad(x, (0, more)) if more else x).contiguous()
    loop = _loop(weight.codes.dtype)
    scales = 0 if weight.scales is None else weight.scales.data_ptr()
    arguments = (
        *(weight.codes.data_ptr(), scales, padded.data_ptr(), out.data_ptr()),
        *(num_rows, num_blocks, num_tokens),
    )
    max_parts = num_tokens * num_rows * num_blocks * BLOCK // MIN_PRODUCTS_PER_THREAD
    if max_parts < 2:
        loop(*arguments, 0, num_rows)
    else:
        in_parts(num_rows, max_parts, lambda first, end: loop(*arguments, first, end))
    return out


def prepare(weight: PackedWeight) -> None:
    """Compile the loops for such weights, unless that was done before."""
    _loop(weight.codes.dtype)


@cache
def _loop(codes_dtype: torch.dtype) -> Any:
    """`product_loop`, compiled now rather than in the first step."""
    loop = numba.njit(nogil=True)(product_loop(codes_dtype).py_func)
    keep_on_disk(loop, repr(("linear", codes_dtype)))
    loop.compile((numba.int64,) * 9)
    return loop


@cache
def product_loop(codes_dtype: torch.dtype) -> Any:
    """(codes, scales, x, out, num_rows, num_blocks, num_inputs, first, end): rows [first, end).

    For code that Numba compiles; the numbers of x and out are contiguous.
    """
    dtype = str(codes_dtype).removeprefix("torch.")
    one, rows, two, four, eight = (
        dots(dtype, *tile) for tile in ((1, 1), (4, 1), (2, 2), (2, 4), (2, 8))
    )
    code_bytes, scales_bytes = block_bytes(dtype)

    @numba.njit(nogil=True)
    def multiply(  # type: ignore[no-untyped-def]
        codes, scales, x, out, num_rows, num_blocks, num_inputs, first, end
    ):
        k, n = num_blocks * BLOCK, num_rows
        row_bytes, scale_bytes = num_blocks * code_bytes, num_blocks * scales_bytes
        if num_inputs == 1:
            # Several rows at a time: a sum must wait for itself from one vector to the next.
            row = first
            while row < end:
                w, s = codes + row * row_bytes, scales + row * scale_bytes
                if end - row >= 4:
                    rows(w, s, num_blocks, x, out + row * 4, n)
                    row += 4
                else:
                    one(w, s, num_blocks, x, out + row * 4, n)
                    row += 1
            return
        for top in range(0, num_inputs, _INPUTS_PER_PASS):
            bottom = min(top + _INPUTS_PER_PASS, num_inputs)
            for row in range(first, end, 2):
                paired = row + 1 < end
                w, s = codes + row * row_bytes, scales + row * scale_bytes
                t = top
                while t < bottom:
                    left = bottom - t
                    a, o = x + t * k * 4, out + (t * n + row) * 4
                    if paired and left >= 8:
                        eight(w, s, num_blocks, a, o, n)
                        t += 8
                    elif paired and left >= 4:
                        four(w, s, num_blocks, a, o, n)
                        t += 4
                    elif paired and left >= 2:
                        two(w, s, num_blocks, a, o, n)
                        t += 2
                    else:
                        one(w, s, num_blocks, a, o, n)
                        if paired:
                            one(w + row_bytes, s + scale_bytes, num_blocks, a, o + 4, n)
                        t += 1

    return multiply
