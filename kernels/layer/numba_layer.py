"""A layer after attention, as one compiled loop over tokens, or over rows of the weights."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from numba.np.numpy_support import carray
from torch import Tensor

from kvmesh.kernels.addresses_numba import Record, address_of, pointer, record_of
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

if TYPE_CHECKING:
    from kvmesh.kernels.layer.op import FeedForward

# Tokens at a time, so that their numbers stay in the L2 cache.
TOKENS = 32
# A layer of fewer products than this takes less time in one call than spread over two threads.
MIN_PRODUCTS_BY_ROWS = 1 << 23
FEED_FORWARD_ARGUMENTS = 6


# (codes, scales): two addresses.
_WEIGHTS = np.dtype(
    [
        ("norm", np.int64),
        ("eps", np.float64),
        *((name, np.int64, 2) for name in ("o_proj", "gate_up", "down")),
        *((name, np.int64) for name in ("heads_width", "hidden", "width")),
    ]
)
_weights_at = pointer(_WEIGHTS)


def feed_forward(layer: FeedForward, heads: Tensor, residual: Tensor) -> None:
    num_tokens, products = residual.shape[0], layer.products
    if num_tokens < torch.get_num_threads() and products >= MIN_PRODUCTS_BY_ROWS:
        # Too few tokens for all threads, but not too few rows; the bits are the same.
        x = add_rms_norm(linear(heads, layer.o_proj), residual, layer.norm, layer.eps)
        residual += linear(silu_mul(linear(x, layer.gate_up)), layer.down)
        return
    loop = feed_forward_loop(layer)
    arguments = (address_of(layer.record), heads.data_ptr(), residual.data_ptr())

    def work(first: int, end: int) -> None:
        numbers = min(TOKENS, end - first) * scratch_numbers(layer)
        scratch = torch.empty(numbers, dtype=torch.float32)
        loop(*arguments, scratch.data_ptr(), first, end)

    in_parts(num_tokens, num_tokens * products // MIN_PRODUCTS_PER_THREAD, work)


def record_of_layer(layer: FeedForward) -> Record:
    """Its weights, as the loop reads them."""
    o_proj, gate_up, down = layer.o_proj, layer.gate_up, layer.down
    return record_of(
        _WEIGHTS,
        norm=layer.norm.data_ptr(),
        eps=layer.eps,
        o_proj=codes_and_scales(o_proj),
        gate_up=codes_and_scales(gate_up),
        down=codes_and_scales(down),
        heads_width=o_proj.in_features,
        hidden=down.shape[0],
        width=down.in_features,
    )


def scratch_numbers(layer: FeedForward) -> int:
    """fp32 for a token"""
    return 2 * layer.down.shape[0] + 3 * layer.down.in_features


def codes_and_scales(weight: PackedWeight) -> tuple[int, int]:
    """Their addresses; 0 for no scales."""
    return weight.codes.data_ptr(), 0 if weight.scales is None else weight.scales.data_ptr()


def feed_forward_loop(layer: FeedForward) -> Any:
    """(addresses of its record, heads, residual and scratch, first, end): of tokens [first, end)

    scratch: `scratch_numbers` for each of up to TOKENS tokens
    """
    return _loop(layer.o_proj.codes.dtype, layer.gate_up.codes.dtype, layer.down.codes.dtype)


@cache
def _loop(*dtypes: torch.dtype) -> Any:
    o_proj, gate_up, down_proj = (product_loop(dtype) for dtype in dtypes)
    normed, gated, add = norm_loop(), silu_mul_loop(), add_loop()

    @numba.njit(nogil=True)
    def layer(record, heads, residual, scratch, first, end):  # type: ignore[no-untyped-def]
        weights = carray(_weights_at(record), 1)[0]
        o, gu, d = weights.o_proj, weights.gate_up, weights.down
        heads_width, hidden, width = weights.heads_width, weights.hidden, weights.width
        most = min(TOKENS, end - first)
        x = scratch
        y = x + 4 * most * hidden
        both = y + 4 * most * hidden
        product = both + 8 * most * width
        for start in range(first, end, TOKENS):
            count = min(TOKENS, end - start)
            there, at = heads + 4 * start * heads_width, residual + 4 * start * hidden
            o_proj(o[0], o[1], there, x, hidden, heads_width // BLOCK, count, 0, hidden)
            normed(x, at, weights.norm, y, hidden, weights.eps, 0, count)
            gate_up(gu[0], gu[1], y, both, 2 * width, hidden // BLOCK, count, 0, 2 * width)
            gated(both, product, width, 0, count)
            down_proj(d[0], d[1], product, x, hidden, width // BLOCK, count, 0, hidden)
            add(x, at, count * hidden)
        return 0

    keep_on_disk(layer, repr(("layer", dtypes)))
    layer.compile((numba.int64,) * FEED_FORWARD_ARGUMENTS)
    return layer
