"""Numba function of `Codebook`."""

from __future__ import annotations

import numpy as np

from kvmesh.kernels.formats.codebook.side import UNIFORM_STEP, Codebook
from kvmesh.kernels.formats.packing import packed_bytes
from kvmesh.kernels.formats.planes_numba import unpacker
from kvmesh.kernels.formats.tiles_numba import BY_TOKEN, SideLoad, compiled, scale_reader


def side_load(side: Codebook, page_size: int, head_dim: int, dtype: str) -> SideLoad:
    unpack = unpacker(side.width, page_size, head_dim, side.values)
    read_scales = scale_reader(side.scale)
    scales_at = packed_bytes(side.width, page_size, head_dim)
    step = np.float32(UNIFORM_STEP[side.width])
    middle = np.float32((2**side.width - 1) / 2)

    @compiled
    def load(part, tile, numbers):  # type: ignore[no-untyped-def]
        unpack(part, tile)
        scale, offset = numbers[:page_size], numbers[page_size:]
        read_scales(part, scales_at, page_size, scale)
        for n in range(page_size):
            scale[n] *= step
            offset[n] = -middle * scale[n]
        return tile

    return SideLoad(load, side.values, BY_TOKEN, 2 * page_size)
