"""How the kernels divide a step's attention into parts: a list of equal pieces of work.

Keys are cut where positions say, never where the batch would like it, and parts are merged in the
order of their keys. So a sequence's attention is bitwise the same in any batch.

A decoding sequence, whose query is in page P, has these parts, in this order:

    0          its hot pages: the sink, and from P - recent on
    1 …        what it reads together with others (`SharedPrefixes`), in chunks
    then       its other sealed pages, in chunks

    pages   | sink |        |        |     ...     |      | P - recent … P |
            0               C        2C            kC            chunks of C pages

A sequence with several new tokens is cut into blocks of queries, and a block's keys into parts:
0 has the hot pages and the first chunk of sealed pages, the others a chunk each.

On the device a part is found by its number: `starts` says where each sequence's parts begin, and
the rest follows from its length. So the host's work does not depend on the length of contexts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvmesh.kernels import workspace
from kvmesh.kernels.attention.window import Ints, Windows

if TYPE_CHECKING:
    from kvmesh.kernels.attention.batch import AttentionBatch


@dataclass(frozen=True, slots=True)
class Lengths:
    """What of a batch the host knows, as in `AttentionBatch` and `SharedPrefixes`.

    prefix_pages: [num_seqs], set_starts: [num_sets + 1], members: as there; None without prefixes
    firsts: [num_seqs], as there; None where all pages are here
    """

    query_starts: Ints
    seq_lens: Ints
    prefix_pages: Ints | None = None
    members: Ints | None = None
    set_starts: Ints | None = None
    firsts: Ints | None = None

    @classmethod
    def of(cls, batch: AttentionBatch) -> Lengths:
        """Those the batch came with, or read from the device, which waits for it."""
        if batch.lengths is not None:
            return batch.lengths
        prefixes = batch.prefixes
        more = () if prefixes is None else (prefixes.pages, prefixes.members, prefixes.starts)
        found = cls(*(_host(x) for x in (batch.query_starts, batch.seq_lens, *more)))
        return found if batch.firsts is None else replace(found, firsts=_host(batch.firsts))

    @property
    def counts(self) -> Ints:
        """New tokens of each sequence."""
        return np.diff(self.query_starts)

    def sealed(self, windows: Windows) -> tuple[Ints, Ints]:
        """Columns of the sealed pages that the sequences' last queries read: first and end."""
        return windows.sealed(self.seq_lens - 1, self.firsts)

    def sealed_of_first(self, windows: Windows) -> tuple[Ints, Ints]:
        """Those that the sequences' first new tokens read."""
        return windows.sealed(self.seq_lens - self.counts, self.firsts)


@dataclass(frozen=True, slots=True)
class Round:
    """Sequences [first_seq, end_seq) whose parts are computed together, then merged."""

    first_seq: int
    end_seq: int
    first_slot: int
    end_slot: int


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Parts of the sequences with one new token.

    starts: [num_seqs + 1], where each sequence's slots begin: one for each of its parts, none for
        a sequence that does not decode
    set_starts: [num_sets + 1], where the chunks of each set of shared prefixes begin
    """

    starts: Ints
    set_starts: Ints

    @classmethod
    def of(cls, lengths: Lengths, windows: Windows) -> DecodeWork:
        chunk = windows.chunk_pages(workspace.DECODE_CHUNK_TOKENS)
        decodes = lengths.counts == 1
        first, end = lengths.sealed(windows)
        shared = np.zeros_like(first)
        set_chunks = np.zeros(0, np.int64)
        pages = lengths.prefix_pages
        if pages is not None and windows.sliding_window is None:
            first = first + pages
            sink = windows.columns(windows.sink_pages, lengths.firsts)
            shared = np.where(pages > 0, -(-(sink + pages) // chunk) - sink // chunk, 0)
            assert lengths.members is not None and lengths.set_starts is not None
            sizes = np.diff(lengths.set_starts)
            # An empty set may begin after the last member.
            leaders = lengths.members[np.minimum(lengths.set_starts[:-1], len(lengths.members) - 1)]
            set_chunks = np.where(sizes > 0, shared[np.maximum(leaders, 0)], 0)
        own = np.where(end > first, -(-end // chunk) - first // chunk, 0)
        return cls(_starts(np.where(decodes, 1 + shared + own, 0)), _starts(set_chunks))

    @property
    def num_slots(self) -> int:
        return int(self.starts[-1])

    def rounds(self) -> Iterator[Round]:
        """All sequences at once, if their parts' results fit."""
        first, count = 0, len(self.starts) - 1
        while first < count:
            limit = self.starts[first] + workspace.MAX_SLOTS
            end = max(first + 1, int(np.searchsorted(self.starts, limit, side="right")) - 1)
            yield Round(first, end, int(self.starts[first]), int(self.starts[end]))
            first = end


@dataclass(frozen=True, slots=True)
class Slab:
    """Items [first, end) of prefill and the tokens [first_token, end_token) that they compute.

    direct: every block has one part, which is the result
    """

    first: int
    end: int
    first_token: int
    end_token: int
    direct: bool


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Items (sequence, block of queries, part of its keys) of sequences with several new tokens.

    starts: [num_seqs + 1], where each sequence's items begin; those of a block are adjacent
    bases: [num_seqs], the first chunk of each sequence's pages that its queries read here
    """

    starts: Ints
    bases: Ints
    slabs: tuple[Slab, ...]

    @classmethod
    def of(
        cls,
        lengths: Lengths,
        windows: Windows,
        block_q: int,
        item_bytes: int,
        far_chunks: Ints | int = 0,
        min_queries: int = 2,
    ) -> PrefillWork:
        """block_q: queries of a block; item_bytes: of an item's results
        far_chunks: [num_seqs], chunks at the start of each sequence that are attended to elsewhere
            (`far.py`); min_queries: sequences with fewer new tokens have no items"""
        chunk = windows.chunk_pages(workspace.PREFILL_CHUNK_TOKENS)
        counts = lengths.counts
        _, end = lengths.sealed(windows)
        seen, _ = lengths.sealed_of_first(windows)
        bases = np.maximum(seen // chunk, far_chunks)
        parts = np.maximum(-(-end // chunk) - bases, 1)
        blocks = np.where(counts >= min_queries, -(-counts // block_q), 0)
        starts = _starts(blocks * parts)
        max_items = max(1, workspace.MAX_PREFILL_BYTES // item_bytes)
        slabs: list[Slab] = []
        for seq in np.flatnonzero(blocks):
            first_token, count = int(lengths.query_starts[seq]), int(counts[seq])
            num_parts, num_blocks = int(parts[seq]), int(blocks[seq])
            step = num_blocks if num_parts == 1 else max(1, max_items // num_parts)
            for block in range(0, num_blocks, step):
                stop = min(num_blocks, block + step)
                slab = Slab(
                    int(starts[seq]) + block * num_parts,
                    int(starts[seq]) + stop * num_parts,
                    first_token + block * block_q,
                    first_token + min(count, stop * block_q),
                    num_parts == 1,
                )
                slabs.append(slab)
        return cls(starts, bases, tuple(_joined(slabs, max_items)))


def _joined(slabs: list[Slab], max_items: int) -> Iterator[Slab]:
    """Neighbours in one launch, as long as their results fit."""
    held: Slab | None = None
    for slab in slabs:
        if held is None:
            held = slab
        elif (
            held.direct == slab.direct
            and held.end == slab.first
            and (slab.direct or slab.end - held.first <= max_items)
        ):
            held = Slab(held.first, slab.end, held.first_token, slab.end_token, slab.direct)
        else:
            yield held
            held = slab
    if held is not None:
        yield held


def _starts(sizes: Any) -> Ints:
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


def _host(tensor: torch.Tensor) -> Ints:
    return tensor.cpu().numpy().astype(np.int64)
