"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), computed on the latents themselves.

A token's keys and values of all heads follow from one latent vector c and one rotated key r:

    key of head h = (Uk_h c, r)     value of head h = Uv_h c

So what is stored is (c, r), one KV head for all query heads, and the matrices are absorbed:

    score = q_nope · Uk_h c + q_rope · r = (Uk_hᵀ q_nope, q_rope) · (c, r)
    output of head h = Uv_h Σ w c

Queries are as wide as what is stored, and attention returns a sum of latents for each head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvmesh.workers.model.hook import AttendArgs, AttendSlot
from kvmesh.workers.parallel.comm import Communicator

LATENT_ATTENTION = frozenset({"DeepseekV2Attention", "DeepseekV3Attention", "Glm4MoeLiteAttention"})


class LatentAttention(nn.Module):
    """Self-attention from hidden states to hidden states.

    kv_b: [num_heads, key channels + value channels, latent channels], Uk and Uv of this rank's
        heads
    """

    def __init__(self, source: Any, slot: AttendSlot, comm: Communicator) -> None:
        super().__init__()
        self._from_latent = source.q_lora_rank is not None
        if self._from_latent:
            self.q_a, self.q_a_norm = source.q_a_proj, source.q_a_layernorm
        self.q = source.q_b_proj if self._from_latent else source.q_proj
        self.kv_a, self.kv_a_norm = source.kv_a_proj_with_mqa, source.kv_a_layernorm
        self.o_proj = source.o_proj
        self._nope: int = source.qk_nope_head_dim
        self._rope: int = source.qk_rope_head_dim
        self._latent: int = source.kv_lora_rank
        wide = self._nope + source.v_head_dim
        self.kv_b = nn.Parameter(
            source.kv_b_proj.weight.data.view(-1, wide, self._latent), requires_grad=False
        )
        # The kvp ranks that have the same heads divide them for the output.
        heads = self.kv_b.shape[0] // comm.kvp
        self._out_heads = slice(comm.kvp_rank * heads, (comm.kvp_rank + 1) * heads)
        self._interleaved = bool(getattr(source.config, "rope_interleave", True))
        self._layer: int = source.layer_idx
        self._slot = slot
        self._args = AttendArgs(scale=source.scaling)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | Tensor,
        **_kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, T, hidden]; position_embeddings: as transformers' models have them
        -> ([1, T, hidden], None), as the decoder layer expects"""
        attend = self._slot.attend
        assert attend is not None, "attention was called outside ServedModel.forward"
        x = hidden_states[0]
        q = self.q(self.q_a_norm(self.q_a(x)) if self._from_latent else x)
        q_nope, q_rope = q.view(len(x), -1, self._nope + self._rope).split(
            (self._nope, self._rope), dim=-1
        )
        latent, k_rope = self.kv_a(x).split((self._latent, self._rope), dim=-1)
        cos, sin = _angles(position_embeddings)
        q_rope = self._turned(q_rope, cos.unsqueeze(1), sin.unsqueeze(1))
        key = torch.cat((self.kv_a_norm(latent), self._turned(k_rope, cos, sin)), dim=-1)
        key = key.unsqueeze(1)
        absorbed = torch.bmm(q_nope.transpose(0, 1), self.kv_b[:, : self._nope])
        query = torch.cat((absorbed.transpose(0, 1), q_rope), dim=-1)
        out = attend(self._layer, query, key, key[..., : self._latent], self._args)
        to_values = self.kv_b[self._out_heads, self._nope :]
        values = torch.bmm(out.transpose(0, 1), to_values.mT)
        return self.o_proj(values.transpose(0, 1).flatten(1)).unsqueeze(0), None

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [T, …, channels]; cos, sin: [T, …, channels / 2]. Interleaved pairs come out as
        halves: in queries and keys alike, so that their products are the same."""
        if self._interleaved:
            first, second = x[..., 0::2], x[..., 1::2]
        else:
            first, second = x.chunk(2, dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat(turned, dim=-1).to(x.dtype)


def _angles(embeddings: tuple[Tensor, Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair of channels, [T, channels / 2] each.

    embeddings: [1, T, channels / 2] complex in DeepSeek V2; cosine and sine, [1, T, channels]
        each, in the others
    """
    if isinstance(embeddings, Tensor):
        return embeddings[0].real, embeddings[0].imag
    cos, sin = (part[0] for part in embeddings)
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]
