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
from typing import Any

import numba
import numpy as np
from numba.np.numpy_support import carray

from kvmesh.kernels.addresses_numba import (
    bytes_at,
    doubles,
    entry_of,
    floats,
    integers,
    narrow_integers,
    pointer,
)
from kvmesh.kernels.attention.numba_records import PAGES, SEQUENCES
from kvmesh.kernels.exp2_numba import EXP2_COEFFICIENTS, LOG2_E
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.exact.side import Exact
from kvmesh.kernels.formats.tiles_numba import (
    BY_CHANNEL,
    BY_TOKEN,
    DENSE,
    compiled,
    float_of,
    prefetch,
)
from kvmesh.kernels.numba_cache import keep_on_disk

CACHE_LINE = 64
_sequences_at, _pages_at = pointer(SEQUENCES), pointer(PAGES)
ATTEND_ARGUMENTS = 9
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


@compiled
def _columns_below(page, first, stride):  # type: ignore[no-untyped-def]
    """See work.py."""
    return max(-((first - page) // stride), 0)


@compiled
def missing_code(row, page, is_hot):  # type: ignore[no-untyped-def]
    """A page that is missing, as one number >= 0."""
    return ((row << 31) + page) * 2 + is_hot


def missing_of(code: int) -> tuple[int, int, bool]:
    """Row, logical page, and whether it is missing from the hot tables."""
    return code >> 32, code >> 1 & (1 << 31) - 1, bool(code & 1)


def _scratch_places(
    page_size: int, head_dim: int, value_dim: int, k_numbers: int, v_numbers: int
) -> Any:
    """(address, rows): where a thread's memory for one group has what, and where it ends: a tile
    for keys and two for values, and a row for each query head of the group's sequences."""
    tile, k_bytes, v_bytes = (
        -(-4 * numbers // CACHE_LINE) * CACHE_LINE
        for numbers in (page_size * head_dim, k_numbers, v_numbers)
    )

    @compiled
    def places(start, rows):  # type: ignore[no-untyped-def]
        k_tile = start
        v_tile, v_hot_tile = k_tile + tile, k_tile + 2 * tile
        k = k_tile + 3 * tile
        v = k + k_bytes
        acc = v + v_bytes
        queries = acc + 8 * rows * value_dim
        scaled = queries + 4 * rows * head_dim
        part = scaled + 4 * rows * head_dim
        scores = part + 4 * rows * value_dim
        total = scores + 4 * rows * page_size
        top = total + 8 * rows
        end = top + 4 * rows
        return k_tile, v_tile, v_hot_tile, k, v, acc, queries, scaled, part, scores, total, top, end

    return places


@dataclass(frozen=True, slots=True)
class DecodeLoop:
    """attend: addresses of (SEQUENCES, PAGES, units), their count, addresses of (scratch, q, out,
        lse), num_tokens -> -1, or the `missing_code` of a page that is missing

    units [n, 3] int64: group, KV head and split
    scratch: a thread's, of `scratch_bytes`, at a multiple of 64
    q [num_tokens, num_heads, head_dim] fp32
    hot [pages, 2, num_kv_heads, bytes], sealed [pages, num_kv_heads, bytes], uint8; 1 instead of 2
        where values are the first value_dim channels of keys
    out [splits, num_tokens, num_heads, value_dim] fp32, lse [splits, num_tokens, num_heads]:
        normalised; -inf where a split has no key
    """

    attend: Any
    value_dim: int
    places: Any

    def scratch_bytes(self, rows: int) -> int:
        """rows: query heads of the largest group's sequences, per KV head"""
        return int(self.places.py_func(0, rows)[-1])

    @property
    def entry(self) -> int:
        """The address of `attend`."""
        return entry_of(self.attend, ATTEND_ARGUMENTS)


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
    k_numbers_size, v_numbers_size = k.numbers_size, v.numbers_size
    v_shape = (head_dim, page_size) if v_transposed else (page_size, head_dim)
    k_bytes = fmt.k.num_bytes(page_size, head_dim, dtype_bytes)
    absorb = _absorber(page_size, head_dim, value_dim)
    page_bytes = fmt.page_bytes(page_size, head_dim, dtype_bytes)
    hot_bytes = page_size * head_dim * dtype_bytes
    sides = fmt.stored_sides
    places = _scratch_places(page_size, head_dim, value_dim, k.numbers_size, v.numbers_size)

    @compiled
    def attend(  # type: ignore[no-untyped-def]
        sequences, pages, units, num_units, scratch, q, out, lse, num_tokens
    ):
        batch, layer = carray(_sequences_at(sequences), 1)[0], carray(_pages_at(pages), 1)[0]
        num_heads, num_kv_heads = layer.num_heads, layer.num_kv_heads
        group_heads = num_heads // num_kv_heads
        split_count, stride, window = batch.splits, batch.stride, layer.window
        scale, softcap = layer.scale, layer.softcap
        group_starts = carray(integers(batch.group_starts), batch.num_groups + 1)
        members = carray(integers(batch.members), batch.num_members)
        shared_pages = carray(integers(batch.shared_pages), batch.num_groups)
        tokens = carray(integers(batch.tokens), batch.num_seqs)
        seq_lens = carray(integers(batch.seq_lens), batch.num_seqs)
        table_rows = carray(integers(batch.table_rows), batch.num_seqs)
        firsts = carray(integers(batch.firsts), batch.num_seqs)
        shape = (batch.num_rows, batch.max_pages)
        hot_tables = carray(narrow_integers(batch.hot_tables), shape)
        sealed_tables = carray(narrow_integers(batch.sealed_tables), shape)
        hot = carray(bytes_at(layer.hot), (layer.num_hot, sides, num_kv_heads, hot_bytes))
        sealed = carray(bytes_at(layer.sealed), (layer.num_sealed, num_kv_heads, page_bytes))
        work = carray(integers(units), (num_units, 3))
        queries_of = carray(floats(q), (num_tokens, num_heads, head_dim))
        outputs = carray(floats(out), (split_count, num_tokens, num_heads, value_dim))
        lses = carray(floats(lse), (split_count, num_tokens, num_heads))
        most = batch.largest_group * group_heads
        at = places(scratch, most)
        k_tile = carray(floats(at[0]), (page_size, head_dim))
        v_tile = carray(floats(at[1]), v_shape)
        v_hot_tile = carray(floats(at[2]), (page_size, head_dim))
        k_numbers = carray(floats(at[3]), k_numbers_size)
        v_numbers = carray(floats(at[4]), v_numbers_size)
        acc_rows = carray(doubles(at[5]), (most, value_dim))
        query_rows = carray(floats(at[6]), (most, head_dim))
        scaled_rows = carray(floats(at[7]), (most, head_dim))
        part_rows = carray(floats(at[8]), (most, value_dim))
        score_rows = carray(floats(at[9]), (most, page_size))
        total_rows = carray(doubles(at[10]), most)
        top_rows = carray(floats(at[11]), most)
        for u in range(num_units):
            group, head, split = work[u]
            seqs = members[group_starts[group] : group_starts[group + 1]]
            rows = len(seqs) * group_heads
            queries, acc = query_rows[:rows], acc_rows[:rows]
            top, total = top_rows[:rows], total_rows[:rows]
            for r in range(rows):
                token = tokens[seqs[r // group_heads]]
                query = queries_of[token, head * group_heads + r % group_heads]
                for d in range(head_dim):
                    queries[r, d] = query[d] * scale
                for d in range(value_dim):
                    acc[r, d] = 0.0
                top[r] = -np.inf
                total[r] = 0.0
            shared = 0 if window else shared_pages[group]
            # First what all sequences read, then for each its own pages: sink, then others.
            for i in range(-1, len(seqs)):
                row = table_rows[seqs[max(i, 0)]]
                # Pages are counted in columns of the tables.
                first = firsts[seqs[max(i, 0)]]
                sink = _columns_below(batch.sink_pages, first, stride)
                last_slot = seq_lens[seqs[max(i, 0)]] - 1
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
                    recent_from = _columns_below(last_page - batch.recent_pages, first, stride)
                    recent_from = max(recent_from, sink)
                count = num_sink + num_other
                end_index = count * (split + 1) // split_count
                for index in range(count * split // split_count, end_index):
                    page = first_page + index
                    if index >= num_sink:
                        page = other_page + index - num_sink
                    is_hot = page < sink or page >= recent_from
                    tables = hot_tables if is_hot else sealed_tables
                    page_id = tables[row, page]
                    num_pages = hot.shape[0] if is_hot else sealed.shape[0]
                    if page_id < 0 or page_id >= num_pages:
                        return missing_code(row, first + stride * page, is_hot)
                    start_slot = (first + stride * page) * page_size
                    if is_hot:
                        k = load_hot(hot[page_id, 0, head], k_tile, k_numbers)
                        v = k if in_keys else load_hot(hot[page_id, 1, head], v_hot_tile, v_numbers)
                    else:
                        # Prefetch the next page, probably sealed too, while computing this one.
                        if index + 1 < end_index and page + 1 < recent_from:
                            next_id = np.int64(sealed_tables[row, page + 1])
                            start = (next_id * num_kv_heads + head) * page_bytes
                            for line in range(start, start + page_bytes, CACHE_LINE):
                                prefetch(sealed, line)
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
                        softcap,
                        scaled_rows[block],
                        part_rows[block],
                        score_rows[block],
                        acc[block],
                        top[block],
                        total[block],
                    )
            for r in range(rows):
                token = tokens[seqs[r // group_heads]]
                q_head = head * group_heads + r % group_heads
                share = 1.0 / total[r] if total[r] > 0.0 else 0.0
                for d in range(value_dim):
                    outputs[split, token, q_head, d] = acc[r, d] * share
                lses[split, token, q_head] = (top[r] + math.log2(total[r])) * LN_2
        return -1

    keep_on_disk(attend, repr((fmt.k, fmt.v, geometry)))
    return DecodeLoop(attend, value_dim, places)
