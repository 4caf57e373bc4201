"""Attention over hot and sealed pages."""

from kvmesh.kernels.attention.batch import AttentionBatch, GivenDecodeWork, SharedPrefixes
from kvmesh.kernels.attention.op import paged_attention, sharers, warm_up
from kvmesh.kernels.attention.work import (
    PREFILL_CHUNK_TOKENS,
    DecodeWork,
    Lengths,
    Round,
    Windows,
    columns_below,
    workspace_bytes,
)

__all__ = [
    "PREFILL_CHUNK_TOKENS",
    "AttentionBatch",
    "DecodeWork",
    "GivenDecodeWork",
    "Lengths",
    "Round",
    "SharedPrefixes",
    "Windows",
    "columns_below",
    "paged_attention",
    "sharers",
    "warm_up",
    "workspace_bytes",
]
