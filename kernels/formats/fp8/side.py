"""e4m3 numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmesh.kernels.formats.base import Side

CENTRE_BYTES = 2  # bf16
SCALE_BYTES = 4  # fp32
# Zeros after the scale, so that the values and the next page are aligned to 16 bytes.
PADDING_BYTES = 12


@dataclass(frozen=True, slots=True)
class Fp8(Side):
    """x^ = e4m3 * scale + centre, with one scale per head and page.

    centred: one centre per channel, the page's mean; for keys, whose channels have large means
    """

    width: int = 8
    centred: bool = False

    package: ClassVar[str] = "kvmesh.kernels.formats.fp8"

    def num_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        if head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {head_dim}")
        centres = head_dim * CENTRE_BYTES if self.centred else 0
        return page_size * head_dim + centres + SCALE_BYTES + PADDING_BYTES
