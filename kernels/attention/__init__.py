"""Attention over hot and sealed pages."""

from kvmesh.kernels.attention.batch import AttentionBatch, SharedPrefixes
from kvmesh.kernels.attention.op import paged_attention, sharers, warm_up

__all__ = ["AttentionBatch", "SharedPrefixes", "paged_attention", "sharers", "warm_up"]
