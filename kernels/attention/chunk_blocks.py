"""Sequences with several new tokens, as the reference attention computes them: blocks of queries.

With P0 and P1 the pages of a block's first and last query, logical pages fall into

    0      sink          P0 - recent     P1 - recent          P1
    | hot   | sealed      | sealed and hot | hot               |
             far: no mask   near: masked by position, both forms side by side
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.batch_pages import BatchPages, HotSlots, SealedPages, once
from kvmesh.kernels.attention.window import Ints, first_seen

MIN_BLOCK_TOKENS = 64
MAX_BLOCK_TOKENS = 256
MAX_FAR_TOKENS = 8192


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


def chunk_blocks(
    batch: AttentionBatch, sides: int, num_kv_heads: int, sliding_window: int | None
) -> tuple[ChunkBlock, ...]:
    """The batch's sequences with several new tokens in blocks, derived on first use."""
    return once(_blocks, batch, sides, num_kv_heads, sliding_window)


def _blocks(pages: BatchPages) -> tuple[ChunkBlock, ...]:
    blocks = (
        _block(pages, int(seq), start, stop)
        for seq in np.flatnonzero(pages.counts > 1)
        for start, stop in _cuts(pages, int(pages.lens[seq]), int(pages.counts[seq]))
    )
    return tuple(block for block in blocks if block is not None)


def _cuts(pages: BatchPages, length: int, count: int) -> list[tuple[int, int]]:
    """Blocks of a sequence's new tokens, cut at page boundaries.

    Short blocks need little masking; long blocks unpack the past fewer times.
    """
    tokens = min(max(length // 16, MIN_BLOCK_TOKENS), MAX_BLOCK_TOKENS)
    tokens = max(tokens // pages.page_size, 1) * pages.page_size
    past = length - count
    edges = range((past // tokens + 1) * tokens, length, tokens)
    cuts = [0, *(edge - past for edge in edges), count]
    return list(pairwise(cuts))


def _block(pages: BatchPages, seq: int, start: int, stop: int) -> ChunkBlock | None:
    """None if these queries have no key here."""
    offset = int(pages.starts[seq])
    past = int(pages.lens[seq] - (pages.starts[seq + 1] - pages.starts[seq]))
    positions = past + np.arange(start, stop)
    one = np.array([seq])
    first_page, last_page = positions[[0, -1]] // pages.page_size
    seen = int(pages.windows.first_pages(positions[:1])[0])
    sink, recent = pages.windows.sink_pages, pages.windows.recent_pages
    # Sealed pages that any query sees; every query sees those below far_stop in
    # sealed form, and no window cuts into those from far_first on.
    sealed_first = max(sink, seen)
    sealed_stop = max(sealed_first, int(last_page) - recent)
    far_stop = max(sealed_first, int(first_page) - recent)
    far_first = sealed_first
    if pages.window is not None:
        whole = -(-int(first_seen(positions[-1:], pages.window)[0]) // pages.page_size)
        far_first = min(max(sealed_first, whole), far_stop)
    step = max(1, MAX_FAR_TOKENS // pages.page_size)

    first = pages.firsts[seq]

    def columns(*spans: tuple[int, int]) -> Ints:
        """[1, pages]: those of the pages in these spans that are here."""
        return np.concatenate(
            [np.arange(*pages.windows.columns(np.array(span), first)) for span in spans]
        )[None, :]

    far_columns = columns((far_first, far_stop))
    far = tuple(
        pages.sealed(one, far_columns[:, place : place + step])
        for place in range(0, far_columns.shape[1], step)
    )
    near = columns((sealed_first, far_first), (far_stop, sealed_stop))
    hot_first = max(sink, int(first_page) - recent, seen)
    sink_stop = min(sink, int(last_page) + 1)
    hot = columns((min(seen, sink_stop), sink_stop), (hot_first, int(last_page) + 1))
    near_keys, hot_keys = pages.key_positions(one, near)[0], pages.key_positions(one, hot)[0]
    hot_keys = hot_keys[: np.count_nonzero(hot_keys <= positions[-1])]
    if not (far or near_keys.size or hot_keys.size):
        return None
    bias = _near_bias(pages, positions, near_keys, hot_keys)
    blind: Any = np.isneginf(bias).all(1)
    return ChunkBlock(
        tokens=slice(offset + start, offset + stop),
        far=far,
        near_sealed=pages.sealed(one, near) if near.size else None,
        hot=pages.hot(one, hot, len(hot_keys)) if hot_keys.size else None,
        near_bias=pages.tensor(bias),
        near_blind=pages.tensor(blind) if blind.any() else None,
    )


def _near_bias(
    pages: BatchPages, positions: Ints, sealed: Ints, hot: Ints
) -> npt.NDArray[np.float32]:
    # The first recent page of each query
    edge = positions // pages.page_size - pages.windows.recent_pages
    hot_pages = hot // pages.page_size
    seen_hot = (hot_pages < pages.windows.sink_pages)[None, :] | (
        hot_pages[None, :] >= edge[:, None]
    )
    seen_hot &= hot[None, :] <= positions[:, None]
    seen_sealed = (sealed // pages.page_size)[None, :] < edge[:, None]
    seen = np.concatenate((seen_sealed, seen_hot), axis=1)
    if pages.window is not None:
        keys = np.concatenate((sealed, hot))
        seen &= keys[None, :] >= first_seen(positions, pages.window)[:, None]
    return np.where(seen, np.float32(0.0), np.float32(-np.inf))
