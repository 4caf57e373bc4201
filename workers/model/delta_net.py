"""Gated delta nets: layers with a memory of fixed size instead of keys and values.

    S ← exp(g) S + β k (v − exp(g) Sᵀk)ᵀ,   o = Sᵀq

for each head, with a short convolution over queries, keys and values before (Yang et al., arXiv
2412.06464). transformers' functions compute it in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from kvmesh.workers.model.hook import AttendSlot
from kvmesh.workers.model.recurrent_state import StatePart
from kvmesh.workers.model.short_convolution import convolve
from kvmesh.workers.parallel.linears import ColumnLinear


class GatedDeltaNet(nn.Module):
    """From hidden states to hidden states, with this rank's heads.

    Qwen3-Next's projections are ordered by key heads; Qwen3.5's are one after another.

    layer: number among the layers with states; ranks: how many share the heads
    """

    def __init__(self, source: Any, layer: int, slot: AttendSlot, ranks: int) -> None:
        super().__init__()
        self._key_heads: int = source.num_k_heads // ranks
        self._group: int = source.num_v_heads // source.num_k_heads
        self._key_dim, self._value_dim = source.head_k_dim, source.head_v_dim
        self._joined: ColumnLinear | None = None
        self._widths: list[int] = []
        if hasattr(source, "in_proj_qkvz"):
            self.in_proj_qkvz, self.in_proj_ba = source.in_proj_qkvz, source.in_proj_ba
        else:
            parts = [getattr(source, f"in_proj_{name}") for name in ("qkv", "z", "b", "a")]
            self._widths = [part.weight.shape[0] for part in parts]
            self._joined = ColumnLinear.joined(parts)
        self.conv1d: nn.Conv1d = source.conv1d
        self.A_log: nn.Parameter = source.A_log
        self.dt_bias: nn.Parameter = source.dt_bias
        self.norm = source.norm
        self.out_proj = source.out_proj
        self._layer = layer
        self._slot = slot

    def forward(self, hidden_states: Tensor, **_kwargs: Any) -> Tensor:
        """[1, T, hidden] -> like it"""
        states = self._slot.states
        assert states is not None, "a recurrent layer was called outside ServedModel.forward"
        x = hidden_states[0]
        inputs, z, b, a = self._project(x)
        beta, decay = b.sigmoid(), self._decay(a)
        tails, memories = states.read(self._layer)
        new_tails, new_memories = torch.empty_like(tails), torch.empty_like(memories)
        out = x.new_empty(len(x), self._key_heads * self._group, self._value_dim)
        for part in states.parts:
            seqs, tokens = part.seqs, part.tokens
            convolved, new_tails[seqs] = convolve(
                self.conv1d, inputs[tokens], tails[seqs], part.length
            )
            out[tokens], new_memories[seqs] = self._recur(
                F.silu(convolved), decay[tokens], beta[tokens], memories[seqs], part
            )
        states.write(self._layer, new_tails, new_memories)
        z = z.reshape(-1, self._value_dim)
        normed = self.norm(out.view(-1, self._value_dim), z)
        return self.out_proj(normed.view(1, len(x), -1))  # type: ignore[no-any-return]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[T, hidden] -> inputs of the convolution: queries, keys and values; gates of the
        output; and of each value head a gate of writing, and one of forgetting"""
        if self._joined is not None:
            return self._joined(x).split(self._widths, dim=-1)  # type: ignore[no-any-return]
        by_head = self.in_proj_qkvz(x).view(len(x), self._key_heads, -1)
        values = self._group * self._value_dim
        *mixed, z = by_head.split((self._key_dim, self._key_dim, values, values), dim=-1)
        b, a = self.in_proj_ba(x).view(len(x), self._key_heads, -1).split(self._group, dim=-1)
        inputs = torch.cat([part.flatten(1) for part in mixed], dim=-1)
        return inputs, z.flatten(1), b.flatten(1), a.flatten(1)

    def _decay(self, a: Tensor) -> Tensor:
        """[T, value heads] -> its logarithm, fp32"""
        return -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)

    def _recur(
        self, x: Tensor, decay: Tensor, beta: Tensor, memory: Tensor, part: StatePart
    ) -> tuple[Tensor, Tensor]:
        """x: [n * length, channels]; memory: [n, value heads, key_dim, value_dim]
        -> [n * length, value heads, value_dim], like memory"""
        keys = self._key_heads * self._key_dim
        q, k, v = x.view(-1, part.length, x.shape[-1]).split(
            (keys, keys, x.shape[-1] - 2 * keys), dim=-1
        )
        rule = torch_recurrent_gated_delta_rule
        if part.length > 1:
            rule = torch_chunk_gated_delta_rule
        out, memory = rule(
            q.unflatten(-1, (-1, self._key_dim)),
            k.unflatten(-1, (-1, self._key_dim)),
            v.unflatten(-1, (-1, self._value_dim)),
            g=decay.view(-1, part.length, decay.shape[-1]),
            beta=beta.view(-1, part.length, beta.shape[-1]),
            initial_state=memory,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        return out.flatten(0, 1), memory
