"""Attention over hot and sealed pages."""

from kvmesh.kernels.attention.batch import AttentionBatch, GivenDecodeWork, SharedPrefixes
from kvmesh.kernels.attention.op import (
    can_be_deterministic,
    far_attention,
    paged_attention,
    sharers,
    warm_up_far,
)
from kvmesh.kernels.attention.window import Windows, columns_below
from kvmesh.kernels.attention.work import DecodeWork, Lengths, Round

__all__ = [
    "AttentionBatch",
    "DecodeWork",
    "GivenDecodeWork",
    "Lengths",
    "Round",
    "SharedPrefixes",
    "Windows",
    "can_be_deterministic",
    "columns_below",
    "far_attention",
    "paged_attention",
    "sharers",
    "warm_up_far",
]
