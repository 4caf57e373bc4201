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
    # Values lie by channel in blocks of tokens; keys by token, in blocks of one.
    block = min(BLOCK_TOKENS, page_size) if side.values else 1
    # An e4m3 number's bits where fp32 has its exponent: smaller by the exponents' biases.
    bias = np.float32(2.0**120)
    low, sign = np.int32(0x7F), np.int32(0x80)

    @compiled
    def load(part, tile, numbers):  # type: ignore[no-untyped-def]
        centre = numbers
        if centred:
            read_bf16(part, centre_at, head_dim, centre)
        else:
            centre[:] = 0.0
        factor = part[scale_at : scale_at + 4].view(np.float32)[0]
        # Two passes: in one, the two factors could be multiplied first, and overflow.
        for n in range(page_size):
            for d in range(head_dim):
                byte = np.int32(part[(n // block * head_dim + d) * block + n % block])
                bits = ((byte & low) << np.int32(20)) | ((byte & sign) << np.int32(24))
                tile[n, d] = float_of(bits) * bias
        for n in range(page_size):
            for d in range(head_dim):
                tile[n, d] = tile[n, d] * factor + centre[d]
        return tile

    return SideLoad(load, numbers_size=head_dim)
