"""Pages of a batch as the reference attention reads them: gathered by index, once per step for all
layers.

Pages are counted in columns of the tables, see `AttentionBatch`. Where not all pages are here, a
query may have no key; then its rows of the results stay 0 and -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.window import Ints, Windows

_Plan = TypeVar("_Plan")


@dataclass(frozen=True, slots=True)
class HotSlots:
    """Hot pages to read, for each (sequence, KV head) in order.

    index: [sides * rows * pages] int64 rows of hot viewed as [num_hot_pages * sides *
        num_kv_heads, page_size * head_dim]: all keys, then all values; sides: 1 if values are
        in keys, otherwise 2
    only_page: the page's id if there is only one, which then needs no gathering
    tokens: how many of a row's slots are used; the rest are cut off
    """

    index: torch.Tensor
    only_page: int | None
    tokens: int


@dataclass(frozen=True, slots=True)
class SealedPages:
    """Sealed pages to read, for each (sequence, KV head) in order.

    index: [rows * pages] int64 rows of sealed viewed as [num_sealed_pages * num_kv_heads,
        page_bytes]
    """

    index: torch.Tensor
    rows: int


class BatchPages:
    """A batch's pages, and what the reference needs to read some of them.

    sides: 1 if values are in keys, otherwise 2
    window: of a layer, in tokens
    """

    def __init__(
        self, batch: AttentionBatch, sides: int, num_kv_heads: int, sliding_window: int | None
    ) -> None:
        self.windows = Windows.of(batch, sliding_window)
        self.window = sliding_window
        self.page_size = batch.page_size
        self.starts = _ints(batch.query_starts)
        self.lens = _ints(batch.seq_lens)
        self.firsts = firsts_of(batch)
        self.counts = np.diff(self.starts)
        check_queries(self.counts, self.lens)
        self._sides = sides
        self._num_kv_heads = num_kv_heads
        self._device = batch.seq_lens.device
        self._rows = _ints(batch.rows)
        self._hot_tables = batch.hot_tables.cpu().numpy()
        self._sealed_tables = batch.sealed_tables.cpu().numpy()

    def key_positions(self, seqs: Ints, columns: Ints) -> Ints:
        """[n, pages] of n sequences -> [n, pages * page_size]"""
        logical = self.firsts[seqs][:, None] + self.windows.stride * columns
        keys = logical[:, :, None] * self.page_size + np.arange(self.page_size)
        return keys.reshape(len(columns), -1)

    def sealed(self, seqs: Ints, columns: Ints) -> SealedPages:
        ids = self._ids(self._sealed_tables, "sealed_tables", seqs, columns)
        index = ids[:, None, :] * self._num_kv_heads + np.arange(self._num_kv_heads)[None, :, None]
        index = index.reshape(-1, ids.shape[1])
        return SealedPages(self.tensor(index.reshape(-1)), len(index))

    def hot(self, seqs: Ints, columns: Ints, tokens: int) -> HotSlots:
        ids = self._ids(self._hot_tables, "hot_tables", seqs, columns)
        heads = np.arange(self._num_kv_heads)[None, :, None]
        k = ids[:, None, :] * (self._sides * self._num_kv_heads) + heads
        index = np.stack([k + side * self._num_kv_heads for side in range(self._sides)]).reshape(-1)
        return HotSlots(self.tensor(index), int(ids[0, 0]) if ids.size == 1 else None, tokens)

    def tensor(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _ids(self, tables: npt.NDArray[np.int32], name: str, seqs: Ints, columns: Ints) -> Ints:
        rows = self._rows[seqs]
        ids = tables[rows[:, None], columns].astype(np.int64)
        if (ids < 0).any():
            seq, place = (int(i[0]) for i in np.nonzero(ids < 0))
            page = self.firsts[seqs[seq]] + self.windows.stride * columns[seq, place]
            raise missing_page(name, int(rows[seq]), int(page))
        return ids


def once(
    make: Callable[[BatchPages], _Plan],
    batch: AttentionBatch,
    sides: int,
    num_kv_heads: int,
    sliding_window: int | None,
) -> _Plan:
    """What `make` returns for the batch and layers of this kind, made on first use."""
    key = (make, sides, num_kv_heads, sliding_window)
    if key not in batch.plans:
        batch.plans[key] = make(BatchPages(batch, sides, num_kv_heads, sliding_window))
    return batch.plans[key]  # type: ignore[no-any-return]


def firsts_of(batch: AttentionBatch) -> Ints:
    """The first logical page of each sequence that is here: 0 where all are."""
    if batch.firsts is None:
        return np.zeros(batch.num_seqs, np.int64)
    return _ints(batch.firsts)


def check_queries(counts: Ints, lens: Ints) -> None:
    """Raises ValueError for a sequence with more new tokens than total tokens."""
    short = (counts > lens) & (counts > 0)
    if short.any():
        seq = int(np.flatnonzero(short)[0])
        raise ValueError(
            f"batch: sequence {seq} has {counts[seq]} new tokens, but seq_lens is {lens[seq]}"
        )


def missing_page(table: str, row: int, page: int) -> ValueError:
    return ValueError(
        f"{table}: row {row} has no page id at logical page {page}, which a query needs"
    )


def _ints(tensor: torch.Tensor) -> Ints:
    return tensor.cpu().numpy().astype(np.int64)
