"""Uniform grids with a scale and an offset per token, or per channel and page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmesh.kernels.formats.base import Side
from kvmesh.kernels.formats.packing import packed_bytes
from kvmesh.kernels.formats.scales import SCALE_BYTES

OFFSET_BYTES = 2  # bf16
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Affine(Side):
    """x^ = code * scale + offset.

    along: which numbers share a scale: "token", the channels of one token; "channel", the page's
        tokens of one channel
    fit: how scale and offset are chosen, see `reference.py`
    scale: how the scale is stored, "bf16" or "e5m3"
    """

    along: str = "token"
    fit: str = "range"
    scale: str = "bf16"

    package: ClassVar[str] = "kvmesh.kernels.formats.affine"
    fits: ClassVar[tuple[str, ...]] = ("range", "least_squares")

    def __post_init__(self) -> None:
        if self.width not in WIDTHS:
            raise ValueError(f"width: expected one of {WIDTHS}, got {self.width}")
        if self.along not in ("token", "channel"):
            raise ValueError(f"along: expected token or channel, got {self.along!r}")
        if self.fit not in self.fits:
            raise ValueError(f"fit: expected one of {self.fits}, got {self.fit!r}")

    def run_length(self, page_size: int, head_dim: int) -> int:
        """Numbers that share a scale."""
        return head_dim if self.along == "token" else page_size

    def runs(self, page_size: int, head_dim: int) -> int:
        """Number of scales per page."""
        return page_size * head_dim // self.run_length(page_size, head_dim)

    def num_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        if head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {head_dim}")
        meta = self.runs(page_size, head_dim) * (OFFSET_BYTES + SCALE_BYTES[self.scale])
        return packed_bytes(self.width, page_size, head_dim) + meta
