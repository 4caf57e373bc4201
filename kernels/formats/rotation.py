"""The basis of rotated sides: a random-sign Hadamard rotation, the same for every head.

A rotation spreads outliers in a few channels over all of them, so that one scale per
token suffices and a codebook for Gaussian numbers fits (QuaRot, arXiv 2404.00456;
TurboQuant, arXiv 2504.19874). It is orthonormal: rotated queries and keys have the
same scores as the original ones, and an output of rotated values is rotated back once.
Signs are random but fixed: without them a constant vector, or any other row of the
Hadamard matrix, would become concentrated in one channel.

A head_dim that is not a power of two splits into blocks that are: 80 = 64 + 16.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

_HAS_NUMBA = importlib.util.find_spec("numba") is not None
_SEED = 20160811


@cache
def rotation_matrix(head_dim: int) -> torch.Tensor:
    """R [head_dim, head_dim] fp32, orthonormal; x in the rotated basis is x @ R.T.

    Raises ValueError for an odd head_dim, which would leave one channel unrotated.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: a rotation needs an even number, got {head_dim}")
    generator = torch.Generator().manual_seed(_SEED)
    blocks = []
    left = head_dim
    while left:
        size = 1 << (left.bit_length() - 1)
        signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0
        blocks.append(_hadamard(size) * signs)
        left -= size
    return torch.block_diag(*blocks)  # type: ignore[no-any-return]


def rotate(x: torch.Tensor, matrix: torch.Tensor, *, deterministic: bool = False) -> torch.Tensor:
    """x [..., head_dim] @ matrix.T; the matrix is contiguous and of the same dtype.

    deterministic: a vector's result has the same bits in any batch; for fp32 on CPUs, with Numba
    """
    rows = x.reshape(-1, x.shape[-1])
    if _HAS_NUMBA and not rows.is_cuda:
        from kvmesh.kernels.formats import rotation_numba

        if deterministic or rotation_numba.suits(rows):
            return rotation_numba.rotate(rows.contiguous(), matrix).view(x.shape)
    return x @ matrix.T


def _hadamard(size: int) -> torch.Tensor:
    """Sylvester's construction, orthonormal."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5  # type: ignore[no-any-return]
