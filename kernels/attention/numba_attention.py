"""`paged_attention` on CPUs: decode in compiled loops, prefill chunks in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.kernels.addresses_numba import Record, address_of, record_of
from kvmesh.kernels.attention import reference
from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.batch_pages import check_queries, firsts_of, missing_page
from kvmesh.kernels.attention.layer import LayerAttention
from kvmesh.kernels.attention.numba_loop import DecodeLoop, decode_loop, missing_of
from kvmesh.kernels.attention.numba_records import SEQUENCES, pages_record
from kvmesh.kernels.attention.window import columns_below
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.merge import merge_states
from kvmesh.kernels.threads import loop_threads

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MIN_PAGES_PER_THREAD = 32  # starting a thread costs about as much as reading this many pages

Ints = npt.NDArray[np.int64]


def has_loop(fmt: KVFormat, page_size: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether there is a compiled loop for this format's pages."""
    return dtype in DTYPES and decode_loop(fmt, page_size, head_dim, DTYPES[dtype]) is not None


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The decode part of a batch, derived once per step.

    sequences: SEQUENCES; held: the arrays that it has the addresses of
    units: of `DecodeLoop.attend`, group by group; work [groups]: the pages that each reads
    shares: the units of each thread
    num_decoding, largest_group: sequences, of all and of a group
    scratches: the threads' memory, by the loop; layers use it one after the other
    """

    sequences: Record
    held: tuple[Any, ...]
    units: Ints
    work: Ints
    shares: tuple[Ints, ...]
    splits: int
    num_decoding: int
    largest_group: int
    scratches: dict[tuple[int, int], tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def scratch(self, loop: DecodeLoop, group_heads: int) -> tuple[torch.Tensor, ...]:
        """For each share. group_heads: query heads per KV head"""
        key = (id(loop), group_heads)
        found = self.scratches.get(key)
        if found is None:
            size = loop.scratch_bytes(self.largest_group * group_heads)
            found = tuple(torch.empty(size, dtype=torch.uint8) for _ in self.shares)
            self.scratches[key] = found
        return found


def paged_attention(
    q: torch.Tensor,
    hot: torch.Tensor,
    sealed: torch.Tensor,
    batch: AttentionBatch,
    layer: LayerAttention,
) -> tuple[torch.Tensor, torch.Tensor]:
    if batch.deterministic:
        batch = batch.by_query()
    num_tokens, num_heads, head_dim = q.shape
    num_pages, _, num_kv_heads, page_size, _ = hot.shape
    loop = decode_loop(layer.fmt, page_size, head_dim, DTYPES[hot.dtype])
    if loop is None:
        raise ValueError(f"fmt: {layer.fmt.name} has no compiled loop; use the reference backend")
    plan = decode_plan(batch, num_kv_heads)
    shape = (plan.splits, num_tokens, num_heads, loop.value_dim)
    out = torch.empty(shape, dtype=torch.float32)
    lse = torch.empty(shape[:3], dtype=torch.float32)
    if plan.num_decoding < num_tokens:  # some rows do not decode
        out.zero_()
        lse.fill_(-torch.inf)
    pages = pages_record(
        hot.data_ptr(),
        sealed.data_ptr(),
        (num_pages, sealed.shape[0]),
        (num_heads, num_kv_heads),
        layer.scale,
        layer.softcap,
        layer.sliding_window,
    )
    records = address_of(plan.sequences), address_of(pages)
    queries = q.float().contiguous()
    rows = (queries.data_ptr(), out.data_ptr(), lse.data_ptr(), num_tokens)

    def attend(share: Ints, scratch: torch.Tensor) -> int:
        if not len(share):  # nothing decodes, so the loop need not be compiled
            return -1
        work = (address_of(share), len(share), scratch.data_ptr())
        return loop.attend(*records, *work, *rows)  # type: ignore[no-any-return]

    first, *more = zip(plan.shares, plan.scratch(loop, num_heads // num_kv_heads), strict=True)
    others = [loop_threads().submit(attend, *each) for each in more]
    for code in [attend(*first), *(other.result() for other in others)]:
        check_pages(code)
    if plan.splits > 1:
        out, lse = merge_states(out, lse)
    else:
        out, lse = out[0], lse[0]
    out = out.to(q.dtype)
    if batch.max_query_len > 1:
        reference.attend_chunks(q, hot, sealed, batch, layer, out, lse)
    return out, lse


def check_pages(code: int) -> None:
    """Raises ValueError if a loop has returned a page that is missing."""
    if code >= 0:
        row, page, is_hot = missing_of(code)
        raise missing_page("hot_tables" if is_hot else "sealed_tables", row, page)


def decode_plan(batch: AttentionBatch, num_kv_heads: int) -> DecodePlan:
    """The batch's decode part, derived on first use."""
    threads = torch.get_num_threads()
    key = ("numba", num_kv_heads, threads)
    plan: DecodePlan | None = batch.plans.get(key)
    if plan is None:
        plan = batch.plans[key] = _plan(batch, num_kv_heads, threads)
    return plan


def _plan(batch: AttentionBatch, num_kv_heads: int, threads: int) -> DecodePlan:
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
    shares = _assign(units, work[units[:, 0]], threads)
    largest_group = int(np.diff(group_starts).max(initial=0))
    tables = [table.contiguous().numpy() for table in (batch.hot_tables, batch.sealed_tables)]
    wide = {
        "group_starts": group_starts,
        "members": members,
        "shared_pages": shared_pages,
        "tokens": starts[:-1],
        "seq_lens": seq_lens,
        "table_rows": batch.rows.numpy().astype(np.int64),
        "firsts": firsts_of(batch),
    }
    held = {name: np.ascontiguousarray(array, np.int64) for name, array in wide.items()}
    sequences = record_of(
        SEQUENCES,
        **{name: address_of(array) for name, array in held.items()},
        hot_tables=address_of(tables[0]),
        sealed_tables=address_of(tables[1]),
        num_groups=len(shared_pages),
        num_members=len(members),
        num_seqs=len(seq_lens),
        num_rows=tables[0].shape[0],
        max_pages=tables[0].shape[1],
        largest_group=largest_group,
        splits=splits,
        sink_pages=batch.sink_pages,
        recent_pages=batch.recent_pages,
        stride=batch.stride,
    )
    kept = (*held.values(), *tables)
    return DecodePlan(sequences, kept, units, work, shares, splits, len(members), largest_group)


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
