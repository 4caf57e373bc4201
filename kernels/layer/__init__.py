"""What a plain decoder layer computes before and after its attention, each in one call on CPUs, and
in decode steps all layers in one."""

from kvmesh.kernels.layer.attention_input import AttentionInput
from kvmesh.kernels.layer.op import FeedForward
from kvmesh.kernels.layer.run import LayerRun, RunLayer

__all__ = ["AttentionInput", "FeedForward", "LayerRun", "RunLayer"]
