"""The public operators `linear`, `fixed_linear` and `grouped_linear`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from kvmesh.kernels import gpu
from kvmesh.kernels.linear import numba_linear, reference
from kvmesh.kernels.linear.grouped import GroupedWeight
from kvmesh.kernels.linear.packed import PackedWeight


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """x W^T + b, where W's weights become fp32 in registers and sums are in fp32.

    x: [..., in_features] fp32, on the CPU
    weight: [out_features, in_features]
    bias: [out_features] fp32, or None
    backend: None picks the compiled loops, or plain torch where gradients are needed
    Returns [..., out_features] fp32. With the compiled loops a row's result has the same
    bits in any batch: each sum runs over the inputs in one order.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x: expected [..., {weight.in_features}] for a weight of {list(weight.shape)},"
            f" got {list(x.shape)}"
        )
    rows = x.reshape(-1, weight.in_features)
    out = _implementation(x, backend)(rows, weight)
    if bias is not None:
        out = out + bias
    return out.view(*x.shape[:-1], weight.shape[0])


def fixed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """x W^T + b, of weights on a GPU, with sums in fp32.

    x: [..., in_features]; weight: [out_features, in_features], contiguous; bias: [out_features] or
    None; all of one dtype
    backend: None picks the kernel on GPUs and plain torch elsewhere
    Returns [..., out_features] like x. With the kernel a row's result has the same bits in any
    batch, which a library's products do not have.
    """
    if x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"x: expected [..., {weight.shape[1]}] {weight.dtype}, got {list(x.shape)} {x.dtype}"
        )
    if not weight.is_contiguous():
        raise ValueError("weight: expected a contiguous tensor")
    if not gpu.picks_kernel(x, backend):
        return F.linear(x, weight, bias)
    return _by_kernel(x, weight, bias, deterministic=True)


def grouped_linear(
    x: Tensor,
    weight: GroupedWeight,
    bias: Tensor | None = None,
    *,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor:
    """x W^T + b, where W's weights are decoded in registers, and sums are in fp32.

    x: [..., in_features] bf16, fp16 or fp32
    weight: [out_features, in_features]; its values are rounded to the dtype of x
    bias: [out_features] or None, in the dtype of x
    deterministic: a row's result has the same bits in any batch, if the kernel computes it
    backend: None picks the kernel on GPUs and plain torch elsewhere, or where gradients are needed
    Returns [..., out_features] like x. On GPUs nothing synchronises with the host.
    """
    if weight.dim() != 2 or x.shape[-1] != weight.in_features or not x.is_floating_point():
        raise ValueError(
            f"x: expected [..., {weight.in_features}] of a float dtype for a weight of"
            f" {list(weight.shape)}, got {list(x.shape)} {x.dtype}"
        )
    if not gpu.picks_kernel(x, "reference" if x.requires_grad else backend):
        return F.linear(x, weight.decoded().to(x.dtype), bias)
    return _by_kernel(x, weight, bias, deterministic=deterministic)


def _by_kernel(
    x: Tensor, weight: GroupedWeight | Tensor, bias: Tensor | None, *, deterministic: bool
) -> Tensor:
    from kvmesh.kernels.linear import triton_linear

    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = triton_linear.linear(rows, weight, bias, deterministic=deterministic)
    return out.view(*x.shape[:-1], weight.shape[0])


def _implementation(x: Tensor, backend: str | None) -> Callable[[Tensor, PackedWeight], Tensor]:
    if backend is None:
        backend = "reference" if x.requires_grad else "numba"
    if backend == "reference":
        return reference.linear
    if backend == "numba":
        return numba_linear.linear
    raise ValueError(f"backend: expected None, 'numba' or 'reference', got {backend!r}")
