"""Levels for Gaussian numbers with one scale per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmesh.kernels.formats.base import Side
from kvmesh.kernels.formats.packing import packed_bytes
from kvmesh.kernels.formats.scales import SCALE_BYTES

# Max (1960): for N(0, 1), the positive levels with the smallest squared error, and the step of
# the best uniform ones. Their error is only slightly larger, .1189 instead of .1175 with 2 bits,
# and a tensor core can multiply their codes directly.
UNIFORM_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352}
LLOYD_MAX = {
    2: (0.452780, 1.510418),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}
RESIDUAL_NORM_BYTES = 2  # bf16


@dataclass(frozen=True, slots=True)
class Codebook(Side):
    """x^ = level(code) * scale, for numbers that a rotation has made Gaussian.

    levels: "uniform" or "lloyd_max"
    norm: how the scale is chosen, "eden" or "rms", see `reference.py`
    scale: how the scale is stored, "bf16" or "e5m3"
    residual: a sign per number for the remaining error: "" for none, "sign" in the
        same basis, "qjl" after a Gaussian projection; for comparison with TurboQuant
    """

    levels: str = "uniform"
    norm: str = "eden"
    scale: str = "bf16"
    residual: str = ""

    package: ClassVar[str] = "kvmesh.kernels.formats.codebook"

    def __post_init__(self) -> None:
        if self.width not in LLOYD_MAX:
            raise ValueError(f"width: expected one of {tuple(LLOYD_MAX)}, got {self.width}")
        if self.levels not in ("uniform", "lloyd_max"):
            raise ValueError(f"levels: expected uniform or lloyd_max, got {self.levels!r}")
        if self.norm not in ("eden", "rms"):
            raise ValueError(f"norm: expected eden or rms, got {self.norm!r}")
        if self.residual not in ("", "sign", "qjl"):
            raise ValueError(f"residual: expected '', sign or qjl, got {self.residual!r}")

    def num_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        codes = packed_bytes(self.width, page_size, head_dim)
        total = codes + page_size * SCALE_BYTES[self.scale]
        if self.residual:
            total += packed_bytes(1, page_size, head_dim) + page_size * RESIDUAL_NORM_BYTES
        return total
