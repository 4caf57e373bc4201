"""Attention over latents on GPUs: rows and parts of the kernel in `triton_latent.py`.

Queries of decoding sequences read their pages in parts of a fixed size, which are merged in order,
so that a sequence's attention is bitwise the same in any batch; those of longer chunks, of which
there are enough to fill the device, read all of their pages each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from kvmesh.kernels import workspace
from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.latent_form import OPTIONS, form_of
from kvmesh.kernels.attention.layer import LayerAttention
from kvmesh.kernels.attention.triton_form import Geometry
from kvmesh.kernels.attention.triton_latent import latent_kernel
from kvmesh.kernels.attention.triton_parts import BatchPointers
from kvmesh.kernels.attention.window import Ints
from kvmesh.kernels.attention.work import Lengths
from kvmesh.kernels.direct import BoundKernel, Grid
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.gpu import gpu_of
from kvmesh.kernels.merge.triton_merge import MERGE_OPTIONS, channel_blocks, merge_kernel

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Query rows that are computed together in every layer.

    tokens: [rows] int64, of q
    kernel: which writes results of parts, results: (parts, rows, heads); merge: of the parts, None
        if there is one
    """

    tokens: torch.Tensor
    kernel: BoundKernel
    grid: Grid
    results: tuple[int, int, int]
    merge: BoundKernel | None


def paged_attention(
    q: torch.Tensor,
    hot: torch.Tensor,
    sealed: torch.Tensor,
    batch: AttentionBatch,
    layer: LayerAttention,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public operator; for formats with values in keys.

    Raises ValueError for a softcap or a window, which no model with latents has.
    """
    fmt, scale = layer.fmt, layer.scale
    if layer.softcap is not None or layer.sliding_window is not None:
        raise ValueError("softcap, sliding_window: expected None where values are in keys")
    key = ("latent", fmt.name, q.shape, q.stride(), scale)
    step = batch.plans.get(key)
    if step is None:
        step = batch.plans[key] = tuple(_rows(q, hot, batch, fmt, scale))
    num_tokens, num_heads, _ = q.shape
    values = fmt.values_in_keys
    out = q.new_zeros(num_tokens, num_heads, values)
    lse = torch.full((num_tokens, num_heads), -torch.inf, device=q.device)
    sealed = sealed.view(torch.int8)
    for rows in step:
        _, count, _ = rows.results
        dtype = q.dtype if rows.merge is None else torch.float32
        found = torch.empty(*rows.results, values, dtype=dtype, device=q.device)
        found_lse = torch.empty(rows.results, dtype=torch.float32, device=q.device)
        rows.kernel(rows.grid, q, hot, sealed, found, found_lse)
        merged, merged_lse = found[0], found_lse[0]
        if rows.merge is not None:
            merged, merged_lse = torch.empty_like(merged), torch.empty_like(merged_lse)
            grid = (count * num_heads, 1, channel_blocks(values))
            rows.merge(grid, found, found_lse, merged, merged_lse)
        out[rows.tokens] = merged.to(q.dtype)
        lse[rows.tokens] = merged_lse
    return out, lse


def _rows(
    q: torch.Tensor, hot: torch.Tensor, batch: AttentionBatch, fmt: KVFormat, scale: float
) -> Iterator[_Rows]:
    num_heads, windows = q.shape[1], (batch.sink_pages, batch.recent_pages)
    geometry = Geometry.of(hot, num_heads, batch.stride)
    form = form_of(fmt, geometry, windows, gpu_of(q).capability)
    for tokens, seqs, parts in _divide(batch, num_heads * form.values):
        both = torch.from_numpy(np.stack((tokens, seqs))).to(q.device)
        token_ids, seq_ids = both.int()
        part_columns = max(1, workspace.LATENT_PART_TOKENS // batch.page_size)
        fixed = (
            token_ids,
            seq_ids,
            BatchPointers.of(batch, batch.rows, batch.rows),
            batch.hot_tables.stride(0),
            q.stride(0),
            q.stride(1),
            part_columns if parts > 1 else batch.hot_tables.shape[1],
            scale * LOG2_E,
            form,
        )
        merge = None
        if parts > 1:
            sizes = (parts, len(tokens) * num_heads, form.values)
            merge = BoundKernel(merge_kernel, sizes, MERGE_OPTIONS)
        yield _Rows(
            both[0],
            BoundKernel(latent_kernel, fixed, OPTIONS),
            (len(tokens) * -(-num_heads // form.heads), parts, 1),
            (parts, len(tokens), num_heads),
            merge,
        )


def _divide(batch: AttentionBatch, row_numbers: int) -> Iterator[tuple[Ints, Ints, int]]:
    """Rows of q that are computed together, their sequences, and into how many parts the pages of
    the longest are divided; row_numbers: of a row's output"""
    lengths = Lengths.of(batch)
    counts, starts = lengths.counts, lengths.query_starts
    # Sequences of similar lengths together, as the longest decides on the number of parts.
    decoding = np.flatnonzero(counts == 1)
    decoding = decoding[np.argsort(-lengths.seq_lens[decoding], kind="stable")]
    part_tokens = (
        max(1, workspace.LATENT_PART_TOKENS // batch.page_size) * batch.page_size * batch.stride
    )
    while len(decoding):
        parts = -(-int(lengths.seq_lens[decoding[0]]) // part_tokens)
        at_once = max(1, workspace.MAX_LATENT_BYTES // (4 * parts * row_numbers))
        some, decoding = decoding[:at_once], decoding[at_once:]
        yield starts[some], some, parts
    chunks = np.flatnonzero(counts > 1)
    if len(chunks):
        seqs = np.repeat(chunks, counts[chunks])
        tokens = np.concatenate([np.arange(starts[seq], starts[seq + 1]) for seq in chunks])
        yield tokens, seqs, 1
