"""Index arithmetic of the reference attention, done once per step for all layers.

Sequences with one new token are grouped and computed together, padded to the longest.
A group never contains a sequence with fewer than half the sealed pages of its longest,
so padding costs less than computing the sequence. Padding repeats a page of the *same*
sequence: its scores are masked out, and nothing from another sequence, not even a NaN,
can leak in.

A sequence with several new tokens is cut into blocks of queries. With P0 and P1
the pages of a block's first and last query, logical pages fall into

    0      sink          P0 - recent     P1 - recent          P1
    | hot   | sealed      | sealed and hot | hot               |
             far: no mask   near: masked by position, both forms side by side

Pages are counted in columns of the tables, see `AttentionBatch`. Where not all pages are here, a
query may have no key; then its rows of the results stay 0 and -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.window import Ints, Windows, first_seen

MAX_GROUP_TOKENS = 4096
MIN_BLOCK_TOKENS = 64
MAX_BLOCK_TOKENS = 256
MAX_FAR_TOKENS = 8192


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


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """b sequences with one new token each.

    tokens: rows of q: [b] int64, or a slice if they are consecutive
    sealed, hot: with b * num_kv_heads rows
    invisible: [b, 1, 1, keys] bool over sealed then hot keys, or None if all are visible
    invisible_hot: [b, 1, hot.tokens, 1] bool: slots of V that may hold anything
    """

    tokens: torch.Tensor | slice
    size: int
    sealed: SealedPages | None
    hot: HotSlots | None
    invisible: torch.Tensor | None
    invisible_hot: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ChunkBlock:
    """Consecutive new tokens of one sequence.

    tokens: rows of q
    far: parts of the sealed pages that every query sees whole; num_kv_heads rows each
    near_bias: [queries, keys] fp32, 0 or -inf, over near sealed then hot keys
    near_blind: [queries] bool: those that see none of these keys; None if all see one
    """

    tokens: slice
    far: tuple[SealedPages, ...]
    near_sealed: SealedPages | None
    hot: HotSlots | None
    near_bias: torch.Tensor
    near_blind: torch.Tensor | None


def decode_groups(
    batch: AttentionBatch, sides: int, num_kv_heads: int, sliding_window: int | None
) -> tuple[DecodeGroup, ...]:
    """The batch's decoding sequences in groups, derived on first use."""
    return _once(batch, _Planner.groups, sides, num_kv_heads, sliding_window)  # type: ignore[no-any-return]


def chunk_blocks(
    batch: AttentionBatch, sides: int, num_kv_heads: int, sliding_window: int | None
) -> tuple[ChunkBlock, ...]:
    """The batch's sequences with several new tokens in blocks, derived on first use."""
    return _once(batch, _Planner.blocks, sides, num_kv_heads, sliding_window)  # type: ignore[no-any-return]


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


def _once(batch: AttentionBatch, make: Callable[[_Planner], Any], *geometry: int | None) -> Any:
    key = (make, *geometry)
    if key not in batch.plans:
        batch.plans[key] = make(_Planner(batch, *geometry))  # type: ignore[arg-type]
    return batch.plans[key]


class _Planner:
    def __init__(
        self, batch: AttentionBatch, sides: int, num_kv_heads: int, sliding_window: int | None
    ) -> None:
        self.sides = sides
        self.num_kv_heads = num_kv_heads
        self.windows = Windows.of(batch, sliding_window)
        self.window = sliding_window
        self.page_size = batch.page_size
        self.device = batch.seq_lens.device
        self.starts = _ints(batch.query_starts)
        self.lens = _ints(batch.seq_lens)
        self.rows = _ints(batch.rows)
        self.firsts = firsts_of(batch)
        self.hot_tables = batch.hot_tables.cpu().numpy()
        self.sealed_tables = batch.sealed_tables.cpu().numpy()

        self.counts = np.diff(self.starts)
        check_queries(self.counts, self.lens)

    def groups(self) -> tuple[DecodeGroup, ...]:
        decode = np.flatnonzero(self.counts == 1)
        if not len(decode):
            return ()
        # A group's sequences all have hot pages, or none has.
        first, stop = self.windows.sealed(self.lens[decode] - 1, self.firsts[decode])
        _, hot = self._hot_pages(decode)
        parts = (decode[hot > 0], decode[(hot == 0) & (stop > first)])
        return tuple(self._group(seqs) for part in parts for seqs in self._similar(part))

    def blocks(self) -> tuple[ChunkBlock, ...]:
        blocks = (
            self._block(int(seq), start, stop)
            for seq in np.flatnonzero(self.counts > 1)
            for start, stop in self._cuts(int(self.lens[seq]), int(self.counts[seq]))
        )
        return tuple(block for block in blocks if block is not None)

    def _cuts(self, length: int, count: int) -> list[tuple[int, int]]:
        """Blocks of a sequence's new tokens, cut at page boundaries.

        Short blocks need little masking; long blocks unpack the past fewer times.
        """
        tokens = min(max(length // 16, MIN_BLOCK_TOKENS), MAX_BLOCK_TOKENS)
        tokens = max(tokens // self.page_size, 1) * self.page_size
        past = length - count
        edges = range((past // tokens + 1) * tokens, length, tokens)
        cuts = [0, *(edge - past for edge in edges), count]
        return list(pairwise(cuts))

    def _similar(self, seqs: Ints) -> list[Ints]:
        """Sequences with one new token, grouped by similar numbers of sealed pages."""
        if len(seqs) == 0:
            return []
        first, stop = self.windows.sealed(self.lens[seqs] - 1, self.firsts[seqs])
        sealed = stop - first
        order = np.argsort(-sealed, kind="stable")
        groups: list[list[int]] = []
        longest = 0
        for index in order:
            count = int(sealed[index])
            alike = 2 * count >= longest if longest > 8 else (count > 0) == (longest > 0)
            room = groups and len(groups[-1]) * longest * self.page_size < MAX_GROUP_TOKENS
            if not (room and alike):
                groups.append([])
                longest = count
            groups[-1].append(int(seqs[index]))
        return [np.array(sorted(group), dtype=np.int64) for group in groups]

    def _hot_pages(self, seqs: Ints) -> tuple[Ints, Ints]:
        """Columns [n, longest] of the hot pages that each sequence's last query reads, padded by
        its last, and their count."""
        first, sink_end, recent, end = self.windows.hot(self.lens[seqs] - 1, self.firsts[seqs])
        sinks = sink_end - first
        counts = sinks + np.maximum(end - recent, 0)
        place = np.minimum(np.arange(counts.max())[None, :], counts[:, None] - 1)
        in_sink = place < sinks[:, None]
        columns = np.where(in_sink, first[:, None] + place, (recent - sinks)[:, None] + place)
        return columns, counts

    def _group(self, seqs: Ints) -> DecodeGroup:
        positions = self.lens[seqs] - 1
        first, stop = self.windows.sealed(positions, self.firsts[seqs])
        num_sealed = int((stop - first).max())
        keys: list[Ints] = []
        padding: list[npt.NDArray[np.bool_]] = []
        sealed = None
        if num_sealed:
            place = np.arange(num_sealed)[None, :]
            columns = np.minimum(first[:, None] + place, stop[:, None] - 1)
            sealed = self._sealed(seqs, columns)
            keys.append(self._key_positions(seqs, columns))
            padding.append(np.repeat(place >= (stop - first)[:, None], self.page_size, axis=1))
        columns, counts = self._hot_pages(seqs)
        hot_padding = np.repeat(
            np.arange(columns.shape[1])[None, :] >= counts[:, None], self.page_size, axis=1
        )
        hot_keys = self._key_positions(seqs, columns)
        unused = hot_padding | (hot_keys > positions[:, None])
        hot_tokens = int((~unused).sum(1).max())
        keys.append(hot_keys[:, :hot_tokens])
        padding.append(unused[:, :hot_tokens])
        invisible = np.concatenate(padding, axis=1)
        if self.window is not None:
            invisible |= np.concatenate(keys, axis=1) < first_seen(positions, self.window)[:, None]
        tokens = self.starts[seqs]
        consecutive = bool((np.diff(tokens) == 1).all())
        unused = unused[:, :hot_tokens]
        return DecodeGroup(
            tokens=slice(int(tokens[0]), int(tokens[-1]) + 1)
            if consecutive
            else self._tensor(tokens),
            size=len(seqs),
            sealed=sealed,
            hot=self._hot(seqs, columns, hot_tokens) if hot_tokens else None,
            invisible=self._tensor(invisible[:, None, None, :]) if invisible.any() else None,
            invisible_hot=self._tensor(unused[:, None, :, None]) if unused.any() else None,
        )

    def _block(self, seq: int, start: int, stop: int) -> ChunkBlock | None:
        """None if these queries have no key here."""
        offset = int(self.starts[seq])
        past = int(self.lens[seq] - (self.starts[seq + 1] - self.starts[seq]))
        positions = past + np.arange(start, stop)
        one = np.array([seq])
        first_page, last_page = positions[[0, -1]] // self.page_size
        seen = int(self.windows.first_pages(positions[:1])[0])
        sink, recent = self.windows.sink_pages, self.windows.recent_pages
        # Sealed pages that any query sees; every query sees those below far_stop in
        # sealed form, and no window cuts into those from far_first on.
        sealed_first = max(sink, seen)
        sealed_stop = max(sealed_first, int(last_page) - recent)
        far_stop = max(sealed_first, int(first_page) - recent)
        far_first = sealed_first
        if self.window is not None:
            whole = -(-int(first_seen(positions[-1:], self.window)[0]) // self.page_size)
            far_first = min(max(sealed_first, whole), far_stop)
        step = max(1, MAX_FAR_TOKENS // self.page_size)

        first = self.firsts[seq]

        def columns(*spans: tuple[int, int]) -> Ints:
            """[1, pages]: those of the pages in these spans that are here."""
            return np.concatenate(
                [np.arange(*self.windows.columns(np.array(span), first)) for span in spans]
            )[None, :]

        far_columns = columns((far_first, far_stop))
        far = tuple(
            self._sealed(one, far_columns[:, place : place + step])
            for place in range(0, far_columns.shape[1], step)
        )
        near = columns((sealed_first, far_first), (far_stop, sealed_stop))
        hot_first = max(sink, int(first_page) - recent, seen)
        sink_stop = min(sink, int(last_page) + 1)
        hot = columns((min(seen, sink_stop), sink_stop), (hot_first, int(last_page) + 1))
        near_keys, hot_keys = self._key_positions(one, near)[0], self._key_positions(one, hot)[0]
        hot_keys = hot_keys[: np.count_nonzero(hot_keys <= positions[-1])]
        if not (far or near_keys.size or hot_keys.size):
            return None
        bias = self._near_bias(positions, near_keys, hot_keys)
        blind: Any = np.isneginf(bias).all(1)
        return ChunkBlock(
            tokens=slice(offset + start, offset + stop),
            far=far,
            near_sealed=self._sealed(one, near) if near.size else None,
            hot=self._hot(one, hot, len(hot_keys)) if hot_keys.size else None,
            near_bias=self._tensor(bias),
            near_blind=self._tensor(blind) if blind.any() else None,
        )

    def _near_bias(self, positions: Ints, sealed: Ints, hot: Ints) -> npt.NDArray[np.float32]:
        edge = (
            positions // self.page_size - self.windows.recent_pages
        )  # the first recent page of each query
        hot_pages = hot // self.page_size
        seen_hot = (hot_pages < self.windows.sink_pages)[None, :] | (
            hot_pages[None, :] >= edge[:, None]
        )
        seen_hot &= hot[None, :] <= positions[:, None]
        seen_sealed = (sealed // self.page_size)[None, :] < edge[:, None]
        seen = np.concatenate((seen_sealed, seen_hot), axis=1)
        if self.window is not None:
            keys = np.concatenate((sealed, hot))
            seen &= keys[None, :] >= first_seen(positions, self.window)[:, None]
        return np.where(seen, np.float32(0.0), np.float32(-np.inf))

    def _key_positions(self, seqs: Ints, columns: Ints) -> Ints:
        """[n, pages] of n sequences -> [n, pages * page_size]"""
        logical = self.firsts[seqs][:, None] + self.windows.stride * columns
        keys = logical[:, :, None] * self.page_size + np.arange(self.page_size)
        return keys.reshape(len(columns), -1)

    def _pages(self, tables: npt.NDArray[np.int32], name: str, seqs: Ints, columns: Ints) -> Ints:
        rows = self.rows[seqs]
        ids = tables[rows[:, None], columns].astype(np.int64)
        if (ids < 0).any():
            seq, place = (int(i[0]) for i in np.nonzero(ids < 0))
            page = self.firsts[seqs[seq]] + self.windows.stride * columns[seq, place]
            raise missing_page(name, int(rows[seq]), int(page))
        return ids

    def _sealed(self, seqs: Ints, columns: Ints) -> SealedPages:
        ids = self._pages(self.sealed_tables, "sealed_tables", seqs, columns)
        index = ids[:, None, :] * self.num_kv_heads + np.arange(self.num_kv_heads)[None, :, None]
        index = index.reshape(-1, ids.shape[1])
        return SealedPages(self._tensor(index.reshape(-1)), len(index))

    def _hot(self, seqs: Ints, columns: Ints, tokens: int) -> HotSlots:
        ids = self._pages(self.hot_tables, "hot_tables", seqs, columns)
        heads = np.arange(self.num_kv_heads)[None, :, None]
        k = ids[:, None, :] * (self.sides * self.num_kv_heads) + heads
        index = np.stack([k + side * self.num_kv_heads for side in range(self.sides)]).reshape(-1)
        return HotSlots(self._tensor(index), int(ids[0, 0]) if ids.size == 1 else None, tokens)

    def _tensor(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _ints(tensor: torch.Tensor) -> Ints:
    return tensor.cpu().numpy().astype(np.int64)
