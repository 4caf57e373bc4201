"""Far keys: the sealed pages that all queries of a large chunk see, decoded once for all of them.

With P the page of a chunk's first query, its keys fall into

    0      sink                        n chunks of pages        P - recent
    | hot  | far: decoded, plain attention | near: kernels, masked by position          |

Kernels unpack a page again for every block of 128 rows, and tensor cores wait meanwhile. So pages
are decoded into a workspace, `FAR_TOKENS` at a time, over which an operator for plain keys attends
(`dense.py`), and its results are merged with those of the near keys, in the order of the keys.

What a query sees in which form is the same either way. The cut is a multiple of prefill's chunks,
so near keys are divided as they would be without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvmesh.kernels import workspace
from kvmesh.kernels.attention.window import Ints, Windows
from kvmesh.kernels.attention.work import Lengths

# A program of the operator has as many rows of one head, and they have to fill the device.
PROGRAM_ROWS = 128


@dataclass(frozen=True, slots=True)
class FarKeys:
    """Columns [first, end) of a sequence's sealed pages, and the rows of q that all see them."""

    seq: int
    tokens: slice
    first: int
    end: int

    def pieces(self, page_size: int) -> Iterator[tuple[int, int]]:
        """Columns that are decoded at a time, cut at fixed positions."""
        pages = max(1, workspace.FAR_TOKENS // page_size)
        for start in range(self.first // pages * pages, self.end, pages):
            yield max(start, self.first), min(start + pages, self.end)


@dataclass(frozen=True, slots=True)
class FarWork:
    """chunks: [num_seqs], so many chunks of each sequence's pages, as prefill divides them, have
    no sealed page that is not far; 0 for sequences without far keys"""

    chunks: Ints
    keys: tuple[FarKeys, ...]

    @classmethod
    def none(cls, lengths: Lengths) -> FarWork:
        return cls(np.zeros(len(lengths.seq_lens), np.int64), ())

    @classmethod
    def of(
        cls, lengths: Lengths, windows: Windows, *, num_heads: int, group: int, processors: int
    ) -> FarWork:
        """num_heads, group: query heads of the rank, and per KV head; processors: of the GPU

        A layer with a sliding window has none: its queries see few keys, and few in common."""
        if windows.sliding_window is not None:
            return cls.none(lengths)
        counts = lengths.counts
        pays = counts * group >= workspace.MIN_FAR_ROWS
        pays &= counts * num_heads >= PROGRAM_ROWS * processors
        if not pays.any():
            return cls.none(lengths)
        chunk = windows.chunk_pages(workspace.PREFILL_CHUNK_TOKENS)
        first, end = lengths.sealed_of_first(windows)
        chunks = end // chunk
        chunks[~pays | (chunks * chunk <= first)] = 0
        starts = lengths.query_starts
        keys = tuple(
            FarKeys(
                int(seq),
                slice(int(starts[seq]), int(starts[seq + 1])),
                int(first[seq]),
                int(chunks[seq]) * chunk,
            )
            for seq in np.flatnonzero(chunks)
        )
        return cls(chunks, keys)


def workspace_numbers(
    keys: tuple[FarKeys, ...], page_size: int, num_kv_heads: int, head_dim: int
) -> int:
    """Numbers that decoding the largest piece takes, keys and values."""
    pages = max(end - first for one in keys for first, end in one.pieces(page_size))
    return 2 * num_kv_heads * pages * page_size * head_dim
