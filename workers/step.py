"""A step plan as arrays, and those arrays on a device.

Sequences are packed without padding, except for captured graphs, whose shapes
are fixed: there a padding entry has no slot, no pages to seal and no query.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.kernels.attention import (
    AttentionBatch,
    DecodeWork,
    GivenDecodeWork,
    Lengths,
    Round,
    SharedPrefixes,
    Windows,
)
from kvmesh.kernels.gpu import copied
from kvmesh.workers.plan import StepPlan
from kvmesh.workers.rank_pages import RankPages
from kvmesh.workers.shared_prefixes import PrefixSets

Ints = npt.NDArray[np.int64]
# By sliding window: the work, and its rounds or, for a captured graph, upper bounds of them.
Works = dict[int | None, tuple[DecodeWork, tuple[Round, ...]]]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """T tokens of S sequences, n sampled rows, s pages to seal; all on the host.

    input_ids: [T]; ~row, which is negative, for the token that the row's last step has sampled
    slots: [T], hot page id * page_size + offset; query_starts: [S + 1]; seq_lens: [S], tokens
    including the new ones; rows: [S], block table rows; logits_rows: [n], the sampled chunks'
    last tokens; seal_positions: [s], of each page's first token
    firsts: [S], the first page of each sequence that is on this rank; None if all pages are. A
        token of another rank's page has slot -1
    """

    input_ids: Ints
    positions: Ints
    slots: Ints
    logits_rows: Ints
    query_starts: Ints
    seq_lens: Ints
    rows: Ints
    seal_hot: Ints
    seal_sealed: Ints
    seal_positions: Ints
    prefixes: PrefixSets | None = None
    firsts: Ints | None = None

    @staticmethod
    def of(plan: StepPlan, hot_ids: Ints, page_size: int, pages: RankPages) -> StepArrays:
        """hot_ids: [rows, columns], the rank's table of hot pages; pages: those that it has.
        Sets no prefixes."""
        lengths = np.array([chunk.num_tokens for chunk in plan.chunks])
        starts = np.array([chunk.start for chunk in plan.chunks])
        rows = np.array([chunk.row for chunk in plan.chunks])
        query_starts = np.concatenate(([0], np.cumsum(lengths)))
        # Position of each packed token: its index in its chunk plus the chunk's start.
        positions = np.arange(query_starts[-1]) + np.repeat(starts - query_starts[:-1], lengths)
        hot = pages.page_ids(hot_ids, np.repeat(rows, lengths), positions // page_size)
        own = pages.own(plan.seal_hot)
        seal_hot, seal_sealed, seal_pages = (
            np.array(x, dtype=np.int64)[own]
            for x in (plan.seal_hot, plan.seal_sealed, plan.seal_pages)
        )
        tokens = np.frombuffer(b"".join(chunk.tokens for chunk in plan.chunks), dtype=np.int32)
        if (tokens < 0).any():
            tokens = np.where(tokens < 0, ~np.repeat(rows, lengths), tokens)
        samples = np.array([chunk.sample for chunk in plan.chunks])
        return StepArrays(
            input_ids=tokens.astype(np.int64),
            positions=positions,
            slots=np.where(hot < 0, -1, hot * page_size + positions % page_size),
            logits_rows=query_starts[1:][samples] - 1,
            query_starts=query_starts,
            seq_lens=starts + lengths,
            rows=rows,
            seal_hot=seal_hot // pages.kvp,
            seal_sealed=seal_sealed // pages.kvp,
            seal_positions=seal_pages * page_size,
            firsts=None if pages.kvp == 1 else pages.firsts(rows),
        )

    @property
    def attention_lengths(self) -> Lengths:
        sets = self.prefixes
        found = Lengths(self.query_starts, self.seq_lens, firsts=self.firsts)
        if sets is None:
            return found
        return replace(found, prefix_pages=sets.pages, members=sets.members, set_starts=sets.starts)

    @property
    def is_decode(self) -> bool:
        """One new token per sequence, each of them sampled."""
        return len(self.input_ids) == len(self.rows) == len(self.logits_rows)

    @property
    def num_pending(self) -> int:
        """How many tokens only the ranks know."""
        return int(np.count_nonzero(self.input_ids < 0))

    @property
    def sampled_rows(self) -> Ints:
        """[n], block table rows"""
        if self.is_decode:
            return self.rows
        ends = self.query_starts[1:] - 1
        return self.rows[np.searchsorted(ends, self.logits_rows)]

    def padded(self, size: int) -> StepArrays:
        """A decode step padded to exactly `size` sequences; the padding has no query."""
        assert self.is_decode
        count = len(self.rows)
        return StepArrays(
            input_ids=_pad(self.input_ids, size, 0),
            positions=_pad(self.positions, size, 0),
            slots=_pad(self.slots, size, -1),
            logits_rows=np.arange(size),
            query_starts=_pad(self.query_starts, size + 1, count),
            seq_lens=_pad(self.seq_lens, size, 1),
            rows=_pad(self.rows, size, 0),
            seal_hot=_pad(self.seal_hot, size, -1),
            seal_sealed=_pad(self.seal_sealed, size, -1),
            seal_positions=_pad(self.seal_positions, size, 0),
            firsts=None if self.firsts is None else _pad(self.firsts, size, 0),
            prefixes=None if self.prefixes is None else self.prefixes.padded(size),
        )


@dataclass(frozen=True, slots=True)
class StepTensors:
    """StepArrays on a device, as int64 or int32 depending on who reads them."""

    num_pending: int
    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logits_rows: torch.Tensor
    sampled_rows: torch.Tensor
    seal_hot: torch.Tensor
    seal_sealed: torch.Tensor
    seal_positions: torch.Tensor
    batch: AttentionBatch


@dataclass(frozen=True, slots=True)
class BlockTables:
    """What the attention of every step uses: block tables on the device, and the windows.

    stride, deterministic: as in `AttentionBatch`
    """

    hot: torch.Tensor
    sealed: torch.Tensor
    page_size: int
    sink_pages: int
    recent_pages: int
    stride: int = 1
    deterministic: bool = False

    def batch(
        self,
        query_starts: torch.Tensor,
        seq_lens: torch.Tensor,
        rows: torch.Tensor,
        *,
        max_query_len: int,
        max_seq_len: int,
        firsts: torch.Tensor | None,
        prefixes: SharedPrefixes | None,
        lengths: Lengths | None = None,
        decode_work: dict[int | None, GivenDecodeWork] | None = None,
    ) -> AttentionBatch:
        return AttentionBatch(
            query_starts=query_starts,
            seq_lens=seq_lens,
            rows=rows,
            hot_tables=self.hot,
            sealed_tables=self.sealed,
            page_size=self.page_size,
            sink_pages=self.sink_pages,
            recent_pages=self.recent_pages,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            firsts=firsts,
            stride=self.stride,
            deterministic=self.deterministic,
            prefixes=prefixes,
            lengths=lengths,
            decode_work=decode_work or {},
        )


@dataclass(frozen=True, slots=True)
class StepBuffer:
    """A step's arrays in one buffer, so that one transfer takes them to the device.

    | int64: input_ids … logits_rows, sampled_rows, seal_positions | int32: all others |

    Each array begins at a multiple of 16 bytes, whatever the step: Triton compiles a kernel again
    for pointers that are aligned and for pointers that are not.

    sizes: of the int64 arrays and of the int32 arrays
    """

    host: torch.Tensor
    sizes: tuple[list[int], list[int]]

    @classmethod
    def of(cls, arrays: StepArrays, works: Works, *, pinned: bool) -> StepBuffer:
        parts = _parts(arrays, works)
        sizes = ([len(array) for array in parts[0]], [len(array) for array in parts[1]])
        num_bytes = 8 * sum(_aligned(sizes[0], 2)) + 4 * sum(_aligned(sizes[1], 4))
        # Pinned memory comes from torch's cache, which waits for copies from it to end: a step
        # can be prepared while the one before is on its way.
        made = cls(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned), sizes)
        made._fill(parts)
        return made

    def _fill(self, parts: tuple[list[Ints], list[Ints]]) -> None:
        for view, arrays, step in zip(_typed(self.host, self.sizes), parts, (2, 4), strict=True):
            target, start = view.numpy(), 0
            for array in arrays:
                target[start : start + len(array)] = array
                start += -(-len(array) // step) * step

    def tensors(
        self, buffer: torch.Tensor, arrays: StepArrays, works: Works, tables: BlockTables
    ) -> StepTensors:
        """The step in `buffer`, a copy of `host` on the device, as views; no device is read.

        arrays, works: as given, or of the same sizes: with upper bounds
        """
        wide, narrow = (
            [
                part[:size]
                for part, size in zip(view.split(_aligned(sizes, step)), sizes, strict=True)
            ]
            for view, sizes, step in zip(
                _typed(buffer, self.sizes), self.sizes, (2, 4), strict=True
            )
        )
        input_ids, positions, slots, logits_rows, sampled_rows, seal_positions = wide
        query_starts, seq_lens, rows, seal_hot, seal_sealed, *more = narrow
        firsts = prefixes = None
        if arrays.firsts is not None:
            firsts, *more = more
        if arrays.prefixes is not None:
            prefixes, more = SharedPrefixes(*more[:3]), more[3:]
        decode_work = {
            window: GivenDecodeWork(starts, set_chunks, rounds)
            for (window, (_, rounds)), starts, set_chunks in zip(
                works.items(), more[::2], more[1::2], strict=True
            )
        }
        lengths = np.diff(arrays.query_starts)
        batch = tables.batch(
            query_starts,
            seq_lens,
            rows,
            max_query_len=int(lengths.max()),
            max_seq_len=int(arrays.seq_lens.max()),
            firsts=firsts,
            prefixes=prefixes,
            lengths=arrays.attention_lengths,
            decode_work=decode_work,
        )
        return StepTensors(
            arrays.num_pending,
            input_ids,
            positions,
            slots,
            logits_rows,
            sampled_rows,
            seal_hot,
            seal_sealed,
            seal_positions,
            batch,
        )


def _parts(arrays: StepArrays, works: Works) -> tuple[list[Ints], list[Ints]]:
    a, sets = arrays, arrays.prefixes
    wide = [a.input_ids, a.positions, a.slots, a.logits_rows, a.sampled_rows, a.seal_positions]
    narrow = [a.query_starts, a.seq_lens, a.rows, a.seal_hot, a.seal_sealed]
    if a.firsts is not None:
        narrow.append(a.firsts)
    if sets is not None:
        narrow += [sets.pages, sets.members, sets.starts]
    for work, _ in works.values():
        narrow += [work.starts, work.set_starts]
    return wide, narrow


def _aligned(sizes: list[int], step: int) -> list[int]:
    return [-(-size // step) * step for size in sizes]


def _typed(
    buffer: torch.Tensor, sizes: tuple[list[int], list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    middle = 8 * sum(_aligned(sizes[0], 2))
    return buffer[:middle].view(torch.int64), buffer[middle:].view(torch.int32)


def to_device(
    arrays: StepArrays, tables: BlockTables, device: torch.device, works: Works | None = None
) -> StepTensors:
    """The step's tensors, with the step's own shapes, copied without blocking."""
    buffer = StepBuffer.of(arrays, works or {}, pinned=device.type != "cpu")
    there = buffer.host
    if device.type != "cpu":
        there = there.to(device, non_blocking=True)
    return buffer.tensors(there, arrays, works or {}, tables)


def in_order(sliding_windows: frozenset[int | None]) -> list[int | None]:
    """The same on every rank and in every step."""
    return sorted(sliding_windows, key=lambda window: window or 0)


def decode_works(
    arrays: StepArrays, tables: BlockTables, sliding_windows: frozenset[int | None]
) -> Works:
    """How attention divides the step's decoding sequences, for the layers' sliding windows."""
    works: Works = {}
    lengths = arrays.attention_lengths
    for window in in_order(sliding_windows):
        windows = Windows(
            tables.page_size, tables.sink_pages, tables.recent_pages, window, tables.stride
        )
        work = DecodeWork.of(lengths, windows)
        works[window] = work, tuple(work.rounds())
    return works


def ints(
    values: npt.ArrayLike, device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Integers on the device, copied without blocking."""
    return copied(torch.from_numpy(np.asarray(values, dtype=np.int64)).to(dtype), device)


def _pad(values: Ints, size: int, filling: int) -> Ints:
    return np.concatenate((values, np.full(size - len(values), filling)))
