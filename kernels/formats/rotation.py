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

from dataclasses import dataclass
from functools import cache

import torch

from kvmesh.kernels.cpu import has_loops

_SEED = 20160811


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """x -> x @ matrix.T for vectors x [..., head_dim], into the rotated basis or back.

    matrix: [head_dim, head_dim], orthonormal, contiguous, of the dtype and on the device of x
    factors: [2, head_dim] fp32 on the host; the same is factors[1] * H(factors[0] * x), with H a
        Hadamard matrix of ones in blocks
    """

    matrix: torch.Tensor
    factors: torch.Tensor

    @staticmethod
    def of(
        head_dim: int, dtype: torch.dtype, device: torch.device, *, back: bool = False
    ) -> Rotation:
        """back: out of the rotated basis. Raises ValueError for an odd head_dim."""
        matrix = rotation_matrix(head_dim)
        signs, sizes = _signs_and_sizes(head_dim)
        before, after = sizes.rsqrt(), torch.ones(head_dim)
        before, after = (before, signs) if back else (signs * before, after)
        matrix = (matrix.T if back else matrix).contiguous()
        return Rotation(matrix.to(device, dtype), torch.stack((before, after)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., head_dim]. With loops for x, a vector has the same bits in any batch."""
        if has_loops(x):
            from kvmesh.kernels.formats.rotation_numba import rotated

            return rotated(x, self.factors)
        return x @ self.matrix.T


@cache
def rotation_matrix(head_dim: int) -> torch.Tensor:
    """R [head_dim, head_dim] fp32, orthonormal; x in the rotated basis is x @ R.T.

    Raises ValueError for an odd head_dim, which would leave one channel unrotated.
    """
    signs, _ = _signs_and_sizes(head_dim)
    blocks = [_hadamard(size) for size in _block_sizes(head_dim)]
    return torch.block_diag(*blocks) * signs  # type: ignore[no-any-return]


def _block_sizes(head_dim: int) -> list[int]:
    """Powers of two, the largest first."""
    return [1 << bit for bit in reversed(range(head_dim.bit_length())) if head_dim >> bit & 1]


@cache
def _signs_and_sizes(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel's sign, 1 or -1, and the size of its block: [head_dim] fp32."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: a rotation needs an even number, got {head_dim}")
    generator = torch.Generator().manual_seed(_SEED)
    sizes = _block_sizes(head_dim)
    signs = [torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0 for size in sizes]
    return torch.cat(signs), torch.cat([torch.full((size,), float(size)) for size in sizes])


def _hadamard(size: int) -> torch.Tensor:
    """Sylvester's construction, orthonormal."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5  # type: ignore[no-any-return]
