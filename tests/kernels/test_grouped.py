"""`grouped_linear`: what is stored, and the kernel against plain torch with the decoded weights.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvmesh.kernels import workspace
from kvmesh.kernels.linear import (
    GroupedFormat,
    GroupedWeight,
    Kind,
    grouped,
    grouped_linear,
    quantise,
    triton_linear,
)
from kvmesh.kernels.linear.grouped import E2M1

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter does not multiply bf16.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
# (kind, inputs of a group, has zeros, dtype of scales); 0: one group, -1: in no order
CODINGS: list[tuple[Kind, int, bool, torch.dtype]] = [
    ("uint4", 32, True, torch.bfloat16),
    ("uint4", 64, False, torch.float16),
    ("uint4", 128, True, torch.float16),
    ("uint4", -1, True, torch.float16),
    ("uint8", 0, False, torch.float32),
    ("uint8", 96, True, torch.float32),
    ("e4m3", 0, False, torch.float32),
    ("e4m3", 128, False, torch.float32),
    ("e4m3", 40, False, torch.float32),
    ("e2m1", 32, False, torch.uint8),
]


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(DTYPE).to(DEVICE)


def coded(
    kind: Kind, group: int, has_zeros: bool, dtype: torch.dtype, shape: tuple[int, int]
) -> tuple[GroupedWeight, Tensor]:
    """A weight of random codes, and its meaning, computed here number by number."""
    generator = torch.Generator().manual_seed(3)
    num_outputs, num_inputs = shape
    count = 1 if group == 0 else 3 if group == -1 else -(-num_inputs // group)
    groups = torch.arange(num_inputs) // (group or num_inputs)
    if group == -1:
        groups = torch.randint(0, 3, (num_inputs,), generator=generator)
    top = 256 if kind in ("uint8", "e4m3") else 16
    codes = torch.randint(0, top, shape, generator=generator, dtype=torch.int32)
    if kind == "e4m3":
        codes[codes & 127 == 127] = 3
    codes = codes.to(torch.uint8)
    scales = torch.rand(num_outputs, count, generator=generator).add_(0.5)
    stored = (scales / 16).to(dtype)
    if kind == "e2m1":
        stored = torch.randint(120, 130, scales.shape, generator=generator).to(torch.uint8)
    zeros = None
    if has_zeros:
        zeros = torch.randint(0, top + 1, scales.shape, generator=generator, dtype=torch.int32)
    numbers = {
        "uint4": lambda: codes.float() - 8,
        "uint8": lambda: codes.float() - 128,
        "e4m3": lambda: codes.view(torch.float8_e4m3fn).float(),
        "e2m1": lambda: torch.tensor(E2M1)[codes.int()],
    }[kind]()
    if zeros is not None:
        numbers = codes.float() - zeros[:, groups]
    exact = 2.0 ** (stored.float() - 127) if kind == "e2m1" else stored.float()
    meant = numbers * exact[:, groups]
    size = group if group > 0 else 64
    weight = grouped(kind, codes, stored, zeros, groups if group == -1 else None, group=size)
    return weight, meant


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (5, 33), (70, 300), (64, 256)], ids=str)
def test_codes_mean_what_they_say(
    coding: tuple[Kind, int, bool, torch.dtype], shape: tuple[int, int]
) -> None:
    weight, meant = coded(*coding, shape)
    assert weight.shape == shape
    assert weight.decoded().equal(meant)
    some = torch.tensor([shape[0] - 1, 0])
    assert weight.rows(some).decoded().equal(meant[some])
    for first, end in ((0, shape[1]), (shape[1] // 3, shape[1]), (shape[1] // 2, shape[1] - 1)):
        if end > first:
            part = weight.columns(first, end)
            assert part.decoded().equal(meant[:, first:end])
            assert part.columns(0, end - first).decoded().equal(meant[:, first:end])


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_halves_at_the_borders_of_groups_have_half_the_bytes(
    coding: tuple[Kind, int, bool, torch.dtype],
) -> None:
    weight, meant = coded(*coding, (64, 256))
    halves = [weight.columns(0, 128), weight.columns(128, 256)]
    assert torch.cat([half.decoded() for half in halves], 1).equal(meant)
    if coding[1] in (32, 64, 128):
        assert [2 * half.num_bytes for half in halves] == [weight.num_bytes] * 2
        assert all(half.index is None for half in halves)


def test_groups_that_a_rank_has_a_part_of_are_divided() -> None:
    weight, meant = coded("uint4", 128, True, torch.float16, (8, 384))
    part = weight.columns(192, 384)
    assert (part.group, part.index) == (64, None)
    assert part.decoded().equal(meant[:, 192:])
    odd = weight.columns(200, 384)
    assert odd.index is not None
    assert odd.decoded().equal(meant[:, 200:])


def test_parts_are_joined_if_they_are_coded_alike() -> None:
    parts = [
        coded("uint4", 64, zeros, torch.float16, (n, 128)) for n, zeros in ((3, True), (5, False))
    ]
    joined = GroupedWeight.joined([weight for weight, _ in parts])
    assert joined is not None
    assert joined.decoded().equal(torch.cat([meant for _, meant in parts]))
    other, _ = coded("uint8", 64, False, torch.float16, (3, 128))
    assert GroupedWeight.joined([parts[0][0], other]) is None
    index = torch.arange(128, dtype=torch.int32) % 2
    unordered = replace(parts[0][0], index=index, group=32)
    assert GroupedWeight.joined([unordered, replace(unordered, index=1 - index)]) is None
    assert GroupedWeight.joined([unordered, unordered]) is not None


@pytest.mark.parametrize(
    ("weight_format", "bits"), [("int4", 5.0), ("int8", 8.125), ("fp8", 8.125)]
)
def test_rounded_weights_are_within_half_a_step(weight_format: GroupedFormat, bits: float) -> None:
    weight = weights(48, 256).bfloat16()
    rounded = quantise(weight, weight_format)
    assert rounded.num_bytes * 8 == bits * weight.numel()
    error = (rounded.decoded() - weight.float()).abs()
    if weight_format == "fp8":
        largest = weight.float().abs().amax(1, keepdim=True)
        allowed = (weight.float().abs() / 16).maximum(largest / 448 / 1024)
    else:
        steps = rounded.scales.float().T.repeat_interleave(rounded.group, 1)
        # A scale and an offset in bfloat16 may miss the ends of the range by half a percent.
        allowed = (0.6 if weight_format == "int4" else 0.75) * steps
    assert (error <= allowed).all()


@pytest.mark.parametrize("weight_format", ["int8", "int4", "fp8"])
def test_blocks_of_zeros_and_the_largest_numbers_stay_finite(weight_format: GroupedFormat) -> None:
    weight = torch.zeros(4, 65)
    weight[1, :32] = 1e-45
    weight[2] = 3e38
    weight[3, ::2], weight[3, 1::2] = 1e38, -1e38
    found = quantise(weight, weight_format).decoded()
    assert found[0].eq(0).all()
    torch.testing.assert_close(found[2:], weight[2:], rtol=0.08, atol=0)
    weight[3, 64] = torch.nan
    with pytest.raises(ValueError, match=f"weight: {weight_format} needs finite weights"):
        quantise(weight, weight_format)


def test_nan_is_no_code() -> None:
    codes = torch.tensor([[1, 0xFF]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="codes that are NaN"):
        grouped("e4m3", codes, torch.ones(1, 1), group=32)


@pytest.mark.slow
@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_the_kernels_multiply_with_the_decoded_weights(
    coding: tuple[Kind, int, bool, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At shapes that no tile divides: the error is at most twice that of torch in one dtype."""
    cases = [((70, 300), 1, False), ((33, 96), 17, False), ((70, 96), 3, True)]
    if coding in (CODINGS[0], CODINGS[7]):
        cases.append(((33, 96), 130, False))
    for shape, count, deterministic in cases:
        weight, meant = coded(*coding, shape)
        weight, rounded, bias = weight.to(DEVICE), meant.to(DEVICE, DTYPE), inputs(shape[0])
        x = inputs(count, 2 * shape[1])[:, : shape[1]]  # strided
        exact = x.double() @ rounded.double().T + bias.double()
        plain = torch.nn.functional.linear(x, rounded, bias)
        limit = 2 * (plain.double() - exact).abs().max() + 1e-6 * exact.abs().max()
        found = grouped_linear(x, weight, bias, deterministic=deterministic, backend="triton")
        assert (found.double() - exact).abs().max() <= limit
    # Many rows: slices of the weight, here of 7 outputs, are decoded for a library's product.
    weight, meant = coded(*coding, (33, 96))
    weight, rounded = weight.to(DEVICE), meant.to(DEVICE, DTYPE)
    monkeypatch.setattr(triton_linear, "DECODED_ROWS", 17)
    monkeypatch.setattr(workspace, "DECODED_WEIGHT_BYTES", 7 * 2 * 96)
    identity = torch.eye(96, device=DEVICE, dtype=DTYPE)
    assert grouped_linear(identity, weight, backend="triton").equal(rounded.T)


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["int4", "int8", "fp8"])
def test_the_kernel_multiplies_with_weights_rounded_at_load(weight_format: GroupedFormat) -> None:
    weight = quantise(weights(40, 70), weight_format).to(DEVICE)
    identity = torch.eye(70, device=DEVICE, dtype=DTYPE)
    found = grouped_linear(identity, weight, backend="triton")
    torch.testing.assert_close(found.T, weight.decoded().to(DTYPE), rtol=2**-8, atol=0)


@pytest.mark.slow
def test_a_row_has_the_same_bits_in_any_batch_if_that_is_asked_for() -> None:
    weight, _ = coded(*CODINGS[0], (33, 100))
    weight, x = weight.to(DEVICE), inputs(70, 100)
    whole = grouped_linear(x, weight, deterministic=True, backend="triton")
    for rows in (slice(0, 1), slice(3, 20), slice(66, 70)):
        found = grouped_linear(x[rows], weight, deterministic=True, backend="triton")
        assert found.equal(whole[rows])


def test_inputs_are_checked_and_have_gradients() -> None:
    weight, meant = coded(*CODINGS[0], (6, 64))
    for wrong in (torch.zeros(2, 63), torch.zeros(2, 64, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 64\]"):
            grouped_linear(wrong, weight)
    x = torch.zeros(2, 3, 64, requires_grad=True)
    out = grouped_linear(x, weight, backend="triton" if DEVICE == "cuda" else None)
    assert out.shape == (2, 3, 6)
    out.sum().backward()
    torch.testing.assert_close(x.grad, meant.sum(0).expand(2, 3, 64))
