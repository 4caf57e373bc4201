"""The operators as compiled loops for CPUs, in fp32; the same signatures as the public ones.

A token's result has the same bits in any batch: every sum is one row's, in one order.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba.np.numpy_support import carray

from kvmesh.kernels.addresses_numba import floats, integers
from kvmesh.kernels.exp2_numba import LOG2_E, exp2
from kvmesh.kernels.formats.tiles_numba import compiled
from kvmesh.kernels.numba_cache import keep_on_disk
from kvmesh.kernels.threads import in_parts

# Handing work to a thread costs about as much as this many numbers.
MIN_NUMBERS_PER_THREAD = 1 << 16


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _norm(x, None, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    if not residual.is_contiguous():
        raise ValueError("residual: expected a contiguous tensor")
    return _norm(x, residual, weight, eps)


def _norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    size = weight.shape[0]
    added = 0 if residual is None else residual.data_ptr()
    addresses = (x.data_ptr(), added, weight.contiguous().data_ptr(), out.data_ptr())
    loop = _ready(norm_loop)
    _over_tokens(x.numel() // size, size, lambda *part: loop(*addresses, size, eps, *part))
    return out


def silu_mul(both: torch.Tensor) -> torch.Tensor:
    both = both.contiguous()
    size = both.shape[-1] // 2
    out = both.new_empty((*both.shape[:-1], size))
    addresses = (both.data_ptr(), out.data_ptr())
    loop = _ready(silu_mul_loop)
    _over_tokens(out.numel() // max(size, 1), size, lambda *part: loop(*addresses, size, *part))
    return out


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    hot: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = q.shape
    q, k, v = _heads_together(q), _heads_together(k), _heads_together(v)
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype)
    addresses = tuple(tensor.data_ptr() for tensor in (q, k, v, cos, sin, hot, slots, out))
    strides = (q.stride(0), k.stride(0), v.stride(0))
    sizes = (num_heads, k.shape[1], head_dim, hot.shape[3], hot.shape[0] * hot.shape[3])
    loop = _ready(rope_write_loop)
    width = (num_heads + 2 * k.shape[1]) * head_dim

    def work(first: int, end: int) -> None:
        check_slot(loop(*addresses, *strides, *sizes, first, end), sizes[-1])

    _over_tokens(num_tokens, width, work)
    return out


def check_slot(slot: int, num_slots: int) -> None:
    """Raises ValueError if `rope_write_loop` has returned a slot."""
    if slot >= 0:
        raise ValueError(f"slots: expected less than {num_slots}, the slots of hot, got {slot}")


def _over_tokens(tokens: int, width: int, work: Callable[[int, int], Any]) -> None:
    """Spread over threads. width: numbers of a token; work: of tokens [first, end)"""
    if tokens * width < 2 * MIN_NUMBERS_PER_THREAD:
        work(0, tokens)
        return
    in_parts(tokens, tokens * width // MIN_NUMBERS_PER_THREAD, work)


def _heads_together(x: torch.Tensor) -> torch.Tensor:
    """With a token's heads next to each other, as in a view of a projection."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@cache
def norm_loop() -> Any:
    """(x, residual or 0, weight, out, size, eps, first, end): of rows [first, end)"""

    @compiled
    def norm(x, residual, weight, out, size, eps, first, end):  # type: ignore[no-untyped-def]
        factors = carray(floats(weight), size)
        for row in range(first, end):
            start = 4 * row * size
            numbers = carray(floats(x + start), size)
            result = carray(floats(out + start), size)
            if residual != 0:
                sums = carray(floats(residual + start), size)
                for i in range(size):
                    sums[i] += numbers[i]
                numbers = sums
            total = np.float32(0.0)
            for i in range(size):
                total += numbers[i] * numbers[i]
            scale = np.float32(1.0 / math.sqrt(total / size + eps))
            for i in range(size):
                result[i] = numbers[i] * scale * factors[i]

    return norm


@cache
def silu_mul_loop() -> Any:
    """(both, out, size, first, end): of rows [first, end)"""

    @compiled
    def silu_mul(both, out, size, first, end):  # type: ignore[no-untyped-def]
        for row in range(first, end):
            gate = carray(floats(both + 8 * row * size), size)
            up = carray(floats(both + 8 * row * size + 4 * size), size)
            result = carray(floats(out + 4 * row * size), size)
            for i in range(size):
                result[i] = gate[i] * up[i] / (np.float32(1.0) + exp2(gate[i] * -LOG2_E))

    return silu_mul


@cache
def add_loop() -> Any:
    """(x, target, count): target += x"""

    @compiled
    def add(x, target, count):  # type: ignore[no-untyped-def]
        numbers, sums = carray(floats(x), count), carray(floats(target), count)
        for i in range(count):
            sums[i] += numbers[i]

    return add


@cache
def rope_write_loop() -> Any:
    """(the tensors, strides of a token in q, k, v, heads, KV heads, head_dim, page_size, slots of
    hot, first, end): of tokens [first, end); returns a slot that hot does not have, or else -1"""

    @compiled
    def rotate(x, cos, sin, out, head_dim):  # type: ignore[no-untyped-def]
        half = head_dim // 2
        for i in range(half):
            low, high = x[i], x[half + i]
            out[i] = low * cos[i] - high * sin[i]
            out[half + i] = high * cos[i] + low * sin[i]

    @compiled
    def rope_write(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        cos,
        sin,
        hot,
        slots,
        out,
        q_stride,
        k_stride,
        v_stride,
        num_heads,
        num_kv_heads,
        head_dim,
        page_size,
        num_slots,
        first,
        end,
    ):
        head_bytes = 4 * head_dim
        side_bytes = num_kv_heads * page_size * head_bytes
        places = carray(integers(slots), end)
        for token in range(first, end):
            cosines = carray(floats(cos + token * head_bytes), head_dim)
            sines = carray(floats(sin + token * head_bytes), head_dim)
            for head in range(num_heads):
                x = carray(floats(q + 4 * token * q_stride + head * head_bytes), head_dim)
                there = out + (token * num_heads + head) * head_bytes
                rotate(x, cosines, sines, carray(floats(there), head_dim), head_dim)
            slot = places[token]
            if slot < 0:  # padding
                continue
            if slot >= num_slots:
                return slot
            page, offset = slot // page_size, slot % page_size
            for head in range(num_kv_heads):
                there = hot + 2 * page * side_bytes + (head * page_size + offset) * head_bytes
                x = carray(floats(k + 4 * token * k_stride + head * head_bytes), head_dim)
                rotate(x, cosines, sines, carray(floats(there), head_dim), head_dim)
                values = carray(floats(v + 4 * token * v_stride + head * head_bytes), head_dim)
                kept = carray(floats(there + side_bytes), head_dim)
                for i in range(head_dim):
                    kept[i] = values[i]
        return -1

    return rope_write


@cache
def _ready(make: Callable[[], Any]) -> Any:
    """The loop that it makes, of integers and eps, compiled now rather than in the first step."""
    function = make().py_func
    loop = compiled(function)  # loops that are called by others are not kept on disk
    keep_on_disk(loop, repr(("pointwise", function.__name__)))
    names = inspect.signature(function).parameters
    loop.compile(tuple(numba.float64 if name == "eps" else numba.int64 for name in names))
    return loop
