"""The public operator `expert_mlp`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvmesh.kernels import gpu
from kvmesh.kernels.linear import GroupedWeight, PackedWeight
from kvmesh.kernels.moe import reference
from kvmesh.kernels.moe.glu import SWIGLU, GatedUnit

# Of all experts: tensors, or for GPUs in 4 or 8 bits, [num_experts, outputs, inputs]; for CPUs
# packed, [num_experts * outputs, inputs].
ExpertWeights = torch.Tensor | GroupedWeight | PackedWeight


def expert_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    *,
    glu: GatedUnit = SWIGLU,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    deterministic: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Σ over a token's experts e of weight · (glu(x · gate_eᵀ, x · up_eᵀ) · down_eᵀ)

    x: [num_tokens, hidden] bf16 or fp32
    experts: [num_tokens, top_k] int64, whose experts compute the token; ids outside
        [0, num_experts) belong to another rank and add nothing
    weights: [num_tokens, top_k], of the experts in the sum
    gate_up: [num_experts, 2 * width, hidden], dtype of x; first the rows of the gate
    down: [num_experts, hidden, width]; both are tensors, `GroupedWeight`, or on CPUs `PackedWeight`
        [num_experts * 2 * width, hidden] and [num_experts * hidden, width]
    gate_up_bias: [num_experts, 2 * width] or None; down_bias: [num_experts, hidden] or None
    deterministic: a token's result has the same bits in any batch; on CPUs with packed weights and
        SwiGLU alone
    backend: None picks the kernels on GPUs and plain torch elsewhere
    Returns [num_tokens, hidden] like x. On GPUs nothing synchronises with the host and no
    shape depends on data. A token's experts are summed in the order in which they are given,
    so that its result depends on no other token.
    Raises ValueError naming the argument.
    """
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if isinstance(weight, torch.Tensor) and weight.dtype != x.dtype:
            raise ValueError(f"{name}: expected {x.dtype} as of x, got {weight.dtype}")
    num_experts, double, hidden = _sizes(gate_up, down)
    if x.dim() != 2 or double % 2 or x.shape[1] != hidden:
        raise ValueError(
            "x, gate_up: expected [num_tokens, hidden] and [num_experts, 2 * width, hidden], "
            f"got {tuple(x.shape)} and {tuple(gate_up.shape)}"
        )
    wanted: tuple[int, ...] = (num_experts, hidden, double // 2)
    if isinstance(down, PackedWeight):
        wanted = (num_experts * hidden, double // 2)
    if type(down) is not type(gate_up) or tuple(down.shape) != wanted:
        raise ValueError(
            f"down: expected {wanted} stored like gate_up, got {tuple(down.shape)} "
            f"in a {type(down).__name__}"
        )
    if experts.dim() != 2 or experts.shape[0] != x.shape[0] or weights.shape != experts.shape:
        raise ValueError(
            "experts, weights: expected [num_tokens, top_k], "
            f"got {tuple(experts.shape)} and {tuple(weights.shape)} for {x.shape[0]} tokens"
        )
    for name, bias, width in (
        ("gate_up_bias", gate_up_bias, double),
        ("down_bias", down_bias, hidden),
    ):
        if bias is not None and bias.shape != (num_experts, width):
            raise ValueError(f"{name}: expected {(num_experts, width)}, got {tuple(bias.shape)}")
    packed = isinstance(gate_up, PackedWeight)
    implementation: Callable[..., torch.Tensor] = reference.expert_mlp
    if gpu.picks_kernel(x, backend):
        if packed:
            raise ValueError("gate_up, down: expected tensors for the kernels, got packed weights")
        from kvmesh.kernels.moe import triton_moe

        implementation = triton_moe.expert_mlp
    elif deterministic and not (packed and glu == SWIGLU):
        raise ValueError("deterministic: expected packed weights and SwiGLU with plain torch")
    return implementation(
        x,
        experts,
        weights,
        gate_up,
        down,
        glu=glu,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        deterministic=deterministic,
    )


def _sizes(gate_up: ExpertWeights, down: ExpertWeights) -> tuple[int, int, int]:
    """Experts, twice their width, and hidden; zeros if gate_up's shape is none of theirs."""
    if isinstance(gate_up, PackedWeight):
        double = 2 * down.shape[-1]
        return gate_up.shape[0] // double, double, gate_up.in_features
    if gate_up.dim() != 3:
        return 0, 0, 0
    num_experts, double, hidden = gate_up.shape
    return num_experts, double, hidden
