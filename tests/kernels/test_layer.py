"""A layer after attention in one call: against plain torch, and in any batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvmesh.kernels.layer import FeedForward
from kvmesh.kernels.linear import pack

HEADS, HIDDEN, WIDTH = 96, 64, 160


def layer() -> FeedForward:
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).div_(math.sqrt(shape[1]))

    return FeedForward(
        pack(weight(HIDDEN, HEADS), "int8"),
        torch.rand(HIDDEN, generator=generator) + 0.5,
        1e-5,
        pack(weight(2 * WIDTH, HIDDEN), "int4"),
        pack(weight(HIDDEN, WIDTH), "int4"),
    )


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(tokens, HEADS, generator=generator),
        torch.randn(tokens, HIDDEN, generator=generator),
    )


@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
def test_it_is_the_operators_one_after_the_other(tokens: int) -> None:
    heads, residual = inputs(tokens)
    want = residual.clone()
    layer()(heads, want, backend="reference")
    layer()(heads, residual)
    torch.testing.assert_close(residual, want, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_token_has_the_same_bits_in_any_batch(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where few tokens are spread over threads by the rows of the weights."""
    monkeypatch.setattr("kvmesh.kernels.layer.numba_layer.MIN_PRODUCTS_PER_THREAD", 1)
    monkeypatch.setattr("kvmesh.kernels.layer.numba_layer.MIN_PRODUCTS_BY_ROWS", 1)
    monkeypatch.setattr("kvmesh.kernels.linear.numba_linear.MIN_PRODUCTS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    heads, whole = inputs(70)
    layer()(heads, whole)
    for first, end in ((0, 1), (1, 9), (30, 70)):
        _, residual = inputs(70)
        part = residual[first:end]
        layer()(heads[first:end], part)
        assert part.equal(whole[first:end])


def test_sizes_that_do_not_fit_are_named() -> None:
    made, (heads, residual) = layer(), inputs(3)
    with pytest.raises(ValueError, match="norm: expected 64"):
        replace(made, norm=torch.ones(HIDDEN + 1))
    with pytest.raises(ValueError, match="gate_up: expected"):
        replace(made, gate_up=made.down)
    with pytest.raises(ValueError, match="multiples of 32"):
        replace(made, o_proj=pack(torch.randn(HIDDEN, 40), "int8"))
    with pytest.raises(ValueError, match=r"heads: expected \[3, 96\]"):
        made(heads[:2], residual)
    with pytest.raises(ValueError, match="contiguous"):
        made(heads, residual.T.contiguous().T)
