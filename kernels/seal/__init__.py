"""Sealing full hot pages in a KV format."""

from kvmesh.kernels.seal.op import seal_layers, seal_pages

__all__ = ["seal_layers", "seal_pages"]
