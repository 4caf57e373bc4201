"""A step plan as arrays, and those arrays on a device.

Sequences are packed without padding, except for captured graphs, whose shapes
are fixed: there a padding entry has no slot, no pages to seal and no query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.kernels.attention import AttentionBatch, SharedPrefixes
from kvmesh.workers.plan import StepPlan
from kvmesh.workers.shared_prefixes import PrefixSets

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """T tokens of S sequences, n sampled rows, s pages to seal; all on the host.

    slots: [T], hot page id * page_size + offset; query_starts: [S + 1]; seq_lens: [S], tokens
    including the new ones; rows: [S], block table rows; logits_rows: [n], the sampled chunks'
    last tokens; seal_positions: [s], of each page's first token
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

    @staticmethod
    def of(plan: StepPlan, hot_ids: Ints, page_size: int) -> StepArrays:
        """hot_ids: [rows, pages], the hot page of each logical page. Sets no prefixes."""
        lengths = np.array([chunk.num_tokens for chunk in plan.chunks])
        starts = np.array([chunk.start for chunk in plan.chunks])
        rows = np.array([chunk.row for chunk in plan.chunks])
        query_starts = np.concatenate(([0], np.cumsum(lengths)))
        # Position of each packed token: its index in its chunk plus the chunk's start.
        positions = np.arange(query_starts[-1]) + np.repeat(starts - query_starts[:-1], lengths)
        pages = hot_ids[np.repeat(rows, lengths), positions // page_size]
        tokens = np.frombuffer(b"".join(chunk.tokens for chunk in plan.chunks), dtype=np.int32)
        samples = np.array([chunk.sample for chunk in plan.chunks])
        return StepArrays(
            input_ids=tokens.astype(np.int64),
            positions=positions,
            slots=pages * page_size + positions % page_size,
            logits_rows=query_starts[1:][samples] - 1,
            query_starts=query_starts,
            seq_lens=starts + lengths,
            rows=rows,
            seal_hot=np.array(plan.seal_hot, dtype=np.int64),
            seal_sealed=np.array(plan.seal_sealed, dtype=np.int64),
            seal_positions=np.array(plan.seal_pages, dtype=np.int64) * page_size,
        )

    @property
    def is_decode(self) -> bool:
        """One new token per sequence, each of them sampled."""
        return len(self.input_ids) == len(self.rows) == len(self.logits_rows)

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
            prefixes=None if self.prefixes is None else self.prefixes.padded(size),
        )


@dataclass(frozen=True, slots=True)
class StepTensors:
    """StepArrays on a device, as int64 or int32 depending on who reads them."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logits_rows: torch.Tensor
    seal_hot: torch.Tensor
    seal_sealed: torch.Tensor
    seal_positions: torch.Tensor
    batch: AttentionBatch


@dataclass(frozen=True, slots=True)
class BlockTables:
    """What the attention of every step uses: block tables on the device, and the windows."""

    hot: torch.Tensor
    sealed: torch.Tensor
    page_size: int
    sink_pages: int
    recent_pages: int

    def batch(
        self,
        query_starts: torch.Tensor,
        seq_lens: torch.Tensor,
        rows: torch.Tensor,
        *,
        max_query_len: int,
        max_seq_len: int,
        prefixes: SharedPrefixes | None,
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
            prefixes=prefixes,
        )


def to_device(arrays: StepArrays, tables: BlockTables, device: torch.device) -> StepTensors:
    """The step's tensors, with the step's own shapes."""
    lengths = np.diff(arrays.query_starts)
    return StepTensors(
        input_ids=ints(arrays.input_ids, torch.int64, device),
        positions=ints(arrays.positions, torch.int64, device),
        slots=ints(arrays.slots, torch.int64, device),
        logits_rows=ints(arrays.logits_rows, torch.int64, device),
        seal_hot=ints(arrays.seal_hot, torch.int32, device),
        seal_sealed=ints(arrays.seal_sealed, torch.int32, device),
        seal_positions=ints(arrays.seal_positions, torch.int64, device),
        batch=tables.batch(
            ints(arrays.query_starts, torch.int32, device),
            ints(arrays.seq_lens, torch.int32, device),
            ints(arrays.rows, torch.int32, device),
            max_query_len=int(lengths.max()),
            max_seq_len=int(arrays.seq_lens.max()),
            prefixes=_shared(arrays.prefixes, device),
        ),
    )


def _shared(sets: PrefixSets | None, device: torch.device) -> SharedPrefixes | None:
    if sets is None:
        return None
    arrays = (sets.pages, sets.members, sets.starts)
    return SharedPrefixes(*(ints(array, torch.int32, device) for array in arrays))


def ints(values: npt.ArrayLike, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Integers on the device, copied without blocking."""
    host = torch.from_numpy(np.asarray(values, dtype=np.int64)).to(dtype)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def _pad(values: Ints, size: int, filling: int) -> Ints:
    return np.concatenate((values, np.full(size - len(values), filling)))
