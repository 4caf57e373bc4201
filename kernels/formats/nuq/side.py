"""Calibrated levels, dense and sparse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from kvmesh.kernels.formats.base import Dims, Params, Side
from kvmesh.kernels.formats.packing import packed_bytes

WIDTHS = (2, 3, 4)
POSITION_BYTES = 4  # int32
VALUE_BYTES = 2  # of an outlier, bf16
CHANNEL_BYTES = 1  # where in the head it lies
SCALE_BYTES = 1  # e5m3
OFFSET_BYTES = 1  # in 64ths of the scale


@dataclass(frozen=True, slots=True)
class NonUniform(Side):
    """x^ = level(code) * scale + zero, but for the outliers, which are kept as they are.

    Keys have a scale and a zero a channel, found beforehand, and are encoded as they
    were before RoPE; values have them a token, found when the page is sealed.

    turned: planes that RoPE turns, and whether they are interleaved; of keys whose
        parameters are known
    """

    turned: tuple[int, bool] | None = field(default=None, kw_only=True)

    package: ClassVar[str] = "kvmesh.kernels.formats.nuq"

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

    def bound(self, params: Params) -> NonUniform:
        if self.values:
            return self
        planes = params["inv_freq"].shape[0]
        return replace(self, turned=(planes, bool(params["interleaved"].item())))

    def outliers(self, head_dim: int) -> int:
        """Numbers of a token and head that are kept apart: the same for every token, so that
        ranks, batches and pages never have to agree on which have more."""
        return max(1, head_dim // 64)

    def num_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        if not 2 <= head_dim <= 256:
            raise ValueError(f"head_dim: expected 2 to 256, which a byte counts, got {head_dim}")
        sparse = self.outliers(head_dim) * (VALUE_BYTES + CHANNEL_BYTES)
        meta = page_size * (SCALE_BYTES + OFFSET_BYTES) if self.values else POSITION_BYTES
        return packed_bytes(self.width, page_size, head_dim) + page_size * sparse + meta
