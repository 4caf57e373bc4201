"""Numba function of `Affine`."""

from __future__ import annotations

from kvmesh.kernels.formats.affine.side import OFFSET_BYTES, Affine
from kvmesh.kernels.formats.packing import packed_bytes
from kvmesh.kernels.formats.planes_numba import unpacker
from kvmesh.kernels.formats.tiles_numba import (
    BY_CHANNEL,
    BY_TOKEN,
    DENSE,
    SideLoad,
    compiled,
    read_bf16,
    scale_reader,
)


def side_load(side: Affine, page_size: int, head_dim: int, dtype: str) -> SideLoad:
    run, runs = side.run_length(page_size, head_dim), side.runs(page_size, head_dim)
    values, along_channel = side.values, side.along == "channel"
    grid = DENSE
    if runs == page_size and not along_channel:
        grid = BY_TOKEN
    elif runs == head_dim and along_channel and not values:
        grid = BY_CHANNEL
    unpack = unpacker(side.width, page_size, head_dim, values)
    read_scales = scale_reader(side.scale)
    offsets_at = packed_bytes(side.width, page_size, head_dim)
    scales_at = offsets_at + runs * OFFSET_BYTES

    @compiled
    def load_codes(part, tile, numbers, table, head):  # type: ignore[no-untyped-def]
        unpack(part, tile)
        read_scales(part, scales_at, runs, numbers[:runs])
        read_bf16(part, offsets_at, runs, numbers[runs:])
        return tile

    if grid != DENSE:
        return SideLoad(load_codes, values, grid, 2 * runs)

    @compiled
    def load(part, tile, numbers, table, head):  # type: ignore[no-untyped-def]
        load_codes(part, tile, numbers, table, head)
        scale, offset = numbers[:runs], numbers[runs:]
        for n in range(page_size):
            for d in range(head_dim):
                # Runs of channels come token by token; runs of tokens, all channels of each.
                if along_channel:
                    i = n // run * head_dim + d
                else:
                    i = (n * head_dim + d) // run
                if values:
                    tile[d, n] = tile[d, n] * scale[i] + offset[i]
                else:
                    tile[n, d] = tile[n, d] * scale[i] + offset[i]
        return tile

    return SideLoad(load, values, DENSE, 2 * runs)
