"""The value of the format `exact`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmesh.kernels.formats.base import KVFormat


@dataclass(frozen=True, slots=True)
class ExactFormat(KVFormat):
    """A sealed page is the hot page's bytes: keys, then values."""

    package: ClassVar[str] = "kvmesh.kernels.formats.exact"

    def page_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        return 2 * page_size * head_dim * dtype_bytes


EXACT = ExactFormat(name="exact", k_bits=0, v_bits=0, aliases=("0", "none", "auto"))
