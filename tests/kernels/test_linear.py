"""`linear` with packed weights: what is stored, and the compiled loops against plain torch."""

from __future__ import annotations

import pytest
import torch

from kvmesh.kernels.linear import (
    PackedWeight,
    WeightFormat,
    fixed_linear,
    linear,
    pack,
    unpack,
)

# [out_features, in_features]: less than a block, whole blocks, and neither even nor whole.
SHAPES = [(1, 7), (2, 31), (5, 64), (33, 100), (64, 576)]
KINDS = ["uint8", "int8", "bfloat16", "float32"]


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
    steps = packed.scales[..., 0].repeat_interleave(32, dim=1)[:, : shape[1]]
    assert ((unpack(packed) - weight).abs() <= 0.5001 * steps).all()
    assert packed.num_bytes == packed.codes.numel() + 4 * packed.scales.numel()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_is_within_half_a_step_of_every_weight(shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    packed = pack(weight, "int4")
    assert packed.scales is not None
    steps = packed.scales[..., 0].repeat_interleave(32, dim=1)[:, : shape[1]]
    assert ((unpack(packed) - weight).abs() <= 0.5001 * steps).all()
    assert packed.codes.numel() == shape[0] * packed.num_blocks * 16


def test_the_range_of_a_block_that_is_not_full_is_that_of_its_weights() -> None:
    weight = 5 + weights(70, 40) / 100
    packed = pack(weight, "int4")
    last = weight[:, 32:]
    assert packed.scales is not None
    step = (last.amax(1) - last.amin(1)) / 15
    torch.testing.assert_close(packed.scales[:, 1, 0], step, rtol=1e-3, atol=0)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("zero", [0.0, 7.0, None])
def test_exact_keeps_weights_that_had_4_bits_in_4_bits(group: int, zero: float | None) -> None:
    """zero: the code of 0, as in AWQ and GPTQ; None for an offset in fp16, as in GGUF's Q4_1"""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (70, 256 // group, group), generator=generator).float()
    scales = (torch.rand(70, 256 // group, 1, generator=generator) / 50).half().float()
    offset = (torch.randn(scales.shape, generator=generator) / 10).half().float()
    weight = (codes - zero) * scales if zero is not None else codes * scales + offset
    weight = weight.flatten(1)
    packed = pack(weight, "exact")
    assert packed.codes.dtype == torch.uint8
    assert unpack(packed).equal(weight)
    weight[69, 255] *= 1.01  # one weight that is none of them
    packed = pack(weight, "exact")
    assert packed.codes.dtype == torch.float32
    assert unpack(packed).equal(weight)


@pytest.mark.parametrize("row", [0, 20, 1023, 1024, 2099])
def test_one_weight_in_any_row_keeps_all_from_few_bits(row: int) -> None:
    weight = (torch.arange(2100 * 32) % 16).float().view(2100, 32)
    assert pack(weight, "exact").codes.dtype == torch.uint8
    weight[row, 5] += 1e-3
    packed = pack(weight, "exact")
    assert packed.codes.dtype == torch.float32
    assert unpack(packed).equal(weight)


def test_exact_keeps_weights_that_had_8_bits_in_8_bits() -> None:
    codes, scales = codes_and_scales_of_8_bits()
    weight = codes.float() * scales.repeat_interleave(32, dim=1)
    packed = pack(weight, "exact")
    assert packed.codes.equal(codes)
    assert unpack(packed).equal(weight)


def test_int8_keeps_the_values_of_weights_that_were_in_8_bits_before() -> None:
    codes, scales = codes_and_scales_of_8_bits()
    weight = codes.float() * scales.repeat_interleave(32, dim=1)
    packed = pack(weight, "int8")
    assert packed.codes.equal(codes)
    torch.testing.assert_close(unpack(packed), weight, rtol=2e-7, atol=0)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_a_block_of_zeros_and_the_smallest_numbers_stay_finite(weight_format: WeightFormat) -> None:
    weight = torch.zeros(4, 64)
    weight[1, :32] = 1e-45
    weight[2] = 3e38
    weight[3, ::2], weight[3, 1::2] = 1e38, -1e38
    unpacked = unpack(pack(weight, weight_format))
    assert unpacked.isfinite().all()
    assert unpacked[0].eq(0).all()
    torch.testing.assert_close(unpacked[2:], weight[2:])
    assert unpack(pack(weight, "exact")).equal(weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_kept_by_exact_alone(value: float) -> None:
    weight = weights(4, 40)
    weight[3, 39] = value
    for weight_format in ("int8", "int4"):
        with pytest.raises(ValueError, match=f"weight: {weight_format} needs finite weights"):
            pack(weight, weight_format)
    assert torch.equal(unpack(pack(weight, "exact")).isfinite(), weight.isfinite())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_unpacked_weights(kind: str, shape: tuple[int, int]) -> None:
    packed = packed_as(kind, shape)
    bias = inputs(shape[0])
    for rows in (0, 1, 2, 3, 7, 8, 13, 70):
        x = inputs(rows, shape[1])
        weight = unpack(packed).double()
        exact = x.double() @ weight.T + bias.double()
        magnitude = x.double().abs() @ weight.abs().T
        plain = linear(x, packed, bias, backend="reference")
        found = linear(x, packed, bias)
        error, allowed = ((y.double() - exact).abs().amax(1) for y in (found, plain))
        assert found.shape == (rows, shape[0])
        assert (error <= 2 * allowed + 3e-7 * magnitude.amax(1)).all()


@pytest.mark.parametrize("kind", KINDS)
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
    for rows in (slice(5, 6), slice(2, 9)):  # alone, and in tiles of other rows
        assert linear(x, packed.rows(rows)).equal(whole[:, rows])
        assert linear(x[:1], packed.rows(rows)).equal(whole[:1, rows])


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
    formats: dict[str, WeightFormat] = {"uint8": "int4", "int8": "int8"}
    weight = bfloat16_weights(*shape) if kind == "bfloat16" else weights(*shape)
    packed = pack(weight, formats.get(kind, "exact"))
    assert str(packed.codes.dtype) == f"torch.{kind}"
    return packed


def codes_and_scales_of_8_bits() -> tuple[torch.Tensor, torch.Tensor]:
    """[6, 96] int8, and [6, 3] fp32 that fp16 can represent"""
    codes = torch.randint(-127, 128, (6, 96), generator=torch.Generator().manual_seed(3))
    codes[:, ::32] = 127  # as the largest of its block has
    scales = torch.rand(6, 3, generator=torch.Generator().manual_seed(4)) + 0.1
    return codes.to(torch.int8), scales.half().float()


@pytest.mark.slow
@pytest.mark.parametrize(("num_outputs", "size"), [(1, 7), (70, 130)])
def test_the_fixed_kernel_is_right_and_a_row_does_not_depend_on_others(
    num_outputs: int, size: int
) -> None:
    """At rows that are strided, and more than a tile of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, x = weights(num_outputs, size).to(device), inputs(67, 2 * size)[:, :size].to(device)
    bias = inputs(num_outputs).to(device)
    out = fixed_linear(x, weight, bias, backend="triton")
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert (out - want).abs().max() < 1e-5 * want.abs().max()
    for rows in (slice(0, 1), slice(3, 20), slice(66, 67)):
        assert torch.equal(fixed_linear(x[rows], weight, bias, backend="triton"), out[rows])
    assert torch.equal(fixed_linear(x[None, :5], weight, bias, backend="triton")[0], out[:5])


def test_arguments_of_fixed_linear_are_checked() -> None:
    x, weight = inputs(3, 8), weights(4, 8)
    for wrong_x, wrong_weight, name in (
        (x[:, :7], weight, "x"),
        (x.bfloat16(), weight, "x"),
        (inputs(3, 4), weights(4, 8)[:, :4], "weight"),
    ):
        with pytest.raises(ValueError, match=name):
            fixed_linear(wrong_x, wrong_weight)
