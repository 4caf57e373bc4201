"""Linears whose weights are stored in few bits, or whose bits depend on no other row."""

from kvmesh.kernels.linear.grouped import GroupedFormat, GroupedWeight, Kind, grouped, quantise
from kvmesh.kernels.linear.large_pages import move_to_large_pages
from kvmesh.kernels.linear.numba_linear import prepare
from kvmesh.kernels.linear.op import fixed_linear, grouped_linear, linear
from kvmesh.kernels.linear.packed import PackedWeight, WeightFormat, pack, unpack

__all__ = [
    "GroupedFormat",
    "GroupedWeight",
    "Kind",
    "PackedWeight",
    "WeightFormat",
    "fixed_linear",
    "grouped",
    "grouped_linear",
    "linear",
    "move_to_large_pages",
    "pack",
    "prepare",
    "quantise",
    "unpack",
]
