"""The correctness gate of the benchmarks: attention kernels against plain torch."""

from __future__ import annotations

import torch

from benchmarks.device import DEVICE
from kvmesh.kernels.attention import AttentionBatch, paged_attention
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.workers.kv_pool import KVPool

GATE_PAGES = 64 if DEVICE == "cuda" else 4
# Norm of the error divided by that of the output: rounding gives .005 in bf16.
TOLERANCE = 0.02


@torch.inference_mode()
def gate(pool: KVPool, fmt: KVFormat, heads: int) -> None:
    """End the run unless they agree over the last pages of the last layer's arena.

    heads: number of query heads
    """
    hot, sealed = pool.hot[-1], pool.sealed[-1]
    size = hot.shape[3]
    pages = min(len(sealed), GATE_PAGES)
    ids = torch.arange(len(sealed) - pages, len(sealed) + 1, dtype=torch.int32, device=hot.device)
    ids[-1] = 0  # the query's own page is hot
    batch = AttentionBatch(
        query_starts=torch.tensor([0, 1], dtype=torch.int32, device=hot.device),
        seq_lens=torch.tensor([pages * size + 9], dtype=torch.int32, device=hot.device),
        rows=torch.zeros(1, dtype=torch.int32, device=hot.device),
        hot_tables=torch.zeros_like(ids)[None],
        sealed_tables=ids[None],
        page_size=size,
        sink_pages=0,
        recent_pages=0,
        max_query_len=1,
        max_seq_len=(pages + 1) * size,
    )
    q = torch.randn(1, heads, hot.shape[-1], device=hot.device).to(hot.dtype)
    got, want = (
        paged_attention(
            q, hot, sealed, batch, fmt=fmt, scale=hot.shape[-1] ** -0.5, backend=backend
        )[0].double()
        for backend in ("triton", "reference")
    )
    error = float((got - want).norm() / want.norm())
    if not error <= TOLERANCE:
        raise SystemExit(f"{fmt.name}: the kernels' output is off by {error:.2e} of plain torch's")
