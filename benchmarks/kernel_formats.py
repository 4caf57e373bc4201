"""The KV formats whose kernels are measured."""

from __future__ import annotations

from dataclasses import replace

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.nuq.side import NonUniform
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.kernels.formats.tiles_triton import why_no_kernels

# Differ from g64-int and int8-static only in sealing.
READ_ALIKE = ("g64-hqq4", "g64-hqq2", "int8-static-layer")
FORMATS = tuple(
    name
    for name in format_names()
    if why_no_kernels(get_format(name)) is None and name not in READ_ALIKE
)


def as_served(name: str, head_dim: int) -> KVFormat:
    """The format, with keys rotated by RoPE as in Llama if its side needs to know."""
    fmt = get_format(name)
    if isinstance(fmt.k, NonUniform):
        return replace(fmt, k=replace(fmt.k, rope=(head_dim // 2, False)))
    return fmt
