"""A layer up to its attention, as one compiled loop over tokens."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numba
import torch
from torch import Tensor

from kvmesh.kernels.layer import reference
from kvmesh.kernels.layer.numba_layer import MIN_PRODUCTS_BY_ROWS, TOKENS, address_of
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


def attention_input(
    layer: AttentionInput, x: Tensor, cos: Tensor, sin: Tensor, hot: Tensor, slots: Tensor
) -> Tensor:
    num_tokens, hidden = x.shape
    width = layer.qkv.shape[0]
    products = width * hidden
    if num_tokens < torch.get_num_threads() and products >= MIN_PRODUCTS_BY_ROWS:
        # Too few tokens for all threads, but not too few rows; the bits are the same.
        return reference.attention_input(layer, x, cos, sin, hot, slots, backend="numba")
    page_size = hot.shape[3]
    num_slots = hot.shape[0] * page_size
    out = torch.empty((num_tokens, layer.num_heads, layer.head_dim), dtype=x.dtype)
    bias = 0 if layer.bias is None else layer.bias.data_ptr()
    arguments = (
        *(x.data_ptr(), layer.norm.data_ptr(), layer.eps, address_of(layer.qkv), bias),
        *(cos.data_ptr(), sin.data_ptr(), hot.data_ptr(), slots.data_ptr(), out.data_ptr()),
        *(hidden, layer.num_heads, layer.num_kv_heads, layer.head_dim, page_size, num_slots),
    )
    loop = _loop(layer.qkv.codes.dtype)

    def work(first: int, end: int) -> None:
        numbers = min(TOKENS, end - first) * (hidden + width)
        scratch = torch.empty(numbers, dtype=torch.float32)
        check_slot(loop(*arguments, scratch.data_ptr(), first, end), num_slots)

    in_parts(num_tokens, num_tokens * products // MIN_PRODUCTS_PER_THREAD, work)
    return out


@cache
def _loop(codes_dtype: torch.dtype) -> Any:
    """(x, norm, eps, codes and scales, bias or 0, cos, sin, hot, slots, out, hidden, heads, KV
    heads, head_dim, page_size, slots of hot, scratch, first, end): of tokens [first, end); returns
    what `rope_write_loop` does"""
    product, normed, add, rope_write = (
        *(product_loop(codes_dtype), norm_loop(), add_loop(), rope_write_loop()),
    )

    @numba.njit(nogil=True)
    def attention_input(  # type: ignore[no-untyped-def]
        x,
        norm,
        eps,
        weight,
        bias,
        cos,
        sin,
        hot,
        slots,
        out,
        hidden,
        heads,
        kv_heads,
        head_dim,
        page_size,
        num_slots,
        scratch,
        first,
        end,
    ):
        head, width = 4 * head_dim, (heads + 2 * kv_heads) * head_dim
        most = min(TOKENS, end - first)
        y, q = scratch, scratch + 4 * most * hidden
        k = q + heads * head
        v = k + kv_heads * head
        for start in range(first, end, TOKENS):
            count = min(TOKENS, end - start)
            normed(x + 4 * start * hidden, 0, norm, y, hidden, eps, 0, count)
            product(weight[0], weight[1], y, q, width, hidden // BLOCK, count, 0, width)
            if bias != 0:
                for token in range(count):
                    add(bias, q + 4 * token * width, width)
            at, rows = start * head, (width, width, width)
            slot = rope_write(
                *(q, k, v, cos + at, sin + at, hot, slots + 8 * start, out + at * heads),
                *rows,
                *(heads, kv_heads, head_dim, page_size, num_slots, 0, count),
            )
            if slot >= 0:
                return slot
        return -1

    count, pair = numba.int64, numba.types.UniTuple(numba.int64, 2)
    keep_on_disk(attention_input, repr(("attention input", codes_dtype)))
    attention_input.compile((count, count, numba.float64, pair, *(count,) * 15))
    return attention_input
