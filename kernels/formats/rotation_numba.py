"""Rotating a few vectors on a CPU, without starting the threads of a matrix library."""

from __future__ import annotations

import torch

from kvmesh.kernels.formats.tiles_numba import compiled

MAX_PRODUCTS = 1 << 18  # above this, a library's threads pay off


def suits(x: torch.Tensor) -> bool:
    """x: [n, head_dim]"""
    few = x.shape[0] * x.shape[1] ** 2 <= MAX_PRODUCTS
    return few and x.device.type == "cpu" and x.dtype == torch.float32


@compiled
def _rotate(x, matrix, out):  # type: ignore[no-untyped-def]
    for n in range(x.shape[0]):
        for i in range(matrix.shape[0]):
            total = x[n, 0] * matrix[i, 0]
            for d in range(1, matrix.shape[1]):
                total += x[n, d] * matrix[i, d]
            out[n, i] = total


def rotate(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x [n, head_dim] @ matrix.T, both fp32 and contiguous"""
    out = torch.empty_like(x)
    _rotate(x.numpy(), matrix.numpy(), out.numpy())
    return out
