"""The kernels between a layer's products, against plain torch."""

from __future__ import annotations

import pytest
import torch

from kvmesh.kernels.pointwise import add_rms_norm, rms_norm, rope_write, silu_mul

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu(), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("size", [64, 576])
def test_norms_and_residuals(size: int) -> None:
    x, residual, weight = torch.randn(3, size), torch.randn(3, size), torch.randn(size)
    x_there, sum_there = x.to(DEVICE), residual.clone().to(DEVICE)
    weight_there = weight.to(DEVICE)
    close(rms_norm(x_there, weight_there, 1e-5, backend="triton"), rms_norm(x, weight, 1e-5))
    got = add_rms_norm(x_there, sum_there, weight_there, 1e-5, backend="triton")
    close(got, add_rms_norm(x, residual, weight, 1e-5))
    close(sum_there, residual)


@pytest.mark.parametrize("size", [96, 2500])
def test_gate_and_up(size: int) -> None:
    both = torch.randn(2, 2 * size) * 3
    close(silu_mul(both.to(DEVICE), backend="triton"), silu_mul(both))


@pytest.mark.parametrize("head_dim", [64, 80])
def test_queries_and_keys_are_rotated_and_written(head_dim: int) -> None:
    qkv = torch.randn(4, 9, head_dim)  # 5 query heads and 2 KV heads, as views of a projection
    angles = torch.rand(4, head_dim // 2).repeat(1, 2) * 6
    hot, slots = torch.full((5, 2, 2, 16, head_dim), 9.0), torch.tensor([0, 79, -1, 33])
    there, hot_there = qkv.to(DEVICE), hot.clone().to(DEVICE)
    cos, sin = angles.cos(), angles.sin()
    want = rope_write(qkv[:, :5], qkv[:, 5:7], qkv[:, 7:], cos, sin, hot, slots)
    got = rope_write(
        there[:, :5],
        there[:, 5:7],
        there[:, 7:],
        cos.to(DEVICE),
        sin.to(DEVICE),
        hot_there,
        slots.to(DEVICE),
        backend="triton",
    )
    close(got, want)
    close(hot_there, hot)


def test_wrong_shapes_are_named() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="residual: expected"):
        add_rms_norm(x, x[:1], x[0], 1e-5)
    with pytest.raises(ValueError, match="both: expected gate and up"):
        silu_mul(torch.zeros(1, 3))
    q = torch.zeros(2, 1, 64)
    with pytest.raises(ValueError, match="cos, sin: expected"):
        rope_write(q, q, q, x, x, torch.zeros(1, 2, 1, 16, 64), torch.zeros(2, dtype=torch.int64))
