"""The operators in plain torch; the same signatures as the compiled ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvmesh.kernels import linear, pointwise
from kvmesh.kernels.formats.rotation import Rotation
from kvmesh.kernels.linear import PackedWeight

if TYPE_CHECKING:
    from kvmesh.kernels.layer.attention_input import AttentionInput
    from kvmesh.kernels.layer.op import FeedForward


def attention_input(
    layer: AttentionInput,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    hot: Tensor,
    slots: Tensor,
    rotation: Rotation | None = None,
    *,
    backend: str = "reference",
) -> Tensor:
    """backend: of the operators"""
    x = pointwise.rms_norm(x, layer.norm, layer.eps, backend=backend)
    qkv = linear.linear(x, layer.qkv, layer.bias, backend=backend)
    counts = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    q, k, v = qkv.view(len(qkv), sum(counts), layer.head_dim).split(counts, dim=1)
    if rotation is not None:
        v = v @ rotation.matrix.T if backend == "reference" else rotation(v)
    return pointwise.rope_write(q, k, v, cos, sin, hot, slots, backend=backend)


def feed_forward(layer: FeedForward, heads: Tensor, residual: Tensor) -> None:
    def product(x: Tensor, weight: PackedWeight) -> Tensor:
        return linear.linear(x, weight, backend="reference")

    x = product(heads, layer.o_proj)
    x = pointwise.add_rms_norm(x, residual, layer.norm, layer.eps, backend="reference")
    x = pointwise.silu_mul(product(x, layer.gate_up), backend="reference")
    residual += product(x, layer.down)
