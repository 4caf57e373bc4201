"""Experts: the reference against plain loops, and the kernels against the reference.

Without a GPU the kernels run in Triton's interpreter, in fp32, at shapes that no tile divides.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvmesh.kernels.linear import GroupedFormat, WeightFormat, pack, quantise, unpack
from kvmesh.kernels.moe import SWIGLU, GatedUnit, expert_mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
CLAMPED = GatedUnit(alpha=1.702, limit=0.7, shift=1.0)
HIDDEN, WIDTH, EXPERTS, TOP_K = 70, 36, 5, 2


def make(
    num_tokens: int, dtype: torch.dtype = torch.float32, biases: bool = False
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of expert_mlp; expert 3 is never chosen."""
    scores = torch.randn(num_tokens, EXPERTS)
    scores[:, 3] = -torch.inf
    weights, experts = scores.softmax(-1).topk(TOP_K, dim=-1)
    arguments = (
        torch.randn(num_tokens, HIDDEN).to(dtype),
        experts,
        weights,
        (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5).to(dtype),
        (torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5).to(dtype),
    )
    if not biases:
        return arguments, {}
    return arguments, {
        "gate_up_bias": torch.randn(EXPERTS, 2 * WIDTH).to(dtype),
        "down_bias": torch.randn(EXPERTS, HIDDEN).to(dtype),
    }


def truth(arguments: tuple[Tensor, ...], glu: GatedUnit, biases: dict[str, Tensor]) -> Tensor:
    """In fp64, one token and expert at a time."""
    x, experts, weights, gate_up, down = arguments
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (ids, shares) in enumerate(zip(experts.tolist(), weights.tolist(), strict=True)):
        for expert, share in zip(ids, shares, strict=True):
            if not 0 <= expert < len(gate_up):
                continue
            inner = gate_up[expert].double() @ x[token].double()
            if biases:
                inner += biases["gate_up_bias"][expert].double()
            gate, up = inner.chunk(2)
            if glu.limit is not None:
                gate, up = gate.clamp(max=glu.limit), up.clamp(-glu.limit, glu.limit)
            value = down[expert].double() @ (
                gate / (1 + (-glu.alpha * gate).exp()) * (up + glu.shift)
            )
            if biases:
                value += biases["down_bias"][expert].double()
            out[token] += share * value
    return out


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 150])
@pytest.mark.parametrize(("glu", "biases"), [(SWIGLU, False), (CLAMPED, True)])
def test_reference_equals_loops_in_fp64(num_tokens: int, glu: GatedUnit, biases: bool) -> None:
    arguments, given = make(num_tokens, biases=biases)
    out = expert_mlp(*arguments, glu=glu, **given)
    torch.testing.assert_close(out.double(), truth(arguments, glu, given), atol=2e-6, rtol=0)


def test_experts_of_other_ranks_add_nothing() -> None:
    (x, experts, weights, gate_up, down), _ = make(20)
    whole = expert_mlp(x, experts, weights, gate_up, down)
    low = expert_mlp(x, experts, weights, gate_up[:2], down[:2])
    high = expert_mlp(x, experts - 2, weights, gate_up[2:], down[2:])
    torch.testing.assert_close(low + high, whole, atol=1e-6, rtol=0)
    assert not expert_mlp(x, experts + EXPERTS, weights, gate_up, down).any()


def test_a_token_depends_on_no_other() -> None:
    """Up to rounding, which the sizes of products change."""
    (x, experts, weights, *rest), _ = make(9)
    whole = expert_mlp(x, experts, weights, *rest)
    for token in range(9):
        one = slice(token, token + 1)
        alone = expert_mlp(x[one], experts[one], weights[one], *rest)
        torch.testing.assert_close(alone, whole[one], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "glu", "biases"), [(0, SWIGLU, False), (1, SWIGLU, False), (41, CLAMPED, True)]
)
def test_kernels_are_as_close_as_torch(
    num_tokens: int, glu: GatedUnit, biases: bool, dtype: torch.dtype
) -> None:
    arguments, given = make(num_tokens, dtype, biases)
    arguments[1][::7] = -1  # of another rank
    exact = truth(arguments, glu, given)
    limit = 2e-6
    if dtype != torch.float32:
        torch_error = expert_mlp(*arguments, glu=glu, **given).double() - exact
        limit = 2 * torch_error.abs().max().item() if num_tokens else 0.0
    on_device = [argument.to(DEVICE) for argument in arguments]
    biases_there = {name: bias.to(DEVICE) for name, bias in given.items()}
    out = expert_mlp(*on_device, glu=glu, **biases_there, backend="triton")
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu().double(), exact, atol=limit, rtol=0)


FEW_BITS: list[GroupedFormat] = ["int4", "int8", "fp8"]


@pytest.mark.parametrize("weight_format", FEW_BITS)
def test_experts_in_few_bits_compute_with_their_values(weight_format: GroupedFormat) -> None:
    (x, experts, weights, *stored), given = make(20, biases=True)
    coded = [quantise(weight, weight_format) for weight in stored]
    out = expert_mlp(x, experts, weights, *coded, glu=CLAMPED, **given)
    decoded = [weight.decoded().contiguous() for weight in coded]
    exact = truth((x, experts, weights, *decoded), CLAMPED, given)
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=0)


@pytest.mark.parametrize("weight_format", ["exact", "int8", "int4"])
def test_packed_experts_compute_with_their_values(weight_format: WeightFormat) -> None:
    (x, experts, weights, *stored), given = make(20, biases=True)
    packed = [pack(weight.flatten(0, 1), weight_format) for weight in stored]
    experts[::7] = -1  # of another rank
    out = expert_mlp(x, experts, weights, *packed, glu=CLAMPED, **given)
    unpacked = [unpack(weight).view(EXPERTS, -1, weight.in_features) for weight in packed]
    exact = truth((x, experts, weights, *unpacked), CLAMPED, given)
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=0)
    alone = expert_mlp(x[1:2], experts[1:2], weights[1:2], *packed, glu=CLAMPED, **given)
    assert alone.equal(out[1:2])


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["int4", "fp8"])
def test_kernels_decode_experts(weight_format: GroupedFormat) -> None:
    """Against the same kernels with the decoded weights."""
    (x, experts, weights, *stored), given = make(9, biases=True)
    experts[::7] = -1
    coded = [quantise(weight, weight_format).to(DEVICE) for weight in stored]
    decoded = [weight.decoded().contiguous() for weight in coded]
    first = (x.to(DEVICE), experts.to(DEVICE), weights.to(DEVICE))
    biases = {name: bias.to(DEVICE) for name, bias in given.items()}
    found, plain = (
        expert_mlp(*first, *stored, glu=CLAMPED, **biases, backend="triton")
        for stored in (coded, decoded)
    )
    torch.testing.assert_close(found, plain, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda a: (a[0][:, 1:], *a[1:]), "x, gate_up"),
        (lambda a: (a[0], a[1][1:], *a[2:]), "experts, weights"),
        (lambda a: (*a[:4], a[4].mT), "down"),
    ],
)
def test_wrong_shapes_are_named(change: object, name: str) -> None:
    arguments, _ = make(3)
    with pytest.raises(ValueError, match=f"^{name}: "):
        expert_mlp(*change(arguments))  # type: ignore[operator]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bits_do_not_depend_on_other_tokens(backend: str) -> None:
    (x, experts, weights, gate_up, down), biases = make(150, biases=True)
    given: dict[str, Any] = {**biases, "backend": backend, "deterministic": True}
    both: Any = (gate_up, down)
    if backend == "reference":
        both = [pack(side.flatten(0, 1), "exact") for side in both]
    whole = expert_mlp(x, experts, weights, *both, **given)
    plain = expert_mlp(x, experts, weights, gate_up, down, **biases)
    torch.testing.assert_close(whole, plain, atol=2e-6, rtol=0)
    for first, end in ((0, 1), (5, 6), (7, 40), (1, 150)):
        some = slice(first, end)
        part = expert_mlp(x[some], experts[some], weights[some], *both, **given)
        assert torch.equal(part, whole[some])


def test_plain_weights_and_other_units_are_not_deterministic_on_cpus() -> None:
    arguments, _ = make(3)
    with pytest.raises(ValueError, match="deterministic: expected packed weights and SwiGLU"):
        expert_mlp(*arguments, deterministic=True, backend="reference")
    packed: Any = [pack(side.flatten(0, 1), "exact") for side in arguments[3:]]
    with pytest.raises(ValueError, match="deterministic"):
        expert_mlp(*arguments[:3], *packed, glu=CLAMPED, deterministic=True, backend="reference")
    with pytest.raises(ValueError, match="expected tensors for the kernels"):
        expert_mlp(*arguments[:3], *packed, backend="triton")
