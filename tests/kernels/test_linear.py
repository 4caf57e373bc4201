"""`linear` with packed weights: what is stored, and the compiled loops against plain torch."""

from __future__ import annotations

import pytest
import torch

from kvmesh.kernels.linear import PackedWeight, WeightFormat, linear, pack, unpack

# [out_features, in_features]: less than a block, whole blocks, and neither even nor whole.
SHAPES = [(1, 1), (2, 31), (5, 64), (33, 100), (64, 576)]


def weights(out_features: int, in_features: int) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1))


def bfloat16_weights(out_features: int, in_features: int) -> torch.Tensor:
    return weights(out_features, in_features).bfloat16().float()


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_weights_are_kept_in_16_bits_if_they_fit(shape: tuple[int, int]) -> None:
    for weight, dtype in (
        (bfloat16_weights(*shape), torch.bfloat16),
        (weights(*shape), torch.float32),
    ):
        packed = pack(weight, "exact")
        assert packed.codes.dtype == dtype
        assert tuple(packed.shape) == shape
        assert unpack(packed).equal(weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_within_half_a_step_of_every_weight(shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    packed = pack(weight, "int8")
    assert packed.scales is not None
    steps = packed.scales.repeat_interleave(32, dim=1)[:, : shape[1]]
    assert ((unpack(packed) - weight).abs() <= 0.5001 * steps).all()
    assert packed.num_bytes == packed.codes.numel() + 4 * packed.scales.numel()


def test_int8_keeps_the_values_of_weights_that_were_in_8_bits_before() -> None:
    codes = torch.randint(-127, 128, (6, 96), generator=torch.Generator().manual_seed(3))
    codes[:, ::32] = 127  # as the largest of its block has
    scales = torch.rand(6, 3, generator=torch.Generator().manual_seed(4)).half().float() + 0.1
    weight = codes.float() * scales.repeat_interleave(32, dim=1)
    packed = pack(weight, "int8")
    assert packed.codes.equal(codes.to(torch.int8))
    torch.testing.assert_close(unpack(packed), weight, rtol=2e-7, atol=0)


def test_a_block_of_zeros_and_the_smallest_numbers_stay_finite() -> None:
    weight = torch.zeros(3, 64)
    weight[1, :32] = 1e-45
    weight[2] = 3e38
    unpacked = unpack(pack(weight, "int8"))
    assert unpacked.isfinite().all()
    assert unpacked[0].eq(0).all()
    torch.testing.assert_close(unpacked[2], weight[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_int8_and_kept_by_exact(value: float) -> None:
    weight = weights(4, 40)
    weight[3, 39] = value
    with pytest.raises(ValueError, match="weight: int8 needs finite weights"):
        pack(weight, "int8")
    assert torch.equal(unpack(pack(weight, "exact")).isfinite(), weight.isfinite())


@pytest.mark.parametrize("kind", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_unpacked_weights(kind: str, shape: tuple[int, int]) -> None:
    packed = packed_as(kind, shape)
    bias = inputs(shape[0])
    for rows in (0, 1, 2, 3, 7, 8, 13, 70):
        x = inputs(rows, shape[1])
        exact = x.double() @ unpack(packed).double().T + bias.double()
        plain = linear(x, packed, bias, backend="reference")
        found = linear(x, packed, bias)
        error, allowed = ((y.double() - exact).abs().amax(1) for y in (found, plain))
        assert found.shape == (rows, shape[0])
        assert (error <= 2 * allowed + 1e-6 * exact.abs().amax(1)).all()


@pytest.mark.parametrize("kind", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_the_same_bits_in_any_batch(
    kind: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.kernels.linear.numba_linear.MIN_PRODUCTS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    packed = packed_as(kind, (33, 100))
    x = inputs(75, 100)
    whole = linear(x, packed)
    for first, end in ((0, 1), (1, 3), (3, 8), (8, 75)):
        assert linear(x[first:end], packed).equal(whole[first:end])
    part = PackedWeight(
        packed.codes[5:6], None if packed.scales is None else packed.scales[5:6], 100
    )
    assert linear(x, part).equal(whole[:, 5:6])


def test_inputs_of_any_shape_and_stride() -> None:
    packed = packed_as("int8", (6, 64))
    x = inputs(64, 2, 3).permute(1, 2, 0)
    assert linear(x, packed).equal(linear(x.contiguous().view(6, 64), packed).view(2, 3, 6))


def test_joined_weights_compute_all_their_outputs() -> None:
    parts = [packed_as("float32", (3, 40)), packed_as("bfloat16", (2, 40))]
    x = inputs(4, 40)
    joined = PackedWeight.joined(parts)
    assert joined.shape == (5, 40)
    assert linear(x, joined).equal(torch.cat([linear(x, part) for part in parts], dim=1))
    small = PackedWeight.joined([packed_as("int8", (3, 40)), packed_as("int8", (2, 40))])
    assert linear(x, small)[:, 3:].equal(linear(x, packed_as("int8", (2, 40))))


def test_gradients_reach_the_inputs() -> None:
    packed = packed_as("bfloat16", (6, 64))
    x = inputs(2, 64).requires_grad_()
    linear(x, packed).sum().backward()
    torch.testing.assert_close(x.grad, unpack(packed).sum(0).expand(2, 64))


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 40\]"):
        linear(inputs(1, 64), packed_as("int8", (6, 40)))
    with pytest.raises(ValueError, match="backend: expected"):
        linear(inputs(1, 40), packed_as("int8", (6, 40)), backend="triton")


def packed_as(kind: str, shape: tuple[int, int]) -> PackedWeight:
    weight_format: WeightFormat = "int8" if kind == "int8" else "exact"
    weight = bfloat16_weights(*shape) if kind == "bfloat16" else weights(*shape)
    packed = pack(weight, weight_format)
    assert str(packed.codes.dtype) == f"torch.{kind}"
    return packed
