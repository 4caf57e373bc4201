"""Uniform grids with a scale and an offset for each run of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmesh.kernels.formats.affine.side import Affine


@dataclass(frozen=True, slots=True)
class Grouped(Affine):
    """`Affine` whose scales and offsets are of runs.

    run: the maximum number that share them: the run length is the largest divisor of the
        head's channels (or the page's tokens) up to `run`
    """

    run: int = 64

    package: ClassVar[str] = "kvmesh.kernels.formats.comparison.grouped"
    fits: ClassVar[tuple[str, ...]] = ("range", "half_quadratic")

    def run_length(self, page_size: int, head_dim: int) -> int:
        whole = Affine.run_length(self, page_size, head_dim)
        return next(n for n in range(min(self.run, whole), 0, -1) if whole % n == 0)
