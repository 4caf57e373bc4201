"""The operators in plain torch; the same signatures as the compiled ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvmesh.kernels import linear, pointwise
from kvmesh.kernels.linear import PackedWeight

if TYPE_CHECKING:
    from kvmesh.kernels.layer.attention_input import AttentionInput


def attention_input(
    layer: AttentionInput,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    hot: Tensor,
    slots: Tensor,
    *,
    backend: str = "reference",
) -> Tensor:
    """backend: of the operators"""
    x = pointwise.rms_norm(x, layer.norm, layer.eps, backend=backend)
    qkv = linear.linear(x, layer.qkv, layer.bias, backend=backend)
    counts = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    q, k, v = qkv.view(len(qkv), sum(counts), layer.head_dim).split(counts, dim=1)
    return pointwise.rope_write(q, k, v, cos, sin, hot, slots, backend=backend)


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
