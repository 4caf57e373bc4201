"""Attention on GPUs over formats without kernels, which are for comparison.

Plain torch decodes the sealed pages that the step's queries read, layer by layer, into pages of
the format `exact`, over which the kernels attend. So a step's cost grows with its contexts as if
they were prefilled, and it waits for the device: for evaluating, not for serving well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from kvmesh.kernels import workspace
from kvmesh.kernels.attention import triton_attention
from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.layer import LayerAttention
from kvmesh.kernels.attention.window import Windows
from kvmesh.kernels.attention.work import Lengths
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams
from kvmesh.kernels.formats.registry import get_format


def paged_attention(
    q: torch.Tensor,
    hot: torch.Tensor,
    sealed: torch.Tensor,
    batch: AttentionBatch,
    layer: LayerAttention,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public operator."""
    layer.fmt.check_params(layer.params)
    plain = replace(layer, fmt=get_format("exact"), params=NO_PARAMS)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    for tokens, ids, part in _parts(batch, layer.sliding_window):
        pages = _exact_pages(sealed, ids, layer.fmt, layer.params, hot)
        out[tokens], lse[tokens] = triton_attention.paged_attention(
            q[tokens], hot, pages, part, plain
        )
    return out, lse


def _parts(
    batch: AttentionBatch, sliding_window: int | None
) -> Iterator[tuple[slice, torch.Tensor, AttentionBatch]]:
    """(rows of q, ids of the sealed pages that they read, the batch of those rows over these pages
    in order), for consecutive sequences; derived once per step."""
    key = ("decoded", sliding_window)
    if key not in batch.plans:
        batch.plans[key] = tuple(_divide(batch, sliding_window))
    yield from batch.plans[key]


def _divide(
    batch: AttentionBatch, sliding_window: int | None
) -> Iterator[tuple[slice, torch.Tensor, AttentionBatch]]:
    lengths = Lengths.of(batch)
    windows = Windows.of(batch, sliding_window)
    # From the first page that the first new token reads to the last one that the last reads.
    first, _ = lengths.sealed_of_first(windows)
    _, end = lengths.sealed(windows)
    counts = (end - first).clip(min=0) * (lengths.counts > 0)
    start = 0
    while start < batch.num_seqs:
        stop = start + 1
        while stop < batch.num_seqs and (
            int(counts[start : stop + 1].sum()) * batch.page_size <= workspace.DECODED_TOKENS
        ):
            stop += 1
        rows = batch.rows[start:stop].long()
        tables = torch.full_like(batch.sealed_tables[rows], -1)
        ids: list[torch.Tensor] = []
        for seq in range(start, stop):
            held = sum(len(some) for some in ids)
            pages = slice(int(first[seq]), int(first[seq]) + int(counts[seq]))
            ids.append(batch.sealed_tables[rows[seq - start], pages])
            places = torch.arange(held, held + int(counts[seq]), dtype=torch.int32)
            tables[seq - start, pages] = places.to(tables.device)
        tokens = slice(int(lengths.query_starts[start]), int(lengths.query_starts[stop]))
        if tokens.stop > tokens.start:
            part = replace(
                batch,
                query_starts=batch.query_starts[start : stop + 1] - tokens.start,
                seq_lens=batch.seq_lens[start:stop],
                rows=torch.arange(stop - start, dtype=torch.int32, device=rows.device),
                hot_tables=batch.hot_tables[rows],
                sealed_tables=tables,
                firsts=None if batch.firsts is None else batch.firsts[start:stop],
                prefixes=None,
                lengths=Lengths(
                    lengths.query_starts[start : stop + 1] - tokens.start,
                    lengths.seq_lens[start:stop],
                    firsts=None if lengths.firsts is None else lengths.firsts[start:stop],
                ),
                decode_work={},
            )
            yield tokens, torch.cat(ids), part
        start = stop


def _exact_pages(
    sealed: torch.Tensor, ids: torch.Tensor, fmt: KVFormat, params: LayerParams, hot: torch.Tensor
) -> torch.Tensor:
    """[max(1, len(ids)), num_kv_heads, bytes] uint8 in the format `exact`."""
    num_kv_heads, page_size, head_dim = hot.shape[2:]
    exact = get_format("exact")
    page_bytes = exact.page_bytes(page_size, head_dim, hot.element_size())
    pages = sealed.new_empty((max(1, len(ids)), num_kv_heads, page_bytes))
    step = max(1, workspace.DECODED_AT_ONCE // page_size)
    for start in range(0, len(ids), step):
        some = sealed.index_select(0, ids[start : start + step])
        k, v = fmt.decode(some, page_size, head_dim, hot.dtype, params)
        pages[start : start + len(some)] = exact.encode(k, v)
    return pages
