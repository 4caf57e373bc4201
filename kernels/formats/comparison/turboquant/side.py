"""Lloyd-Max levels with a token's root mean square, and a bit for the residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmesh.kernels.formats.base import Side
from kvmesh.kernels.formats.packing import packed_bytes

# Max (1960): for N(0, 1), the positive levels with the smallest squared error.
LEVELS = {
    2: (0.452780, 1.510418),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}
NORM_BYTES = 2  # bf16


@dataclass(frozen=True, slots=True)
class LloydMax(Side):
    """x^ = level(code) * root mean square, for numbers that a rotation has made Gaussian.

    residual: a sign per number for the remaining error: "" for none, "sign" in the same basis,
        "qjl" after a Gaussian projection
    """

    residual: str = ""

    package: ClassVar[str] = "kvmesh.kernels.formats.comparison.turboquant"

    def __post_init__(self) -> None:
        if self.width not in LEVELS:
            raise ValueError(f"width: expected one of {tuple(LEVELS)}, got {self.width}")
        if self.residual not in ("", "sign", "qjl"):
            raise ValueError(f"residual: expected '', sign or qjl, got {self.residual!r}")

    def num_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        total = packed_bytes(self.width, page_size, head_dim) + page_size * NORM_BYTES
        if self.residual:
            total += packed_bytes(1, page_size, head_dim) + page_size * NORM_BYTES
        return total
