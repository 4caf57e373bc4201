"""Unpacks codes (packing.py) to numbers, on CPUs."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kvmesh.kernels.formats.packing import BLOCK_TOKENS, HIGH_BITS, PLANES
from kvmesh.kernels.formats.tiles_numba import compiled


@cache
def unpacker(width: int, page_size: int, head_dim: int, values: bool) -> Any:
    """(part, tile): codes as fp32 numbers, keys [page_size, head_dim], values
    [head_dim, page_size]."""
    block = min(BLOCK_TOKENS, page_size)
    planes = PLANES[width]
    rows, columns = (head_dim, block) if values else (block, head_dim)
    bits = 2 if width == 3 else width
    mask = np.uint8(2**bits - 1)
    rows //= planes
    blocks = page_size // block
    low_bytes = page_size * head_dim * bits // 8
    half = columns // 2
    # Undo the flipped bit; for 3-bit codes it is one of the high bits.
    flips = np.zeros(planes, np.uint8)
    flips[-1] = {8: 128, 4: 8, 2: 2}.get(width, 0)
    high_flips = np.zeros(planes, np.uint8)
    high_flips[-1] = 1
    first_bits, second_bits = (np.array(at, np.uint8) for at in HIGH_BITS)

    @compiled
    def unpack(part, tile):  # type: ignore[no-untyped-def]
        for b in range(blocks):
            for r in range(rows):
                at = (b * rows + r) * columns
                high_at = low_bytes + (b * rows + r) * half
                for p in range(planes):
                    if values:
                        row = tile[p * rows + r, b * block : b * block + columns]
                    else:
                        row = tile[b * block + r * planes + p]
                    shift = np.uint8(p * bits)
                    flip = flips[p]
                    if width != 3:
                        for x in range(columns):
                            row[x] = np.float32(((part[at + x] >> shift) & mask) ^ flip)
                    else:
                        first, second = first_bits[p], second_bits[p]
                        flip = high_flips[p]
                        # Two loops, because the compiler does not vectorise one combined loop.
                        for x in range(half):
                            high = ((part[high_at + x] >> first) & np.uint8(1)) ^ flip
                            low = (part[at + x] >> shift) & mask
                            row[x] = np.float32(low | (high << np.uint8(2)))
                        for x in range(half):
                            high = ((part[high_at + x] >> second) & np.uint8(1)) ^ flip
                            low = (part[at + half + x] >> shift) & mask
                            row[half + x] = np.float32(low | (high << np.uint8(2)))

    return unpack
