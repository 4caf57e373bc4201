"""Unquantised numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmesh.kernels.formats.base import Side


@dataclass(frozen=True, slots=True)
class Exact(Side):
    """The hot page's bytes, [page_size, head_dim] of the compute dtype."""

    width: int = 0

    package: ClassVar[str] = "kvmesh.kernels.formats.exact"

    def num_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        return page_size * head_dim * dtype_bytes
