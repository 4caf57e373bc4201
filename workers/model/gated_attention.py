"""Attention whose output is gated by another projection of the same inputs (Qwen3-Next, Qwen3.5).

transformers gates all channels of a rank's heads; with pages dealt to ranks, attention returns
this rank's part of them (workers/parallel/heads.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvmesh.kernels.pointwise.reference import rotate
from kvmesh.workers.model.hook import AttendArgs, AttendSlot
from kvmesh.workers.parallel.comm import Communicator


class GatedAttention(nn.Module):
    """Self-attention from hidden states to hidden states.

    q_proj: to a query and a gate for each head, [num_heads, 2 * head_dim]
    """

    def __init__(
        self, source: Any, sliding_window: int | None, slot: AttendSlot, comm: Communicator
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = source.q_proj, source.k_proj, source.v_proj
        self.q_norm, self.k_norm = source.q_norm, source.k_norm
        self.o_proj = source.o_proj
        self._head_dim: int = source.head_dim
        self._layer: int = source.layer_idx
        self._slot = slot
        self._comm = comm
        self._args = AttendArgs(scale=source.scaling, sliding_window=sliding_window)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, T, hidden] -> ([1, T, hidden], None), as the decoder layer expects"""
        attend = self._slot.attend
        assert attend is not None, "attention was called outside ServedModel.forward"
        x = hidden_states[0]
        q, gate = self.q_proj(x).view(len(x), -1, 2 * self._head_dim).chunk(2, dim=-1)
        k, v = (p(x).view(len(x), -1, self._head_dim) for p in (self.k_proj, self.v_proj))
        cos, sin = position_embeddings[0][0], position_embeddings[1][0]
        qk = rotate(torch.cat((self.q_norm(q), self.k_norm(k)), dim=1), cos, sin)
        q, k = qk.split((q.shape[1], k.shape[1]), dim=1)
        out = attend(self._layer, q, k, v, self._args).flatten(1)
        gate = gate.flatten(1).chunk(self._comm.kvp, dim=-1)[self._comm.kvp_rank]
        return self.o_proj(out * gate.sigmoid()).unsqueeze(0), None
