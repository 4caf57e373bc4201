"""A layer before and after attention, each in one call: against plain torch, and in any batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvmesh.kernels.formats.rotation import Rotation
from kvmesh.kernels.layer import AttentionInput, FeedForward
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


Q_HEADS, KV_HEADS, DIM, PAGE, PAGES = 3, 2, 16, 8, 10


def attention_input(*, bias: bool) -> AttentionInput:
    generator = torch.Generator().manual_seed(3)
    width = (Q_HEADS + 2 * KV_HEADS) * DIM
    return AttentionInput(
        torch.rand(HIDDEN, generator=generator) + 0.5,
        1e-5,
        pack(torch.randn(width, HIDDEN, generator=generator).div_(8.0), "int8"),
        torch.randn(width, generator=generator) if bias else None,
        Q_HEADS,
        KV_HEADS,
        DIM,
    )


def tokens_of(count: int) -> tuple[torch.Tensor, ...]:
    """x, cos, sin, hot and slots, of which one is padding"""
    generator = torch.Generator().manual_seed(4)
    angles = torch.rand(count, DIM // 2, generator=generator).repeat(1, 2)
    slots = torch.randperm(PAGES * PAGE, generator=generator)[:count].clone()
    slots[count // 2 : count // 2 + 1] = -1
    hot = torch.zeros(PAGES, 2, KV_HEADS, PAGE, DIM)
    x = torch.randn(count, HIDDEN, generator=generator)
    return x, angles.cos(), angles.sin(), hot, slots


ROTATION = Rotation.of(DIM, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(("bias", "rotation"), [(False, None), (True, None), (True, ROTATION)])
@pytest.mark.parametrize("count", [0, 1, 5, 70])
def test_attention_input_is_the_operators_one_after_the_other(
    count: int, bias: bool, rotation: Rotation | None
) -> None:
    made = attention_input(bias=bias)
    x, cos, sin, hot, slots = tokens_of(count)
    want_hot = hot.clone()
    want = made(x, cos, sin, want_hot, slots, rotation, backend="reference")
    found = made(x, cos, sin, hot, slots, rotation)
    torch.testing.assert_close(found, want, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(hot, want_hot, atol=3e-6, rtol=3e-6)
    assert hot.any() or count < 2


@pytest.mark.parametrize("threads", [1, 3])
def test_attention_input_of_a_token_has_the_same_bits_in_any_batch(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.kernels.layer.numba_attention_input.MIN_PRODUCTS_PER_THREAD", 1)
    monkeypatch.setattr("kvmesh.kernels.layer.numba_attention_input.MIN_PRODUCTS_BY_ROWS", 1)
    monkeypatch.setattr("kvmesh.kernels.linear.numba_linear.MIN_PRODUCTS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    made = attention_input(bias=True)
    x, cos, sin, hot, slots = tokens_of(70)
    whole = made(x, cos, sin, hot, slots, ROTATION)
    again = torch.zeros_like(hot)
    for first, end in ((0, 1), (1, 9), (9, 70)):
        part = slice(first, end)
        found = made(x[part], cos[part], sin[part], again, slots[part], ROTATION)
        assert found.equal(whole[part])
    assert again.equal(hot)


def test_inputs_of_attention_that_do_not_fit_are_named() -> None:
    made, (x, cos, sin, hot, slots) = attention_input(bias=False), tokens_of(4)
    with pytest.raises(ValueError, match=r"qkv: expected \[112, 32\]"):
        replace(made, norm=torch.ones(32))
    with pytest.raises(ValueError, match=r"bias: expected \[112\]"):
        replace(made, bias=torch.ones(3))
    with pytest.raises(ValueError, match=r"cos: expected a contiguous tensor \[4, 16\]"):
        made(x, cos[:, :8], sin, hot, slots)
    with pytest.raises(ValueError, match="slots: expected a contiguous tensor"):
        made(x, cos, sin, hot, slots[:3])
    with pytest.raises(ValueError, match="slots: expected less than 80, the slots of hot, got 80"):
        made(x, cos, sin, hot, slots.clamp(min=80))
