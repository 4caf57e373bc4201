"""Numba function of `Affine`."""

from __future__ import annotations

from kvmesh.kernels.formats.affine.side import OFFSET_BYTES, Affine
from kvmesh.kernels.formats.packing import packed_bytes
from kvmesh.kernels.formats.planes_numba import unpacker
from kvmesh.kernels.formats.tiles_numba import (
    BY_CHANNEL,
    BY_TOKEN,
    SideLoad,
    compiled,
    read_bf16,
    scale_reader,
)


def side_load(side: Affine, page_size: int, head_dim: int, dtype: str) -> SideLoad:
    runs = side.runs(page_size, head_dim)
    unpack = unpacker(side.width, page_size, head_dim, side.values)
    read_scales = scale_reader(side.scale)
    offsets_at = packed_bytes(side.width, page_size, head_dim)
    scales_at = offsets_at + runs * OFFSET_BYTES

    @compiled
    def load(part, tile, numbers):  # type: ignore[no-untyped-def]
        unpack(part, tile)
        read_scales(part, scales_at, runs, numbers[:runs])
        read_bf16(part, offsets_at, runs, numbers[runs:])
        return tile

    grid = BY_TOKEN if side.along == "token" else BY_CHANNEL
    return SideLoad(load, side.values, grid, 2 * runs)
