"""Attention over latents on GPUs: rows and parts of the kernel in `triton_latent.py`.

Queries of decoding sequences read their pages in parts of a fixed size, which are merged in order,
so that a sequence's attention is bitwise the same in any batch; those of longer chunks, of which
there are enough to fill the device, read all of their pages each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.latent_form import form_of, launch_options
from kvmesh.kernels.attention.triton_latent import latent_kernel
from kvmesh.kernels.attention.work import LATENT_PART_TOKENS, MAX_LATENT_BYTES, Lengths
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams
from kvmesh.kernels.gpu import gpu_of
from kvmesh.kernels.merge import merge_states

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Query rows that are computed together.

    tokens, seqs: [rows] int32, each one's row of q and its sequence
    parts: into which the pages of the longest are divided
    """

    tokens: torch.Tensor
    seqs: torch.Tensor
    parts: int


def paged_attention(
    q: torch.Tensor,
    hot: torch.Tensor,
    sealed: torch.Tensor,
    batch: AttentionBatch,
    *,
    fmt: KVFormat,
    scale: float,
    params: LayerParams = NO_PARAMS,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same signature as the public operator, for formats with values in keys.

    Raises ValueError for a softcap or a window, which no model with latents has.
    """
    if softcap is not None or sliding_window is not None:
        raise ValueError("softcap, sliding_window: expected None where values are in keys")
    num_tokens, num_heads, _ = q.shape
    values, capability = fmt.values_in_keys, gpu_of(q).capability
    windows = (batch.sink_pages, batch.recent_pages, batch.stride)
    page_size, head_dim = hot.shape[3:]
    itemsize = hot.element_size()
    form = form_of(fmt, num_heads, head_dim, page_size, itemsize, windows, capability)
    out = q.new_zeros(num_tokens, num_heads, values)
    lse = torch.full((num_tokens, num_heads), -torch.inf, device=q.device)
    page_columns = max(1, LATENT_PART_TOKENS // batch.page_size)
    for rows in _rows_of(batch, num_heads * values):
        count = rows.tokens.shape[0]
        shape = (rows.parts, count, num_heads)
        dtype = torch.float32 if rows.parts > 1 else q.dtype
        found = torch.empty(*shape, values, dtype=dtype, device=q.device)
        found_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        latent_kernel[(count * -(-num_heads // form.heads), rows.parts)](
            q,
            hot,
            sealed.view(torch.int8),
            found,
            found_lse,
            rows.tokens,
            rows.seqs,
            batch.query_starts,
            batch.seq_lens,
            batch.rows,
            batch.rows if batch.firsts is None else batch.firsts,
            batch.hot_tables,
            batch.sealed_tables,
            batch.hot_tables.stride(0),
            q.stride(0),
            q.stride(1),
            page_columns if rows.parts > 1 else batch.hot_tables.shape[1],
            scale * LOG2_E,
            FORM=form,
            **launch_options(form, capability),
        )
        merged = (found[0], found_lse[0])
        if rows.parts > 1:
            merged = merge_states(found, found_lse, backend="triton")
        out[rows.tokens.long()] = merged[0].to(q.dtype)
        lse[rows.tokens.long()] = merged[1]
    return out, lse


def _rows_of(batch: AttentionBatch, row_numbers: int) -> tuple[_Rows, ...]:
    """row_numbers: of a row's output; derived once per step"""
    key = ("latent", row_numbers)
    if key not in batch.plans:
        batch.plans[key] = tuple(_divide(batch, row_numbers))
    return batch.plans[key]  # type: ignore[no-any-return]


def _divide(batch: AttentionBatch, row_numbers: int) -> list[_Rows]:
    lengths = Lengths.of(batch)
    counts, starts = lengths.counts, lengths.query_starts
    device = batch.rows.device

    def rows(seqs: np.ndarray, tokens: np.ndarray, parts: int) -> _Rows:
        both = torch.from_numpy(np.stack((tokens, seqs)).astype(np.int32)).to(device)
        return _Rows(both[0], both[1], parts)

    found = []
    # Sequences of similar lengths together, as the longest decides on the number of parts.
    decoding = np.flatnonzero(counts == 1)
    decoding = decoding[np.argsort(-lengths.seq_lens[decoding], kind="stable")]
    part_tokens = max(1, LATENT_PART_TOKENS // batch.page_size) * batch.page_size * batch.stride
    while len(decoding):
        parts = -(-int(lengths.seq_lens[decoding[0]]) // part_tokens)
        at_once = max(1, MAX_LATENT_BYTES // (4 * parts * row_numbers))
        some, decoding = decoding[:at_once], decoding[at_once:]
        found.append(rows(some, starts[some], parts))
    chunks = np.flatnonzero(counts > 1)
    if len(chunks):
        seqs = np.repeat(chunks, counts[chunks])
        tokens = np.concatenate([np.arange(starts[seq], starts[seq + 1]) for seq in chunks])
        found.append(rows(seqs, tokens, 1))
    return found
