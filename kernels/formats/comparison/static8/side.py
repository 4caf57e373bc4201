"""int8 on a calibrated range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kvmesh.kernels.formats.base import Dims, Side


@dataclass(frozen=True, slots=True)
class Static8(Side):
    """x^ = code * scale + zero, with ranges measured on a text.

    per: what has its own range, each "channel" of a head or the whole "layer"
    """

    width: int = 8
    per: str = "channel"

    package: ClassVar[str] = "kvmesh.kernels.formats.comparison.static8"

    def __post_init__(self) -> None:
        if self.per not in ("channel", "layer"):
            raise ValueError(f"per: expected channel or layer, got {self.per!r}")

    @property
    def calibrated(self) -> Mapping[str, Dims]:
        return {"scale": ("heads", "channels"), "zero": ("heads", "channels")}

    def num_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        return page_size * head_dim
