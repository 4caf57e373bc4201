"""The operator in plain torch; the same signature as the compiled one."""

from __future__ import annotations

from torch import Tensor

from kvmesh.kernels import linear, pointwise
from kvmesh.kernels.linear import PackedWeight


def feed_forward(
    heads: Tensor,
    residual: Tensor,
    o_proj: PackedWeight,
    norm: Tensor,
    eps: float,
    gate_up: PackedWeight,
    down: PackedWeight,
) -> None:
    def product(x: Tensor, weight: PackedWeight) -> Tensor:
        return linear.linear(x, weight, backend="reference")

    x = pointwise.add_rms_norm(product(heads, o_proj), residual, norm, eps, backend="reference")
    residual += product(pointwise.silu_mul(product(x, gate_up), backend="reference"), down)
