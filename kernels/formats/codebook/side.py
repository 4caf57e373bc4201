"""Uniform levels for Gaussian numbers, with one scale per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmesh.kernels.formats.base import Side
from kvmesh.kernels.formats.packing import packed_bytes
from kvmesh.kernels.formats.scales import SCALE_BYTES

# Max (1960): the step of the best uniform levels for N(0, 1). Their error is only slightly larger
# than that of the best levels, .1189 instead of .1175 with 2 bits, and a tensor core can multiply
# their codes directly.
UNIFORM_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352}


@dataclass(frozen=True, slots=True)
class Codebook(Side):
    """x^ = level(code) * scale, for numbers that a rotation has made Gaussian.

    scale: how the scale is stored, "bf16" or "e5m3"
    """

    scale: str = "bf16"

    package: ClassVar[str] = "kvmesh.kernels.formats.codebook"

    def __post_init__(self) -> None:
        if self.width not in UNIFORM_STEP:
            raise ValueError(f"width: expected one of {tuple(UNIFORM_STEP)}, got {self.width}")

    def num_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        codes = packed_bytes(self.width, page_size, head_dim)
        return codes + page_size * SCALE_BYTES[self.scale]
