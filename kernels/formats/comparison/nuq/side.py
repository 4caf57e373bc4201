"""Calibrated levels with sparse outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kvmesh.kernels.formats.base import Dims, Side
from kvmesh.kernels.formats.packing import packed_bytes

WIDTHS = (2, 3, 4)
POSITION_BYTES = 4  # int32
VALUE_BYTES = 2  # of an outlier, bf16
CHANNEL_BYTES = 1  # of an outlier's channel index
SCALE_BYTES = 1  # e5m3
OFFSET_BYTES = 1  # in 64ths of the scale


@dataclass(frozen=True, slots=True)
class NonUniform(Side):
    """x^ = level(code) * scale + zero, except for outliers, which are stored in bf16.

    Keys have a calibrated scale and zero per channel and are encoded as they were before
    RoPE; values have a scale and zero per token, computed when the page is sealed.
    """

    package: ClassVar[str] = "kvmesh.kernels.formats.comparison.nuq"

    def __post_init__(self) -> None:
        if self.width not in WIDTHS:
            raise ValueError(f"width: expected one of {WIDTHS}, got {self.width}")

    @property
    def calibrated(self) -> Mapping[str, Dims]:
        levels: dict[str, Dims] = {"levels": (2**self.width,), "bounds": (2**self.width - 1,)}
        if self.values:
            return levels
        channels: Dims = ("heads", "channels")
        rope: dict[str, Dims] = {"inv_freq": ("planes",), "interleaved": (1,)}
        return {**levels, **rope, "scale": channels, "zero": channels, "importance": channels}

    @property
    def wants_positions(self) -> bool:
        return not self.values

    def outliers(self, head_dim: int) -> int:
        """Outliers per token and head: the same number for every token, so that page sizes do not
        depend on the data."""
        return max(1, head_dim // 64)

    def num_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        if not 2 <= head_dim <= 256:
            raise ValueError(f"head_dim: expected 2 to 256, so a byte can index it, got {head_dim}")
        sparse = self.outliers(head_dim) * (VALUE_BYTES + CHANNEL_BYTES)
        meta = page_size * (SCALE_BYTES + OFFSET_BYTES) if self.values else POSITION_BYTES
        return packed_bytes(self.width, page_size, head_dim) + page_size * sparse + meta
