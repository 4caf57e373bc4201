"""The public operators: each one launch on a GPU, and one compiled loop on a CPU."""

from __future__ import annotations

from types import ModuleType

import torch

from kvmesh.kernels import gpu
from kvmesh.kernels.cpu import has_loops
from kvmesh.kernels.pointwise import reference


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str | None = None
) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, computed in fp32 and rounded once.

    x: [..., size]; weight: [size]
    backend: None picks the kernels on GPUs, the compiled loops on CPUs, and plain torch where
        there are none (`has_loops`); so for all operators here
    """
    return _implementation(x, backend).rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """`rms_norm` of residual + x, which is left in `residual`. x, residual: [..., size]"""
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"residual: expected {tuple(x.shape)} {x.dtype} like x, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    return _implementation(x, backend).add_rms_norm(  # type: ignore[no-any-return]
        x, residual, weight, eps
    )


def silu_mul(both: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """silu(gate) * up. both: [rows, 2 * size], gate then up -> [rows, size]"""
    if both.shape[-1] % 2:
        raise ValueError(f"both: expected gate and up of one size, got {tuple(both.shape)}")
    return _implementation(both, backend).silu_mul(both)  # type: ignore[no-any-return]


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    hot: torch.Tensor,
    slots: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Rotate queries and keys by RoPE on halves of a head, and write keys and values (`write_hot`).

    q: [num_tokens, num_heads, head_dim], k and v with num_kv_heads: views of one projection
    cos, sin: [num_tokens, head_dim], with two equal halves
    hot, slots: as in `write_hot`
    Returns the rotated queries, contiguous.
    """
    if cos.shape != (q.shape[0], q.shape[2]) or sin.shape != cos.shape:
        raise ValueError(
            f"cos, sin: expected [{q.shape[0]}, {q.shape[2]}], "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    return _implementation(q, backend).rope_write(  # type: ignore[no-any-return]
        q, k, v, cos, sin, hot, slots
    )


def _implementation(x: torch.Tensor, backend: str | None) -> ModuleType:
    if backend is None:
        backend = "numba" if has_loops(x) else "reference"
        if gpu.runs_kernels(x):
            backend = "triton"
    if backend == "reference":
        return reference
    # Imported here: a machine with a GPU may lack Numba, and one without may lack Triton.
    if backend == "numba":
        from kvmesh.kernels.pointwise import numba_pointwise

        return numba_pointwise
    if backend == "triton":
        from kvmesh.kernels.pointwise import triton_pointwise

        return triton_pointwise
    raise ValueError(f"backend: expected None, 'triton', 'numba' or 'reference', got {backend!r}")
