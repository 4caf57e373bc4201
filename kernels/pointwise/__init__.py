"""What a decoder layer does between its matrix products and attention."""

from kvmesh.kernels.pointwise.op import add_rms_norm, rms_norm, rope_write, silu_mul

__all__ = ["add_rms_norm", "rms_norm", "rope_write", "silu_mul"]
