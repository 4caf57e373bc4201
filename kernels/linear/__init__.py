"""Linears whose weights are stored in few bits."""

from kvmesh.kernels.linear.numba_linear import prepare
from kvmesh.kernels.linear.op import linear
from kvmesh.kernels.linear.packed import PackedWeight, WeightFormat, pack, unpack

__all__ = ["PackedWeight", "WeightFormat", "linear", "pack", "prepare", "unpack"]
