"""A layer up to its attention, as one compiled loop over tokens."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from numba.np.numpy_support import carray
from torch import Tensor

from kvmesh.kernels.addresses_numba import Record, address_of, pointer, record_of
from kvmesh.kernels.formats.rotation import Rotation
from kvmesh.kernels.formats.rotation_numba import factors_address, rotate_loop
from kvmesh.kernels.layer import reference
from kvmesh.kernels.layer.numba_layer import MIN_PRODUCTS_BY_ROWS, TOKENS, codes_and_scales
from kvmesh.kernels.linear.numba_linear import MIN_PRODUCTS_PER_THREAD, product_loop
from kvmesh.kernels.linear.packed import BLOCK
from kvmesh.kernels.numba_cache import keep_on_disk
from kvmesh.kernels.pointwise.numba_pointwise import (
    add_loop,
    check_slot,
    norm_loop,
    rope_write_loop,
)
from kvmesh.kernels.threads import in_parts

if TYPE_CHECKING:
    from kvmesh.kernels.layer.attention_input import AttentionInput


_WEIGHTS = np.dtype(
    [
        ("norm", np.int64),
        ("eps", np.float64),
        ("qkv", np.int64, 2),  # addresses of codes and scales
        ("bias", np.int64),  # 0 for none
        *((name, np.int64) for name in ("hidden", "heads", "kv_heads", "head_dim")),
    ]
)
_weights_at = pointer(_WEIGHTS)
ATTENTION_INPUT_ARGUMENTS = 13


def attention_input(
    layer: AttentionInput,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    hot: Tensor,
    slots: Tensor,
    rotation: Rotation | None,
) -> Tensor:
    num_tokens, products = x.shape[0], layer.products
    if num_tokens < torch.get_num_threads() and products >= MIN_PRODUCTS_BY_ROWS:
        # Too few tokens for all threads, but not too few rows; the bits are the same.
        return reference.attention_input(layer, x, cos, sin, hot, slots, rotation, backend="numba")
    page_size = hot.shape[3]
    num_slots = hot.shape[0] * page_size
    out = torch.empty((num_tokens, layer.num_heads, layer.head_dim), dtype=x.dtype)
    tensors = (x, cos, sin, hot, slots, out)
    addresses = (address_of(layer.record), *(tensor.data_ptr() for tensor in tensors))
    loop = attention_input_loop(layer)

    def work(first: int, end: int) -> None:
        numbers = min(TOKENS, end - first) * scratch_numbers(layer)
        scratch = torch.empty(numbers, dtype=torch.float32)
        values = factors_address(rotation)
        slot = loop(*addresses, page_size, num_slots, values, scratch.data_ptr(), first, end)
        check_slot(slot, num_slots)

    in_parts(num_tokens, num_tokens * products // MIN_PRODUCTS_PER_THREAD, work)
    return out


def record_of_input(layer: AttentionInput) -> Record:
    """Its weights, as the loop reads them."""
    return record_of(
        _WEIGHTS,
        norm=layer.norm.data_ptr(),
        eps=layer.eps,
        qkv=codes_and_scales(layer.qkv),
        bias=0 if layer.bias is None else layer.bias.data_ptr(),
        hidden=layer.norm.shape[0],
        heads=layer.num_heads,
        kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
    )


def scratch_numbers(layer: AttentionInput) -> int:
    """fp32 for a token"""
    width, hidden = layer.qkv.shape
    return width + hidden


def attention_input_loop(layer: AttentionInput) -> Any:
    """(addresses of its record, x, cos, sin, hot, slots and out, page_size, slots of hot, addresses
    of values' factors, or 0, and of scratch, first, end): of tokens [first, end); returns what
    `rope_write_loop` does

    scratch: `scratch_numbers` for each of up to TOKENS tokens
    """
    return _loop(layer.qkv.codes.dtype)


@cache
def _loop(codes_dtype: torch.dtype) -> Any:
    product, normed, add = product_loop(codes_dtype), norm_loop(), add_loop()
    rope_write, rotate = rope_write_loop(), rotate_loop()

    @numba.njit(nogil=True)
    def attention_input(  # type: ignore[no-untyped-def]
        record, x, cos, sin, hot, slots, out, page_size, num_slots, factors, scratch, first, end
    ):
        weights = carray(_weights_at(record), 1)[0]
        qkv, bias, hidden = weights.qkv, weights.bias, weights.hidden
        heads, kv_heads, head_dim = weights.heads, weights.kv_heads, weights.head_dim
        head, width = 4 * head_dim, (heads + 2 * kv_heads) * head_dim
        most = min(TOKENS, end - first)
        y, q = scratch, scratch + 4 * most * hidden
        k = q + heads * head
        v = k + kv_heads * head
        for start in range(first, end, TOKENS):
            count = min(TOKENS, end - start)
            normed(x + 4 * start * hidden, 0, weights.norm, y, hidden, weights.eps, 0, count)
            product(qkv[0], qkv[1], y, q, width, hidden // BLOCK, count, 0, width)
            if bias != 0:
                for token in range(count):
                    add(bias, q + 4 * token * width, width)
            if factors != 0:
                for token in range(count):
                    rotate(v + 4 * token * width, kv_heads, head_dim, factors)
            at, rows = start * head, (width, width, width)
            slot = rope_write(
                *(q, k, v, cos + at, sin + at, hot, slots + 8 * start, out + at * heads),
                *rows,
                *(heads, kv_heads, head_dim, page_size, num_slots, 0, count),
            )
            if slot >= 0:
                return slot
        return -1

    keep_on_disk(attention_input, repr(("attention input", codes_dtype)))
    attention_input.compile((numba.int64,) * ATTENTION_INPUT_ARGUMENTS)
    return attention_input
