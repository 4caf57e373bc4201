"""A layer after attention, as one compiled loop over tokens, or over rows of the weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import torch
from torch import Tensor

from kvmesh.kernels.linear import PackedWeight
from kvmesh.kernels.linear.numba_linear import MIN_PRODUCTS_PER_THREAD, linear, product_loop
from kvmesh.kernels.linear.packed import BLOCK
from kvmesh.kernels.numba_cache import keep_on_disk
from kvmesh.kernels.pointwise.numba_pointwise import (
    add_loop,
    add_rms_norm,
    norm_loop,
    silu_mul,
    silu_mul_loop,
)
from kvmesh.kernels.threads import in_parts

# Tokens at a time, so that their numbers stay in the L2 cache.
TOKENS = 32
# A layer of fewer products than this takes less time in one call than spread over two threads.
MIN_PRODUCTS_BY_ROWS = 1 << 23


def feed_forward(
    heads: Tensor,
    residual: Tensor,
    o_proj: PackedWeight,
    norm: Tensor,
    eps: float,
    gate_up: PackedWeight,
    down: PackedWeight,
) -> None:
    num_tokens, hidden = residual.shape
    products = gate_up.codes.shape[0] * hidden + hidden * (down.in_features + heads.shape[1])
    if num_tokens < torch.get_num_threads() and products >= MIN_PRODUCTS_BY_ROWS:
        # Too few tokens for all threads, but not too few rows; the bits are the same.
        x = add_rms_norm(linear(heads, o_proj), residual, norm, eps)
        residual += linear(silu_mul(linear(x, gate_up)), down)
        return
    loop = _loop(o_proj.codes.dtype, gate_up.codes.dtype, down.codes.dtype)
    arguments = (
        *(heads.data_ptr(), residual.data_ptr(), norm.data_ptr(), eps),
        *(address_of(o_proj), address_of(gate_up), address_of(down)),
        *(heads.shape[1], hidden, down.in_features),
    )

    def work(first: int, end: int) -> None:
        numbers = min(TOKENS, end - first) * (2 * hidden + 3 * down.in_features)
        scratch = torch.empty(numbers, dtype=torch.float32)
        loop(*arguments, scratch.data_ptr(), first, end)

    in_parts(num_tokens, num_tokens * products // MIN_PRODUCTS_PER_THREAD, work)


def address_of(weight: PackedWeight) -> tuple[int, int]:
    return weight.codes.data_ptr(), 0 if weight.scales is None else weight.scales.data_ptr()


@cache
def _loop(*dtypes: torch.dtype) -> Any:
    """(heads, residual, norm, eps, the weights' codes and scales, heads' width, hidden, MLP's
    width, scratch, first, end): of tokens [first, end)"""
    o_proj, gate_up, down_proj = (product_loop(dtype) for dtype in dtypes)
    normed, gated, add = norm_loop(), silu_mul_loop(), add_loop()

    @numba.njit(nogil=True)
    def layer(  # type: ignore[no-untyped-def]
        heads, residual, norm, eps, o, gu, d, heads_width, hidden, width, scratch, first, end
    ):
        most = min(TOKENS, end - first)
        x = scratch
        y = x + 4 * most * hidden
        both = y + 4 * most * hidden
        product = both + 8 * most * width
        for start in range(first, end, TOKENS):
            count = min(TOKENS, end - start)
            there, at = heads + 4 * start * heads_width, residual + 4 * start * hidden
            o_proj(o[0], o[1], there, x, hidden, heads_width // BLOCK, count, 0, hidden)
            normed(x, at, norm, y, hidden, eps, 0, count)
            gate_up(gu[0], gu[1], y, both, 2 * width, hidden // BLOCK, count, 0, 2 * width)
            gated(both, product, width, 0, count)
            down_proj(d[0], d[1], product, x, hidden, width // BLOCK, count, 0, hidden)
            add(x, at, count * hidden)

    count, pair = numba.int64, numba.types.UniTuple(numba.int64, 2)
    keep_on_disk(layer, repr(("layer", dtypes)))
    layer.compile((*(count,) * 3, numba.float64, *(pair,) * 3, *(count,) * 6))
    return layer
