"""`expert_mlp` in plain torch: the reference, and the serving path on CPUs, where packed weights
have loops of their own.

Tokens are sorted by expert, so that each expert's weights are read once, for all of its
tokens together; experts without a token cost nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvmesh.kernels.linear import GroupedWeight, PackedWeight, linear
from kvmesh.kernels.moe.glu import GatedUnit
from kvmesh.kernels.pointwise import silu_mul

# With few rows MKL is faster at W xᵀ than at x Wᵀ in float32.
_FEW_ROWS = 64


def expert_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor | GroupedWeight | PackedWeight,
    down: torch.Tensor | GroupedWeight | PackedWeight,
    *,
    glu: GatedUnit,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    deterministic: bool,
) -> torch.Tensor:
    num_tokens, top_k = experts.shape
    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ids, counts = torch.unique_consecutive(flat[order], return_counts=True)
    parts = x.new_zeros(num_tokens * top_k, x.shape[1])
    num_experts = down.shape[0]
    if isinstance(down, PackedWeight):
        num_experts //= x.shape[1]
    for expert, places in zip(ids.tolist(), order.split(counts.tolist()), strict=True):
        if not 0 <= expert < num_experts:
            continue
        bias = None if gate_up_bias is None else gate_up_bias[expert]
        both = _linear(x[places // top_k], _of_expert(gate_up, expert, num_experts), bias)
        inner = silu_mul(both) if deterministic else glu(*both.chunk(2, dim=-1))
        bias = None if down_bias is None else down_bias[expert]
        parts[places] = _linear(inner, _of_expert(down, expert, num_experts), bias)
    by_token = parts.view(num_tokens, top_k, x.shape[1]).float()
    if deterministic:
        return in_order(by_token * weights.float().unsqueeze(-1)).to(x.dtype)
    return torch.bmm(weights.float().unsqueeze(1), by_token).squeeze(1).to(x.dtype)


def _of_expert(
    weights: torch.Tensor | GroupedWeight | PackedWeight, expert: int, num_experts: int
) -> torch.Tensor | GroupedWeight | PackedWeight:
    if isinstance(weights, PackedWeight):
        rows = weights.shape[0] // num_experts
        return weights.rows(slice(expert * rows, (expert + 1) * rows))
    return weights.expert(expert) if isinstance(weights, GroupedWeight) else weights[expert]


def in_order(shares: torch.Tensor) -> torch.Tensor:
    """[num_tokens, top_k, hidden] -> the sums over a token's experts, one after the other"""
    total = shares[:, 0]
    for index in range(1, shares.shape[1]):
        total = total + shares[:, index]
    return total


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor | GroupedWeight | PackedWeight,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    if isinstance(weight, PackedWeight):
        return linear(x, weight, bias)
    if isinstance(weight, GroupedWeight):
        weight = weight.decoded().to(x.dtype)
    if x.dtype != torch.float32 or len(x) > _FEW_ROWS or x.is_cuda:
        return F.linear(x, weight, bias)
    out = torch.mm(weight, x.t()).t()
    return out if bias is None else out + bias
