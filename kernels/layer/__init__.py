"""What a plain decoder layer computes before and after its attention, each in one call on CPUs."""

from kvmesh.kernels.layer.attention_input import AttentionInput
from kvmesh.kernels.layer.op import FeedForward

__all__ = ["AttentionInput", "FeedForward"]
