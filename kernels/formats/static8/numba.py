"""Numba functions of `Static8`."""

from __future__ import annotations

import numpy as np

from kvmesh.kernels.formats.packing import BLOCK_TOKENS
from kvmesh.kernels.formats.static8.side import Static8
from kvmesh.kernels.formats.tiles_numba import BY_CHANNEL, SideLoad, compiled


def side_load(side: Static8, page_size: int, head_dim: int, dtype: str) -> SideLoad:
    block = min(BLOCK_TOKENS, page_size)

    @compiled
    def load_keys(part, tile, numbers, table, head):  # type: ignore[no-untyped-def]
        codes = part.view(np.int8)
        for n in range(page_size):
            row = tile[n]
            for d in range(head_dim):
                row[d] = np.float32(codes[n * head_dim + d])
        at = head * 2 * head_dim
        for i in range(2 * head_dim):
            numbers[i] = table[at + i]
        return tile

    @compiled
    def load_values(part, tile, numbers, table, head):  # type: ignore[no-untyped-def]
        codes = part.view(np.int8)
        scale = table[head * 2 * head_dim :]
        zero = scale[head_dim:]
        for b in range(page_size // block):
            for d in range(head_dim):
                row, at = tile[d, b * block : (b + 1) * block], (b * head_dim + d) * block
                for n in range(block):
                    row[n] = np.float32(codes[at + n]) * scale[d] + zero[d]
        return tile

    if side.values:
        return SideLoad(load_values, transposed=True)
    return SideLoad(load_keys, grid=BY_CHANNEL, numbers_size=2 * head_dim)
