"""The decode loop on CPUs: one KV head of a few sequences over their pages, page by page.

It keeps a softmax's running maximum and sum over pages in any order (Milakov &
Gimelshein, 2018), like the loop on GPUs. A page becomes a tile of fp32 numbers that
stays in the L1 cache and is multiplied with all rows, which are the query heads of
all sequences that read it. Scores are base-2 logarithms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from kvmesh.kernels.exp2_numba import EXP2_COEFFICIENTS, LOG2_E
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.exact.side import Exact
from kvmesh.kernels.formats.tiles_numba import (
    BY_CHANNEL,
    BY_TOKEN,
    DENSE,
    SideLoad,
    compiled,
    float_of,
    prefetch,
)
from kvmesh.kernels.numba_cache import keep_on_disk

CACHE_LINE = 64
LN_2 = 0.6931471805599453
_C0, _C1, _C2, _C3, _C4, _C5 = EXP2_COEFFICIENTS


@numba.njit(nogil=True, fastmath=True)
def _largest(x):  # type: ignore[no-untyped-def]
    # The only function here that may drop NaN: otherwise it could not be vectorised. The
    # scores themselves stay NaN.
    largest = x[0]
    for i in range(x.shape[0]):
        largest = max(largest, x[i])
    return largest


@compiled
def _exp2_below(x, top):  # type: ignore[no-untyped-def]
    """x -> 2^(x - top), in place, where top is at least the maximum of x; returns the sum"""
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        y = x[i] - top
        if y < np.float32(-126.0):  # not max, which may drop a NaN
            y = np.float32(-126.0)
        whole = np.int32(y - np.float32(0.5))  # truncation rounds to the nearest, as y <= 0
        f = y - np.float32(whole)
        p = ((((_C0 * f + _C1) * f + _C2) * f + _C3) * f + _C4) * f + _C5
        p = (p * f + np.float32(1.0)) * float_of((whole + np.int32(127)) << np.int32(23))
        x[i] = p
        total += p
    return total


@cache
def _products(length: int) -> Any:
    """(a, b, out): out[r, i] = a[r] · b[i], for rows of `length` numbers of a and b."""

    @compiled
    def products(a, b, out):  # type: ignore[no-untyped-def]
        count = b.shape[0]
        whole = count // 4 * 4
        for i in range(0, whole, 4):  # four at a time: a's row is read once for all four
            for r in range(a.shape[0]):
                s0 = s1 = s2 = s3 = np.float32(0.0)
                for d in range(length):
                    x = a[r, d]
                    s0 += x * b[i, d]
                    s1 += x * b[i + 1, d]
                    s2 += x * b[i + 2, d]
                    s3 += x * b[i + 3, d]
                out[r, i], out[r, i + 1], out[r, i + 2], out[r, i + 3] = s0, s1, s2, s3
        for i in range(whole, count):
            for r in range(a.shape[0]):
                s = np.float32(0.0)
                for d in range(length):
                    s += a[r, d] * b[i, d]
                out[r, i] = s

    return products


@cache
def _sums(length: int) -> Any:
    """(w, x, out): out[r] = Σ w[r, i] x[i], of the first `length` numbers of rows."""

    @compiled
    def sums(w, x, out):  # type: ignore[no-untyped-def]
        count = x.shape[0]
        whole = count // 4 * 4
        for r in range(w.shape[0]):
            for d in range(length):
                out[r, d] = 0.0
            for i in range(0, whole, 4):
                w0, w1, w2, w3 = w[r, i], w[r, i + 1], w[r, i + 2], w[r, i + 3]
                for d in range(length):
                    out[r, d] += (w0 * x[i, d] + w1 * x[i + 1, d]) + (
                        w2 * x[i + 2, d] + w3 * x[i + 3, d]
                    )
            for i in range(whole, count):
                for d in range(length):
                    out[r, d] += w[r, i] * x[i, d]

    return sums


@cache
def _absorber(page_size: int, head_dim: int, value_dim: int) -> Any:
    """Adds tokens first to end of a page to the running softmax of some rows.

    q [rows, head_dim], times the scale; k by token; v by token, or by channel if v_transposed
    k_grid, v_grid, k_numbers, v_numbers: the meaning of k and v, see `SideLoad`
    scaled [rows, head_dim], part [rows, value_dim], scores [rows, page_size]: scratch
    acc [rows, value_dim], top and total [rows]: the state; all but top are fp64, since fp32 sums
        over a million tokens would lose three digits
    """
    products, weigh, sums = _products(head_dim), _products(page_size), _sums(value_dim)

    @compiled
    def absorb(  # type: ignore[no-untyped-def]
        q,
        k,
        k_grid,
        k_numbers,
        v,
        v_transposed,
        v_grid,
        v_numbers,
        first,
        end,
        softcap,
        scaled,
        part,
        scores,
        acc,
        top,
        total,
    ):
        rows = q.shape[0]
        # q·(scale code + offset): scales per channel go into q, scales per token into scores.
        queries = q
        if k_grid == BY_CHANNEL:
            queries = scaled
            for r in range(rows):
                for d in range(head_dim):
                    queries[r, d] = q[r, d] * k_numbers[d]
        k_scale, k_offset = k_numbers[first:end], k_numbers[page_size + first : page_size + end]
        v_scale, v_offset = v_numbers[first:end], v_numbers[page_size + first : page_size + end]
        products(queries, k[first:end], scores[:, first:end])
        for r in range(rows):
            row = scores[r, first:end]
            if k_grid == BY_CHANNEL:
                shift = np.float32(0.0)
                for d in range(head_dim):
                    shift += q[r, d] * k_numbers[head_dim + d]
                for i in range(row.shape[0]):
                    row[i] += shift
            elif k_grid == BY_TOKEN:
                q_sum = np.float32(0.0)
                for d in range(head_dim):
                    q_sum += q[r, d]
                for i in range(row.shape[0]):
                    row[i] = row[i] * k_scale[i] + q_sum * k_offset[i]
            if softcap > 0.0:
                for i in range(row.shape[0]):
                    row[i] = softcap * np.float32(math.tanh(row[i] / softcap)) * LOG2_E
            row_top = _largest(row)
            if row_top > top[r]:
                keep = 2.0 ** np.float64(top[r] - row_top)
                top[r] = row_top
                total[r] *= keep
                for d in range(value_dim):
                    acc[r, d] *= keep
            total[r] += _exp2_below(row, top[r])
            if v_grid == BY_TOKEN:
                shift = np.float32(0.0)
                for i in range(row.shape[0]):
                    shift += row[i] * v_offset[i]
                    row[i] *= v_scale[i]
                for d in range(value_dim):
                    acc[r, d] += shift
        if v_transposed:
            scores[:, :first] = 0.0
            scores[:, end:] = 0.0
            weigh(scores, v, part)
        else:
            sums(scores[:, first:end], v[first:end], part)
        for r in range(rows):
            for d in range(value_dim):
                acc[r, d] += part[r, d]

    return absorb


class Sequences(NamedTuple):
    """The sequences of a batch and its tables.

    group_starts [groups + 1], members: the decoding sequences, group by group
    shared_pages [groups]: how many sealed pages after the sink the whole group shares
    tokens, seq_lens, table_rows, firsts: for every sequence; tokens: its row of q
    """

    group_starts: Any
    members: Any
    shared_pages: Any
    tokens: Any
    seq_lens: Any
    table_rows: Any
    firsts: Any
    hot_tables: Any
    sealed_tables: Any


class Rule(NamedTuple):
    """Which keys are visible, and what scores are multiplied by.

    splits: the number of parts in which a group's pages are read
    stride: see `AttentionBatch`
    scale: converts to base-2 scores, or with a softcap to natural-log scores
    window: as in `window.py`, 0 for none; softcap: 0 for none
    """

    splits: int
    sink_pages: int
    recent_pages: int
    stride: int
    window: int
    scale: Any
    softcap: Any


class Scratch(NamedTuple):
    """A thread's memory for one group: tiles, and a row for each of its query heads."""

    k_tile: Any
    v_tile: Any
    v_hot_tile: Any
    k_numbers: Any
    v_numbers: Any
    queries: Any
    scaled: Any
    part: Any
    scores: Any
    acc: Any
    top: Any
    total: Any


@compiled
def _columns_below(page, first, stride):  # type: ignore[no-untyped-def]
    """See work.py."""
    return max(-((first - page) // stride), 0)


@dataclass(frozen=True, slots=True)
class DecodeLoop:
    """attend: (units, Sequences, Rule, q, hot, sealed, out, lse, Scratch) ->
        (row, page, is_hot)

    units [n, 3] int64: group, KV head and split
    q [num_tokens, num_heads, head_dim] fp32
    hot [pages, 2, num_kv_heads, bytes], sealed [pages, num_kv_heads, bytes], uint8; 1 instead of 2
        where values are the first value_dim channels of keys
    out [splits, num_tokens, num_heads, value_dim] fp32, lse [splits, num_tokens, num_heads]:
        normalised; -inf where a split has no key
    Returns the table row and logical page of a missing page; row -1 if none is missing
    """

    attend: Any
    page_size: int
    head_dim: int
    value_dim: int
    k: SideLoad
    v: SideLoad

    def scratch(self, rows: int) -> Scratch:
        """rows: query heads of the largest group's sequences, per KV head"""
        tile = (self.page_size, self.head_dim)

        def empty(*shape: int, dtype: npt.DTypeLike = np.float32) -> Any:
            return np.empty(shape, dtype)

        return Scratch(
            k_tile=empty(*tile),
            v_tile=empty(*(tile[::-1] if self.v.transposed else tile)),
            v_hot_tile=empty(*tile),
            k_numbers=empty(self.k.numbers_size),
            v_numbers=empty(self.v.numbers_size),
            queries=empty(rows, self.head_dim),
            scaled=empty(rows, self.head_dim),
            part=empty(rows, self.value_dim),
            scores=empty(rows, self.page_size),
            acc=empty(rows, self.value_dim, dtype=np.float64),
            top=empty(rows),
            total=empty(rows, dtype=np.float64),
        )


@cache
def decode_loop(fmt: KVFormat, page_size: int, head_dim: int, dtype: str) -> DecodeLoop | None:
    """The loop for a format, or None if a side has no Numba function.

    dtype: of hot pages, "float32" or "bfloat16"
    """
    dtype_bytes = {"float32": 4, "bfloat16": 2}[dtype]
    geometry = (page_size, head_dim, dtype)
    in_keys, value_dim = fmt.values_in_keys > 0, fmt.values_in_keys or head_dim
    k = fmt.k.numba_load(*geometry)
    v = k if in_keys else fmt.v.numba_load(*geometry)
    if k is None or v is None:
        return None
    exact: Any = Exact().numba_load(*geometry)
    load_k, load_v, load_hot = k.load, v.load, exact.load
    k_grid, v_grid, v_transposed = k.grid, v.grid, v.transposed
    k_bytes = fmt.k.num_bytes(page_size, head_dim, dtype_bytes)
    absorb = _absorber(page_size, head_dim, value_dim)

    @compiled
    def attend(units, batch, rule, q, hot, sealed, out, lse, scratch):  # type: ignore[no-untyped-def]
        num_kv_heads, page_bytes = sealed.shape[1:]
        group_heads = q.shape[1] // num_kv_heads
        split_count, stride, window = rule.splits, rule.stride, rule.window
        k_tile, v_tile, v_hot_tile = scratch.k_tile, scratch.v_tile, scratch.v_hot_tile
        k_numbers, v_numbers = scratch.k_numbers, scratch.v_numbers
        for u in range(units.shape[0]):
            group, head, split = units[u]
            seqs = batch.members[batch.group_starts[group] : batch.group_starts[group + 1]]
            rows = len(seqs) * group_heads
            queries, acc = scratch.queries[:rows], scratch.acc[:rows]
            top, total = scratch.top[:rows], scratch.total[:rows]
            for r in range(rows):
                at = q[batch.tokens[seqs[r // group_heads]], head * group_heads + r % group_heads]
                for d in range(head_dim):
                    queries[r, d] = at[d] * rule.scale
                for d in range(value_dim):
                    acc[r, d] = 0.0
                top[r] = -np.inf
                total[r] = 0.0
            shared = 0 if window else batch.shared_pages[group]
            # First what all sequences read, then for each its own pages: sink, then others.
            for i in range(-1, len(seqs)):
                row = batch.table_rows[seqs[max(i, 0)]]
                # Pages are counted in columns of the tables.
                first = batch.firsts[seqs[max(i, 0)]]
                sink = _columns_below(rule.sink_pages, first, stride)
                last_slot = batch.seq_lens[seqs[max(i, 0)]] - 1
                first_slot = 0
                if window > 0:
                    first_slot = max(0, last_slot - window + 1)
                elif window < 0:  # chunks of -window tokens
                    first_slot = last_slot // -window * -window
                if i < 0:
                    block = slice(0, rows)
                    first_page, num_sink, other_page, num_other = sink, 0, sink, shared
                    recent_from = sink + shared
                else:
                    block = slice(i * group_heads, (i + 1) * group_heads)
                    last_page = last_slot // page_size
                    first_page = _columns_below(first_slot // page_size, first, stride)
                    end_page = _columns_below(last_page + 1, first, stride)
                    num_sink = max(min(sink, end_page) - first_page, 0)
                    other_page = max(sink + shared, first_page)
                    num_other = max(end_page - other_page, 0)
                    recent_from = _columns_below(last_page - rule.recent_pages, first, stride)
                    recent_from = max(recent_from, sink)
                count = num_sink + num_other
                end_index = count * (split + 1) // split_count
                for index in range(count * split // split_count, end_index):
                    page = first_page + index
                    if index >= num_sink:
                        page = other_page + index - num_sink
                    is_hot = page < sink or page >= recent_from
                    tables = batch.hot_tables if is_hot else batch.sealed_tables
                    page_id = tables[row, page]
                    num_pages = hot.shape[0] if is_hot else sealed.shape[0]
                    if page_id < 0 or page_id >= num_pages:
                        return row, first + stride * page, is_hot
                    start_slot = (first + stride * page) * page_size
                    if is_hot:
                        k = load_hot(hot[page_id, 0, head], k_tile, k_numbers)
                        v = k if in_keys else load_hot(hot[page_id, 1, head], v_hot_tile, v_numbers)
                    else:
                        # Prefetch the next page, probably sealed too, while computing this one.
                        if index + 1 < end_index and page + 1 < recent_from:
                            next_id = np.int64(batch.sealed_tables[row, page + 1])
                            start = (next_id * num_kv_heads + head) * page_bytes
                            for at in range(start, start + page_bytes, CACHE_LINE):
                                prefetch(sealed, at)
                        part = sealed[page_id, head]
                        k = load_k(part[:k_bytes], k_tile, k_numbers)
                        v = k if in_keys else load_v(part[k_bytes:], v_tile, v_numbers)
                    absorb(
                        queries[block],
                        k,
                        DENSE if is_hot else k_grid,
                        k_numbers,
                        v,
                        v_transposed and not is_hot,
                        DENSE if is_hot else v_grid,
                        k_numbers if in_keys else v_numbers,
                        max(first_slot - start_slot, 0),
                        min(last_slot + 1 - start_slot, page_size),
                        rule.softcap,
                        scratch.scaled[block],
                        scratch.part[block],
                        scratch.scores[block],
                        acc[block],
                        top[block],
                        total[block],
                    )
            for r in range(rows):
                token = batch.tokens[seqs[r // group_heads]]
                q_head = head * group_heads + r % group_heads
                share = 1.0 / total[r] if total[r] > 0.0 else 0.0
                for d in range(value_dim):
                    out[split, token, q_head, d] = acc[r, d] * share
                lse[split, token, q_head] = (top[r] + math.log2(total[r])) * LN_2
        return -1, 0, False

    keep_on_disk(attend, repr((fmt.k, fmt.v, geometry)))
    return DecodeLoop(attend, page_size, head_dim, value_dim, k, v)
