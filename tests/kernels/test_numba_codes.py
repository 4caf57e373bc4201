"""What the compiled loops for CPUs are made of, without compiling all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvmesh.kernels.formats.packing import pack, unpack

pytest.importorskip("numba")


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("page_size", [16, 64, 192])
@pytest.mark.parametrize("values", [False, True])
def test_codes_are_unpacked_as_by_the_reference(width: int, page_size: int, values: bool) -> None:
    """Pages of several blocks have their planes block by block."""
    from kvmesh.kernels.formats.planes_numba import unpacker

    head_dim = 16
    chance = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 2**width, (page_size, head_dim), generator=chance, dtype=torch.uint8)
    packed = pack(codes, width, values=values)
    assert torch.equal(unpack(packed, width, page_size, head_dim, values=values), codes)
    tile = np.zeros((head_dim, page_size) if values else (page_size, head_dim), np.float32)
    unpacker(width, page_size, head_dim, values).py_func(packed.numpy(), tile)
    assert np.array_equal(tile.T if values else tile, codes.numpy())
