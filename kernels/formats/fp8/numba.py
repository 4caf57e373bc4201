"""Numba function of `Fp8`."""

from __future__ import annotations

import numpy as np

from kvmesh.kernels.formats.fp8.side import PADDING_BYTES, SCALE_BYTES, Fp8
from kvmesh.kernels.formats.packing import BLOCK_TOKENS
from kvmesh.kernels.formats.tiles_numba import SideLoad, compiled, float_of, read_bf16


def side_load(side: Fp8, page_size: int, head_dim: int, dtype: str) -> SideLoad:
    centred = side.centred
    centre_at = page_size * head_dim
    scale_at = side.num_bytes(page_size, head_dim) - SCALE_BYTES - PADDING_BYTES
    # Tables as for codes, see packing.py: one for keys, one per block of tokens for values.
    block = min(BLOCK_TOKENS, page_size)
    rows, columns = (head_dim, block) if side.values else (page_size, head_dim)
    blocks = page_size * head_dim // (rows * columns)
    # An e4m3 number's bits at fp32's exponent give a number that is too small by 2^120.
    bias = np.float32(2.0**120)
    low, sign = np.int32(0x7F), np.int32(0x80)

    @compiled
    def load(part, tile, numbers):  # type: ignore[no-untyped-def]
        centre = numbers
        if centred:
            read_bf16(part, centre_at, head_dim, centre)
        factor = part[scale_at : scale_at + 4].view(np.float32)[0]
        # Two passes: in one, the compiler could multiply the two factors first and overflow.
        for b in range(blocks):
            for r in range(rows):
                row = tile[r, b * columns : (b + 1) * columns]
                at = (b * rows + r) * columns
                for x in range(columns):
                    byte = np.int32(part[at + x])
                    bits = ((byte & low) << np.int32(20)) | ((byte & sign) << np.int32(24))
                    row[x] = float_of(bits) * bias
        for r in range(tile.shape[0]):
            for x in range(tile.shape[1]):
                if centred:
                    tile[r, x] = tile[r, x] * factor + centre[x]
                else:
                    tile[r, x] *= factor
        return tile

    return SideLoad(load, side.values, numbers_size=head_dim if centred else 0)
