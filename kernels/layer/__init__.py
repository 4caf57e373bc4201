"""What a plain decoder layer computes after its attention, as one operator for CPUs."""

from kvmesh.kernels.layer.op import FeedForward

__all__ = ["FeedForward"]
