"""Attention over hot and sealed pages."""

from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.op import paged_attention

__all__ = ["AttentionBatch", "paged_attention"]
