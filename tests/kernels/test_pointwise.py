"""The kernels between a layer's products, against plain torch."""

from __future__ import annotations

import pytest
import torch

from kvmesh.kernels.pointwise import add_rms_norm, rms_norm, rope_write, silu_mul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

BACKENDS = [pytest.param("triton", marks=pytest.mark.slow), "numba"]


def there(x: torch.Tensor, backend: str) -> torch.Tensor:
    """A copy where the backend runs."""
    return x.clone().to(DEVICE) if backend == "triton" else x.clone()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu(), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [64, 576])
def test_norms_and_residuals(size: int, backend: str) -> None:
    x, residual, weight = torch.randn(3, size), torch.randn(3, size), torch.randn(size)
    x_there, sum_there, weight_there = (there(t, backend) for t in (x, residual, weight))
    close(
        rms_norm(x_there, weight_there, 1e-5, backend=backend),
        rms_norm(x, weight, 1e-5, backend="reference"),
    )
    got = add_rms_norm(x_there, sum_there, weight_there, 1e-5, backend=backend)
    close(got, add_rms_norm(x, residual, weight, 1e-5, backend="reference"))
    close(sum_there, residual)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [96, 2500])
def test_gate_and_up(size: int, backend: str) -> None:
    both = torch.randn(2, 2 * size) * 10
    close(silu_mul(there(both, backend), backend=backend), silu_mul(both, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_queries_and_keys_are_rotated_and_written(head_dim: int, backend: str) -> None:
    qkv = torch.randn(4, 9, head_dim)  # 5 query heads and 2 KV heads, as views of a projection
    angles = torch.rand(4, head_dim // 2).repeat(1, 2) * 6
    hot, slots = torch.full((5, 2, 2, 16, head_dim), 9.0), torch.tensor([0, 79, -1, 33])
    hot_there = there(hot, backend)

    def written(backend: str, qkv: torch.Tensor, hot: torch.Tensor) -> torch.Tensor:
        cos, sin, at = (there(t, backend) for t in (angles.cos(), angles.sin(), slots))
        q, k, v = qkv[:, :5], qkv[:, 5:7], qkv[:, 7:]
        return rope_write(q, k, v, cos, sin, hot, at, backend=backend)

    want = written("reference", qkv, hot)
    got = written(backend, there(qkv, backend), hot_there)
    close(got, want)
    close(hot_there, hot)


def test_loops_take_any_strides_and_propagate_nan() -> None:
    x = torch.randn(3, 2, 40).transpose(0, 1)
    x[1, 2, 7] = torch.nan
    weight = torch.randn(40)
    got = rms_norm(x, weight, 1e-5)
    want = rms_norm(x, weight, 1e-5, backend="reference")
    torch.testing.assert_close(got, want, equal_nan=True)
    assert torch.equal(silu_mul(x).isnan(), silu_mul(x, backend="reference").isnan())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_token_has_the_same_bits_in_any_batch(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.kernels.pointwise.numba_pointwise.MIN_NUMBERS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weight = torch.randn(7, 100), torch.randn(100)
    normed, gated = rms_norm(x, weight, 1e-5), silu_mul(x)
    for token in range(7):
        assert rms_norm(x[token], weight, 1e-5).equal(normed[token])
        assert silu_mul(x[token : token + 1]).equal(gated[token : token + 1])


def test_wrong_shapes_are_named() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="residual: expected"):
        add_rms_norm(x, x[:1], x[0], 1e-5)
    with pytest.raises(ValueError, match="both: expected gate and up"):
        silu_mul(torch.zeros(1, 3))
    q = torch.zeros(2, 1, 64)
    with pytest.raises(ValueError, match="cos, sin: expected"):
        rope_write(q, q, q, x, x, torch.zeros(1, 2, 1, 16, 64), torch.zeros(2, dtype=torch.int64))
    slots = torch.tensor([0, 16])
    with pytest.raises(ValueError, match="slots: expected less than 16"):
        rope_write(q, q, q, q[:, 0], q[:, 0], torch.zeros(1, 2, 1, 16, 64), slots)
