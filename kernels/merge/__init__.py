"""Merging partial attention by log-sum-exp."""

from kvmesh.kernels.merge.op import merge_sinks, merge_states

__all__ = ["merge_sinks", "merge_states"]
