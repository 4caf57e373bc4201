"""`paged_attention` on CPUs: decode in compiled loops, prefill chunks in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.kernels.attention import reference
from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.numba_loop import (
    DecodeLoop,
    Rule,
    Scratch,
    Sequences,
    decode_loop,
)
from kvmesh.kernels.attention.plan import check_queries, firsts_of, missing_page
from kvmesh.kernels.attention.window import columns_below
from kvmesh.kernels.exp2_numba import LOG2_E
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams
from kvmesh.kernels.merge import merge_states
from kvmesh.kernels.threads import loop_threads

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MIN_PAGES_PER_THREAD = 32  # starting a thread costs about as much as reading this many pages

Ints = npt.NDArray[np.int64]


def has_loop(fmt: KVFormat, page_size: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether there is a compiled loop for this format's pages."""
    return dtype in DTYPES and decode_loop(fmt, page_size, head_dim, DTYPES[dtype]) is not None


@dataclass(frozen=True, slots=True)
class _Decode:
    """The decode part of a batch, derived once per step.

    shares: the work of each thread, as units of `DecodeLoop.attend`
    largest_group: sequences of it
    scratches: the threads' memory, by the loop; layers use it one after the other
    """

    sequences: Sequences
    shares: tuple[Ints, ...]
    splits: int
    largest_group: int
    scratches: dict[tuple[int, int], tuple[Scratch, ...]] = field(default_factory=dict)

    def scratch(self, loop: DecodeLoop, group_heads: int) -> tuple[Scratch, ...]:
        """For each share. group_heads: query heads per KV head"""
        key = (id(loop), group_heads)
        found = self.scratches.get(key)
        if found is None:
            rows = self.largest_group * group_heads
            found = self.scratches[key] = tuple(loop.scratch(rows) for _ in self.shares)
        return found


def paged_attention(
    q: torch.Tensor,
    hot: torch.Tensor,
    sealed: torch.Tensor,
    batch: AttentionBatch,
    *,
    fmt: KVFormat,
    scale: float,
    params: LayerParams = NO_PARAMS,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if batch.deterministic:
        batch = batch.by_query()
    num_tokens, num_heads, head_dim = q.shape
    num_pages, sides, num_kv_heads, page_size, _ = hot.shape
    loop = decode_loop(fmt, page_size, head_dim, DTYPES[hot.dtype])
    if loop is None:
        raise ValueError(f"fmt: {fmt.name} has no compiled loop; use the reference backend")
    decode = _decode_of(batch, num_kv_heads)
    shape = (decode.splits, num_tokens, num_heads, loop.value_dim)
    out = torch.empty(shape, dtype=torch.float32)
    lse = torch.empty(shape[:3], dtype=torch.float32)
    if decode.sequences.members.size < num_tokens:  # some rows do not decode
        out.zero_()
        lse.fill_(-torch.inf)
    rule = Rule(
        decode.splits,
        batch.sink_pages,
        batch.recent_pages,
        batch.stride,
        sliding_window or 0,
        np.float32(scale if softcap else scale * LOG2_E),
        np.float32(softcap or 0.0),
    )

    def attend(share: Ints, scratch: Scratch) -> tuple[int, int, bool]:
        if not len(share):  # nothing decodes, so the loop need not be compiled
            return -1, 0, False
        return loop.attend(  # type: ignore[no-any-return]
            share, decode.sequences, rule, *arrays, scratch
        )

    arrays = (
        q.float().contiguous().numpy(),
        hot.view(num_pages, sides, num_kv_heads, -1).view(torch.uint8).numpy(),
        sealed.numpy(),
        out.numpy(),
        lse.numpy(),
    )
    first, *work = zip(decode.shares, decode.scratch(loop, num_heads // num_kv_heads), strict=True)
    others = [loop_threads().submit(attend, *each) for each in work]
    for row, page, is_hot in [attend(*first), *(other.result() for other in others)]:
        if row >= 0:
            raise missing_page("hot_tables" if is_hot else "sealed_tables", row, page)
    if decode.splits > 1:
        out, lse = merge_states(out, lse)
    else:
        out, lse = out[0], lse[0]
    out = out.to(q.dtype)
    if batch.max_query_len > 1:
        reference.attend_chunks(
            q,
            hot,
            sealed,
            batch,
            out,
            lse,
            fmt=fmt,
            scale=scale,
            params=params,
            softcap=softcap,
            sliding_window=sliding_window,
        )
    return out, lse


def _decode_of(batch: AttentionBatch, num_kv_heads: int) -> _Decode:
    """The batch's decode part, derived on first use."""
    threads = torch.get_num_threads()
    key = ("numba", num_kv_heads, threads)
    decode = batch.plans.get(key)
    if decode is None:
        decode = batch.plans[key] = _plan(batch, num_kv_heads, threads)
    return decode


def _plan(batch: AttentionBatch, num_kv_heads: int, threads: int) -> _Decode:
    starts = batch.query_starts.numpy().astype(np.int64)
    seq_lens = batch.seq_lens.numpy().astype(np.int64)
    counts = np.diff(starts)
    check_queries(counts, seq_lens)
    _check_tables(batch, seq_lens)
    group_starts, members, shared_pages = _groups(batch, np.flatnonzero(counts == 1))
    # The pages to read, by group; a split of them is a unit of work.
    own = -(-seq_lens // (batch.page_size * batch.stride))[members]
    firsts = group_starts[:-1]
    work = np.add.reduceat(own, firsts) if len(members) else own
    work -= shared_pages * (np.diff(group_starts) - 1)
    tasks = max(len(work) * num_kv_heads, 1)
    threads = max(1, min(threads, int(work.sum()) * num_kv_heads // MIN_PAGES_PER_THREAD))
    splits = 1
    if threads > 1 and len(members) == len(counts) and not batch.deterministic:
        splits = max(1, min(-(-2 * threads // tasks), int(work.max()) // MIN_PAGES_PER_THREAD))
    grid = tuple(np.indices((len(work), num_kv_heads, splits)))
    units = np.stack(grid, -1).reshape(-1, 3)
    sequences = Sequences(
        group_starts=group_starts,
        members=members,
        shared_pages=shared_pages,
        tokens=starts[:-1],
        seq_lens=seq_lens,
        table_rows=batch.rows.numpy().astype(np.int64),
        firsts=firsts_of(batch),
        hot_tables=batch.hot_tables.numpy(),
        sealed_tables=batch.sealed_tables.numpy(),
    )
    shares = _assign(units, work[units[:, 0]], threads)
    return _Decode(sequences, shares, splits, int(np.diff(group_starts).max(initial=0)))


def _check_tables(batch: AttentionBatch, seq_lens: Ints) -> None:
    """Check the tables' bounds, because compiled loops do not."""
    num_rows, max_pages = batch.hot_tables.shape
    pages = -(-seq_lens // batch.page_size)
    if int(columns_below(pages, firsts_of(batch), batch.stride).max(initial=0)) > max_pages:
        longest = int(seq_lens.max())
        raise ValueError(
            f"seq_lens: {longest} tokens do not fit {max_pages} pages of {batch.page_size} tokens"
        )
    if batch.num_seqs and not 0 <= int(batch.rows.min()) <= int(batch.rows.max()) < num_rows:
        raise ValueError(f"rows: expected rows below {num_rows} of the tables, got {batch.rows}")


def _groups(batch: AttentionBatch, decoding: Ints) -> tuple[Ints, Ints, Ints]:
    """group_starts, members and shared_pages of `Sequences`, for the decoding sequences."""
    if batch.prefixes is None:
        return np.arange(len(decoding) + 1), decoding, np.zeros(len(decoding), np.int64)
    pages = batch.prefixes.pages.numpy().astype(np.int64)
    starts = batch.prefixes.starts.numpy().astype(np.int64)
    starts = starts[np.append(np.diff(starts) > 0, True)]  # drop empty sets
    sharing = batch.prefixes.members.numpy()[: starts[-1]].astype(np.int64)
    alone = decoding[pages[decoding] == 0]
    shared_pages = np.append(pages[sharing[starts[:-1]]], np.zeros(len(alone), np.int64))
    group_starts = np.append(starts, starts[-1] + np.arange(1, len(alone) + 1))
    return group_starts, np.append(sharing, alone), shared_pages


def _assign(units: Ints, work: Ints, threads: int) -> tuple[Ints, ...]:
    """The units per thread: the largest first, each to the thread with the least work."""
    if threads == 1:
        return (units,)
    assigned: list[list[int]] = [[] for _ in range(threads)]
    loads = [0] * threads
    for unit in np.argsort(-work, kind="stable"):
        idlest = loads.index(min(loads))
        assigned[idlest].append(int(unit))
        loads[idlest] += int(work[unit])
    return tuple(units[indices] for indices in assigned)
