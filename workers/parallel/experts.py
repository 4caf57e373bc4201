"""A rank's share of a layer's experts.

    by width    every rank has a part of every expert: rows of gate and up, columns of down
    by expert   every rank has some experts whole, and computes the tokens that chose them

In both cases every rank has all tokens, and the ranks' partial outputs are summed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvmesh.kernels.linear import pack, prepare
from kvmesh.kernels.moe import SWIGLU, ExpertWeights, GatedUnit, expert_mlp
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.linears import ready


class Experts(nn.Module):
    """Replaces the experts of a transformers mixture, between its router and its output.

    gate_up: [experts of this rank, 2 * width, hidden]; down: [experts of this rank, hidden, width];
        on CPUs maybe packed, [experts of this rank * outputs, inputs]
    gate_up_bias, down_bias: [experts of this rank, 2 * width] and [experts of this rank, hidden];
        down_bias is added once: when experts are split by width, on rank 0
    first: the id of this rank's first expert
    num_experts: over all ranks
    """

    def __init__(
        self,
        gate_up: ExpertWeights,
        down: ExpertWeights,
        comm: Communicator,
        *,
        num_experts: int,
        first: int = 0,
        glu: GatedUnit,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.gate_up, self.down = ready(gate_up), ready(down)
        self._deterministic = False
        self.gate_up_bias, self.down_bias = (
            None if bias is None else nn.Parameter(bias, requires_grad=False)
            for bias in (gate_up_bias, down_bias)
        )
        # How many tokens each expert of the layer has computed since it was loaded.
        self.load = nn.Buffer(
            torch.zeros(num_experts, dtype=torch.int64, device=gate_up.device), persistent=False
        )
        self._comm = comm
        self._first = first
        self._glu = glu

    def make_deterministic(self) -> None:
        """From now on a token's result has the same bits in any batch. On CPUs experts are packed
        for it, without rounding. Raises ValueError for another gated unit than SwiGLU."""
        if self._glu != SWIGLU:
            raise ValueError("experts: expected SwiGLU")
        self._deterministic = True
        for name in ("gate_up", "down"):
            weights = getattr(self, name)
            if isinstance(weights, Tensor) and weights.device.type == "cpu":
                delattr(self, name)
                packed = pack(weights.flatten(0, 1), "exact")
                prepare(packed)
                setattr(self, name, packed)

    def forward(self, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """hidden_states: [T, hidden]; experts, weights: [T, top_k] -> like hidden_states"""
        chosen = experts.reshape(-1)
        self.load.scatter_add_(0, chosen, torch.ones_like(chosen))
        out = expert_mlp(
            hidden_states,
            experts - self._first,
            weights,
            self.gate_up,
            self.down,
            glu=self._glu,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            deterministic=self._deterministic,
            # The kernels have no gradients, which calibration needs.
            backend="reference" if hidden_states.requires_grad else None,
        )
        return self._comm.all_reduce(out)


class RowByRow(nn.Module):
    """A router whose choice for a token has the same bits in any batch: it sees a token at a time,
    in memory of its own. A library's sums depend on how many rows there are, and how they lie."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """[..., hidden] -> what the router returns, [T, ...] each"""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).split(1)
        found = [self.router(row.clone()) for row in rows]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
