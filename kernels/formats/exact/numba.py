"""Numba function of `Exact`, which also reads hot pages."""

from __future__ import annotations

import numpy as np

from kvmesh.kernels.formats.exact.side import Exact
from kvmesh.kernels.formats.tiles_numba import SideLoad, compiled, read_bf16


def side_load(side: Exact, page_size: int, head_dim: int, dtype: str) -> SideLoad:
    if dtype == "float32":

        @compiled
        def load(part, tile, numbers):  # type: ignore[no-untyped-def]
            return part.view(np.float32).reshape(page_size, head_dim)

    else:

        @compiled
        def load(part, tile, numbers):  # type: ignore[no-untyped-def]
            for n in range(page_size):
                read_bf16(part, n * 2 * head_dim, head_dim, tile[n])
            return tile

    return SideLoad(load)
