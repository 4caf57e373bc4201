"""Llama 4's attention and mixture of experts.

transformers' attention counts positions in its own cache, and its mixture computes every expert
for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvmesh.workers.model.hook import AttendArgs, AttendSlot
from kvmesh.workers.parallel.linears import ColumnLinear


@dataclass(frozen=True, slots=True)
class Temperature:
    """Queries grow with their position p, by 1 + strength · ln(1 + ⌊(p + 1) / step⌋)
    (arXiv 2501.19399), in layers without RoPE."""

    step: float
    strength: float

    def factors(self, positions: Tensor) -> Tensor:
        """[T] int64 -> [T] fp32"""
        steps = torch.floor((positions.float() + 1.0) / self.step)
        return torch.log1p(steps) * self.strength + 1.0


class Llama4Attention(nn.Module):
    """Self-attention from hidden states to hidden states; norms come after RoPE."""

    def __init__(self, source: Any, sliding_window: int | None, slot: AttendSlot) -> None:
        super().__init__()
        self._head_dim: int = source.head_dim
        projections = [source.q_proj, source.k_proj, source.v_proj]
        self._num_heads, self._num_kv_heads, _ = (
            part.weight.shape[0] // self._head_dim for part in projections
        )
        self.qkv = ColumnLinear.joined(projections)
        self.o_proj = source.o_proj
        self._layer: int = source.layer_idx
        self._rotates = bool(source.use_rope)
        self._norm_eps: float | None = source.qk_norm.eps if hasattr(source, "qk_norm") else None
        self._temperature: Temperature | None = None
        if source.attn_temperature_tuning and not self._rotates:
            self._temperature = Temperature(source.floor_scale, source.attn_scale)
        self._slot = slot
        self._args = AttendArgs(scale=source.scaling, sliding_window=sliding_window)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Tensor, **_kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, T, hidden]; position_embeddings: [1, T, head_dim / 2] complex, of
        neighbouring channels -> ([1, T, hidden], None), as the decoder layer expects"""
        attend, positions = self._slot.attend, self._slot.positions
        assert attend is not None, "attention was called outside ServedModel.forward"
        qkv = self.qkv(hidden_states[0])
        qkv = qkv.view(qkv.shape[0], -1, self._head_dim)
        qk, v = qkv.split((self._num_heads + self._num_kv_heads, self._num_kv_heads), dim=1)
        if self._rotates:
            pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))
            turned = torch.view_as_real(pairs * position_embeddings[0][:, None])
            qk = turned.flatten(-2).to(qkv.dtype)
        if self._norm_eps is not None:
            qk = F.rms_norm(qk.float(), (self._head_dim,), None, self._norm_eps).to(qkv.dtype)
        q, k = qk.split((self._num_heads, self._num_kv_heads), dim=1)
        if self._temperature is not None:
            assert positions is not None
            q = (q * self._temperature.factors(positions)[:, None, None]).to(qkv.dtype)
        out = attend(self._layer, q, k, v, self._args)
        return self.o_proj(out.reshape(out.shape[0], -1)).unsqueeze(0), None


class Llama4Mixture(nn.Module):
    """A shared expert, and the experts that a token is sent to, scaled by their scores."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.router: nn.Linear = source.router
        self.experts = source.experts
        self.shared_expert = source.shared_expert
        self._top_k: int = source.top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """[1, T, hidden] -> ([T, hidden], None), as the decoder layer expects"""
        x = hidden_states[0]
        top, chosen = F.linear(x, self.router.weight).topk(self._top_k, dim=-1)
        scores = torch.sigmoid(top.float()).to(x.dtype)
        # What an expert gets is scaled, not what it returns: one input for each of a token's.
        routed = (x[:, None] * scores[..., None]).flatten(0, 1)
        chosen = chosen.reshape(-1, 1)
        out = self.experts(routed, chosen, torch.ones_like(chosen, dtype=x.dtype))
        out = out.view(*scores.shape, -1).sum(1)
        return out + self.shared_expert(x), None
