"""Attention over hot and sealed pages."""

from kvmesh.kernels.attention.batch import AttentionBatch, SharedPrefixes, most_sharers
from kvmesh.kernels.attention.op import paged_attention, warm_up

__all__ = ["AttentionBatch", "SharedPrefixes", "most_sharers", "paged_attention", "warm_up"]
