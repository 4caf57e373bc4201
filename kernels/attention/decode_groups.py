"""Sequences with one new token, as the reference attention computes them: in groups.

A group is padded to its longest sequence. It never contains a sequence with fewer than half the
sealed pages of its longest, so padding costs less than computing the sequence. Padding repeats a
page of the *same* sequence: its scores are masked out, and nothing from another sequence, not even
a NaN, can leak in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.batch_pages import BatchPages, HotSlots, SealedPages, once
from kvmesh.kernels.attention.window import Ints, first_seen

MAX_GROUP_TOKENS = 4096


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


def decode_groups(
    batch: AttentionBatch, sides: int, num_kv_heads: int, sliding_window: int | None
) -> tuple[DecodeGroup, ...]:
    """The batch's decoding sequences in groups, derived on first use."""
    return once(_groups, batch, sides, num_kv_heads, sliding_window)


def _groups(pages: BatchPages) -> tuple[DecodeGroup, ...]:
    decode = np.flatnonzero(pages.counts == 1)
    if not len(decode):
        return ()
    # A group's sequences all have hot pages, or none has.
    first, stop = pages.windows.sealed(pages.lens[decode] - 1, pages.firsts[decode])
    _, hot = _hot_columns(pages, decode)
    parts = (decode[hot > 0], decode[(hot == 0) & (stop > first)])
    return tuple(_group(pages, seqs) for part in parts for seqs in _similar(pages, part))


def _similar(pages: BatchPages, seqs: Ints) -> list[Ints]:
    """Sequences with one new token, grouped by similar numbers of sealed pages."""
    if len(seqs) == 0:
        return []
    first, stop = pages.windows.sealed(pages.lens[seqs] - 1, pages.firsts[seqs])
    sealed = stop - first
    order = np.argsort(-sealed, kind="stable")
    groups: list[list[int]] = []
    longest = 0
    for index in order:
        count = int(sealed[index])
        alike = 2 * count >= longest if longest > 8 else (count > 0) == (longest > 0)
        room = groups and len(groups[-1]) * longest * pages.page_size < MAX_GROUP_TOKENS
        if not (room and alike):
            groups.append([])
            longest = count
        groups[-1].append(int(seqs[index]))
    return [np.array(sorted(group), dtype=np.int64) for group in groups]


def _hot_columns(pages: BatchPages, seqs: Ints) -> tuple[Ints, Ints]:
    """Columns [n, longest] of the hot pages that each sequence's last query reads, padded by
    its last, and their count."""
    first, sink_end, recent, end = pages.windows.hot(pages.lens[seqs] - 1, pages.firsts[seqs])
    sinks = sink_end - first
    counts = sinks + np.maximum(end - recent, 0)
    place = np.minimum(np.arange(counts.max())[None, :], counts[:, None] - 1)
    in_sink = place < sinks[:, None]
    columns = np.where(in_sink, first[:, None] + place, (recent - sinks)[:, None] + place)
    return columns, counts


def _group(pages: BatchPages, seqs: Ints) -> DecodeGroup:
    positions = pages.lens[seqs] - 1
    first, stop = pages.windows.sealed(positions, pages.firsts[seqs])
    num_sealed = int((stop - first).max())
    keys: list[Ints] = []
    padding: list[npt.NDArray[np.bool_]] = []
    sealed = None
    if num_sealed:
        place = np.arange(num_sealed)[None, :]
        columns = np.minimum(first[:, None] + place, stop[:, None] - 1)
        sealed = pages.sealed(seqs, columns)
        keys.append(pages.key_positions(seqs, columns))
        padding.append(np.repeat(place >= (stop - first)[:, None], pages.page_size, axis=1))
    columns, counts = _hot_columns(pages, seqs)
    hot_padding = np.repeat(
        np.arange(columns.shape[1])[None, :] >= counts[:, None], pages.page_size, axis=1
    )
    hot_keys = pages.key_positions(seqs, columns)
    unused = hot_padding | (hot_keys > positions[:, None])
    hot_tokens = int((~unused).sum(1).max())
    keys.append(hot_keys[:, :hot_tokens])
    padding.append(unused[:, :hot_tokens])
    invisible = np.concatenate(padding, axis=1)
    if pages.window is not None:
        invisible |= np.concatenate(keys, axis=1) < first_seen(positions, pages.window)[:, None]
    tokens = pages.starts[seqs]
    consecutive = bool((np.diff(tokens) == 1).all())
    unused = unused[:, :hot_tokens]
    return DecodeGroup(
        tokens=slice(int(tokens[0]), int(tokens[-1]) + 1) if consecutive else pages.tensor(tokens),
        size=len(seqs),
        sealed=sealed,
        hot=pages.hot(seqs, columns, hot_tokens) if hot_tokens else None,
        invisible=pages.tensor(invisible[:, None, None, :]) if invisible.any() else None,
        invisible_hot=pages.tensor(unused[:, None, :, None]) if unused.any() else None,
    )
