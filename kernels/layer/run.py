"""The public operator `LayerRun`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from numba.np.numpy_support import carray
from torch import Tensor

from kvmesh.kernels.addresses_numba import Record, address_of, call, entry_of, pointer
from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.numba_attention import (
    DecodePlan,
    check_pages,
    decode_plan,
)
from kvmesh.kernels.attention.numba_loop import decode_loop
from kvmesh.kernels.attention.numba_records import PAGES, pages_record
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.rotation import Rotation
from kvmesh.kernels.formats.rotation_numba import factors_address, rotate_loop
from kvmesh.kernels.layer import numba_attention_input, numba_layer
from kvmesh.kernels.layer.attention_input import AttentionInput
from kvmesh.kernels.layer.numba_layer import MIN_PRODUCTS_BY_ROWS, TOKENS
from kvmesh.kernels.layer.op import FeedForward
from kvmesh.kernels.linear.numba_linear import MIN_PRODUCTS_PER_THREAD
from kvmesh.kernels.numba_cache import keep_on_disk
from kvmesh.kernels.pointwise.numba_pointwise import check_slot
from kvmesh.kernels.threads import in_ranges

# The loop's records of a layer: addresses of its two loops and of their weights.
_LAYERS = np.dtype(
    [(name, np.int64) for name in ("before", "before_record", "after", "after_record")]
)
_layers_at = pointer(_LAYERS)
# How much longer than layer by layer the busiest thread may take.
MAX_IMBALANCE = 1.25


@dataclass(frozen=True, slots=True)
class RunLayer:
    """A layer: what is before its attention, what is after, and attention.

    index: of its pages among those of all layers
    scale, softcap, sliding_window: as in `paged_attention`
    """

    before: AttentionInput
    after: FeedForward
    index: int
    scale: float
    softcap: float | None
    sliding_window: int | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The same for all layers of a run."""
        return *self.before.sizes, self.after.products


class LayerRun:
    """Consecutive layers of decoding tokens, in one compiled call for each thread.

    The call's loop calls those of `AttentionInput`, attention and `FeedForward` by their addresses.
    So a token's results are theirs, bit for bit, and nothing is compiled for each format. In a
    decode step no token reads what another writes; hence each thread takes its tokens through all
    layers without waiting for the others.
    """

    def __init__(self, layers: Sequence[RunLayer]) -> None:
        """layers: of the same sizes"""
        sizes = {layer.sizes for layer in layers}
        if len(sizes) != 1:
            raise ValueError(f"layers: expected one or more of the same sizes, got {sorted(sizes)}")
        self._layers = tuple(layers)
        first = self._layers[0]
        self._heads = first.before.num_heads, first.before.num_kv_heads
        self._products = first.before.products + first.after.products
        self._scratch_numbers = max(
            numba_attention_input.scratch_numbers(first.before),
            numba_layer.scratch_numbers(first.after),
        )
        self._indices = np.array([layer.index for layer in layers])
        self._pages = np.concatenate(
            [
                pages_record(
                    *(0, 0, (0, 0), self._heads),
                    *(layer.scale, layer.softcap, layer.sliding_window),
                )
                for layer in layers
            ]
        )

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        hot: Tensor,
        sealed: Tensor,
        batch: AttentionBatch,
        *,
        fmt: KVFormat,
        rotations: tuple[Rotation | None, Rotation | None] = (None, None),
    ) -> bool:
        """Take x through the layers, in place. False, and nothing has changed, for steps that are
        better taken layer by layer: with other than decoding tokens, or where one call for each of
        some tokens does not keep the threads busy.

        x, cos, sin, slots: as in `AttentionInput`
        hot, sealed: pages of all layers, [layers, …] of what `paged_attention` takes
        rotations: of values before they are written, and of attention's output
        """
        num_tokens, (num_heads, num_kv_heads) = x.shape[0], self._heads
        page_size, head_dim = hot.shape[4:]
        self._layers[0].before.check(x, cos, sin, slots)
        loop = decode_loop(fmt, page_size, head_dim, "float32")
        if loop is None or not num_tokens or hot.dtype != torch.float32:
            return False
        if batch.deterministic:
            batch = batch.by_query()
        plan = decode_plan(batch, num_kv_heads)
        ends = self._ends(plan, batch, num_tokens)
        if ends is None:
            return False
        q = torch.empty((num_tokens, num_heads, head_dim), dtype=torch.float32)
        out = torch.empty((num_tokens, num_heads, loop.value_dim), dtype=torch.float32)
        lse = torch.empty((num_tokens, num_heads), dtype=torch.float32)
        pages = self._pages_of(hot, sealed)
        arguments = (
            *(address_of(self._records), address_of(pages), len(pages)),
            *(loop.entry, address_of(plan.sequences)),
            *(tensor.data_ptr() for tensor in (x, cos, sin, slots, q, out, lse)),
            *(num_tokens, page_size, head_dim),
            *map(factors_address, rotations),
        )
        attention_bytes = loop.scratch_bytes(plan.largest_group * (num_heads // num_kv_heads))
        run = _loop()

        def work(first: int, end: int) -> None:
            units = plan.units
            if len(ends) > 1:  # each token is a group
                units = units[first * num_kv_heads : end * num_kv_heads]
            attending = torch.empty(attention_bytes, dtype=torch.uint8)
            numbers = min(TOKENS, end - first) * self._scratch_numbers
            scratch = torch.empty(numbers, dtype=torch.float32)
            part = (address_of(units), len(units), attending.data_ptr(), scratch.data_ptr())
            code = run(*arguments, *part, first, end)
            if code >= 0 and code & 1:
                check_pages(code >> 1)
            elif code >= 0:
                check_slot(code >> 1, hot.shape[1] * page_size)

        in_ranges([*pairwise((0, *ends))], work)
        return True

    def _ends(self, plan: DecodePlan, batch: AttentionBatch, num_tokens: int) -> list[int] | None:
        """Where the tokens of each thread end; None: layer by layer."""
        if plan.num_decoding != num_tokens or plan.splits > 1:
            return None
        threads = torch.get_num_threads()
        if num_tokens < threads and self._products >= MIN_PRODUCTS_BY_ROWS:
            return None  # rows of weights are spread
        parts = min(threads, num_tokens, num_tokens * self._products // MIN_PRODUCTS_PER_THREAD)
        if parts < 2:
            return [num_tokens] if len(plan.shares) == 1 else None
        if batch.prefixes is not None:
            return None  # whose pages are read for tokens of several threads
        first = self._layers[0].before
        page_products = 2 * batch.page_size * first.head_dim * first.num_heads
        token_pages = self._products // page_products  # that take as long as a token's products
        done = np.cumsum(plan.work + token_pages)
        ends = np.searchsorted(done, done[-1] * np.arange(1, parts + 1) / parts) + 1
        ends[-1] = num_tokens
        longest = int(np.diff(done[ends - 1], prepend=0).max())
        # Layer by layer, attention is spread evenly.
        by_layer = -(-num_tokens // parts) * token_pages + int(plan.work.sum()) / parts
        return ends.tolist() if longest <= MAX_IMBALANCE * by_layer else None

    def _pages_of(self, hot: Tensor, sealed: Tensor) -> Record:
        """PAGES of each layer."""
        pages = self._pages.copy()
        for name, tensor in (("hot", hot), ("sealed", sealed)):
            layer_bytes = tensor.stride(0) * tensor.element_size()
            pages[name] = tensor.data_ptr() + self._indices * layer_bytes
            pages[f"num_{name}"] = tensor.shape[1]
        return pages

    @cached_property
    def _records(self) -> Record:
        """_LAYERS; compiles the loops."""
        rows = []
        for layer in self._layers:
            before = numba_attention_input.attention_input_loop(layer.before)
            after = numba_layer.feed_forward_loop(layer.after)
            rows.append(
                (
                    entry_of(before, numba_attention_input.ATTENTION_INPUT_ARGUMENTS),
                    address_of(layer.before.record),
                    entry_of(after, numba_layer.FEED_FORWARD_ARGUMENTS),
                    address_of(layer.after.record),
                )
            )
        return np.array(rows, _LAYERS)


@cache
def _loop() -> Any:
    """(addresses of _LAYERS and PAGES, layers, address of attention's loop and of its SEQUENCES,
    of x, cos, sin, slots, q, out and lse, num_tokens, page_size, head_dim, addresses of factors of
    values and of attention's output, or 0, of units, their number, addresses of attention's scratch
    and of the others', first, end): of tokens [first, end).

    Returns -1; or twice a slot that hot does not have; or twice the code of a missing page, plus 1.
    """
    pages_bytes = PAGES.itemsize
    pages_at = pointer(PAGES)
    rotate = rotate_loop()

    @numba.njit(nogil=True)
    def run(  # type: ignore[no-untyped-def]
        layers,
        pages,
        num_layers,
        attend,
        sequences,
        x,
        cos,
        sin,
        slots,
        q,
        out,
        lse,
        num_tokens,
        page_size,
        head_dim,
        values_factors,
        out_factors,
        units,
        num_units,
        attending,
        scratch,
        first,
        end,
    ):
        records, page_records = (
            carray(_layers_at(layers), num_layers),
            carray(pages_at(pages), num_layers),
        )
        for index in range(num_layers):
            layer, its = records[index], page_records[index]
            written = (layer.before_record, x, cos, sin, its.hot, slots, q, page_size)
            num_slots = its.num_hot * page_size
            slot = call(layer.before, (*written, num_slots, values_factors, scratch, first, end))
            if slot >= 0:
                return 2 * slot
            there = pages + index * pages_bytes
            work = (units, num_units, attending, q, out, lse, num_tokens)
            missing = call(attend, (sequences, there, *work))
            if missing >= 0:
                return 2 * missing + 1
            if out_factors != 0:
                heads = first * its.num_heads, (end - first) * its.num_heads
                rotate(out + 4 * heads[0] * head_dim, heads[1], head_dim, out_factors)
            call(layer.after, (layer.after_record, out, x, scratch, first, end))
        return -1

    keep_on_disk(run, "layers")
    run.compile((numba.int64,) * 23)
    return run
