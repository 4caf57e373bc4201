"""Writing new keys and values into hot pages."""

from kvmesh.kernels.write.op import write_hot

__all__ = ["write_hot"]
