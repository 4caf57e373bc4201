"""Mamba-2: layers with a matrix of fixed size for each head instead of keys and values.

    S ← exp(−a Δ) S + Δ x Bᵀ,   y = S C + D x,   a = exp(A_log),   Δ = softplus(dt + dt_bias)

for each head, with a short convolution over x, B and C before, and a gated norm after it. Several
heads share B and C: a group. Chunks of tokens are computed by matrix products, in which a token
attends to those before it in its chunk, and only the chunks' states follow each other (Dao and Gu,
arXiv 2405.21060, section 6).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvmesh.workers.model.hook import AttendSlot
from kvmesh.workers.model.linear_scan import linear_scan
from kvmesh.workers.model.recurrent_state import StatePart
from kvmesh.workers.model.short_convolution import convolve
from kvmesh.workers.parallel.comm import Communicator

_CHUNK_TOKENS = 64
# Chunks that are computed at once: enough for few calls, and few enough for their states, which
# take as much memory as those of so many sequences.
_CHUNKS = 16


class Mamba2Mixer(nn.Module):
    """From hidden states to hidden states, with this rank's heads and the groups they need.

    layer: number among the layers with states
    """

    def __init__(self, source: Any, layer: int, slot: AttendSlot, comm: Communicator) -> None:
        super().__init__()
        self.in_proj, self.conv1d, self.out_proj = source.in_proj, source.conv1d, source.out_proj
        self.A_log, self.D, self.dt_bias = source.A_log, source.D, source.dt_bias
        self._activation = source.act
        self._head_dim: int = source.head_dim
        self._state_size: int = source.ssm_state_size
        self._heads = len(self.D)
        self._channels = self._heads * self._head_dim
        self.norm = GatedGroupNorm(source.norm, source.n_groups, comm)
        self._layer = layer
        self._slot = slot

    def forward(self, hidden_states: Tensor, **_kwargs: Any) -> Tensor:
        """[1, T, hidden] -> like it"""
        states = self._slot.states
        assert states is not None, "a recurrent layer was called outside ServedModel.forward"
        projected = self.in_proj(hidden_states[0])
        mixed_channels = projected.shape[-1] - self._channels - self._heads
        gate, mixed, dt = projected.split((self._channels, mixed_channels, self._heads), dim=-1)
        steps = F.softplus(dt.float() + self.dt_bias.float())
        tails, memories = states.read(self._layer)
        new_tails, new_memories = torch.empty_like(tails), torch.empty_like(memories)
        out = mixed.new_empty(len(mixed), self._channels, dtype=torch.float32)
        for part in states.parts:
            seqs, tokens = part.seqs, part.tokens
            convolved, new_tails[seqs] = convolve(
                self.conv1d, mixed[tokens], tails[seqs], part.length
            )
            out[tokens], new_memories[seqs] = self._recur(
                self._activation(convolved), steps[tokens], memories[seqs], part
            )
        states.write(self._layer, new_tails, new_memories)
        return self.out_proj(self.norm(out, gate)).unsqueeze(0)  # type: ignore[no-any-return]

    def _recur(
        self, mixed: Tensor, steps: Tensor, memory: Tensor, part: StatePart
    ) -> tuple[Tensor, Tensor]:
        """mixed: [n * length, channels of x, B and C]; steps: [n * length, heads];
        memory: [n, heads, head_dim, state_size] -> [n * length, channels of x], like memory"""
        mixed = mixed.float().view(-1, part.length, mixed.shape[-1])
        grouped = (mixed.shape[-1] - self._channels) // 2
        x, b, c = mixed.split((self._channels, grouped, grouped), dim=-1)
        x = x.unflatten(-1, (self._heads, self._head_dim))
        b, c = (part.unflatten(-1, (-1, self._state_size)) for part in (b, c))
        steps = steps.view(-1, part.length, self._heads)
        log_decay = -self.A_log.float().exp() * steps
        scan = step_once if part.length == 1 else scan_chunks
        out, memory = scan(x * steps[..., None], log_decay, b, c, memory)
        out = out + self.D.float()[:, None] * x
        return out.flatten(2).flatten(0, 1), memory


class GatedGroupNorm(nn.Module):
    """RMS norm over each group's channels, of which ranks may have parts, after a gate.

    groups: over all ranks
    """

    def __init__(self, source: Any, groups: int, comm: Communicator) -> None:
        super().__init__()
        self.weight: nn.Parameter = source.weight
        self._eps: float = source.variance_epsilon
        self._groups = groups
        self._own_groups = max(groups // comm.size, 1)
        self._group_size = len(self.weight) * comm.size // groups
        self._first = comm.rank * groups // comm.size
        self._comm = comm

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x: [T, channels] fp32; gate: like it, of any dtype -> like gate"""
        by_group = (x * F.silu(gate.float())).unflatten(-1, (self._own_groups, -1))
        squares = by_group.square().sum(-1, keepdim=True)
        if self._comm.size > self._groups:
            squares = self._over_ranks(squares)
        normed: Tensor = by_group * torch.rsqrt(squares / self._group_size + self._eps)
        return self.weight * normed.flatten(-2).to(gate.dtype)

    def _over_ranks(self, squares: Tensor) -> Tensor:
        """[T, 1, 1], summed over the ranks that have a part of the same group."""
        of_all = squares.new_zeros(len(squares), self._groups, 1)
        of_all[:, self._first] = squares[:, 0]
        return self._comm.all_reduce(of_all)[:, self._first, None]


def step_once(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """`scan_chunks` of one token of each sequence."""
    group = x.shape[2] // b.shape[2]
    b, c = (part[:, 0].repeat_interleave(group, dim=1) for part in (b, c))
    kept = memory * log_decay[:, 0, :, None, None].exp()
    memory = kept + x[:, 0, :, :, None] * b[:, :, None]
    return (memory @ c[..., None]).squeeze(-1).unsqueeze(1), memory


def scan_chunks(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence over the next T tokens of n sequences; all tensors are fp32.

    x: [n, T, heads, head_dim], times Δ; log_decay: [n, T, heads]
    b, c: [n, T, groups, state_size]; memory: [n, heads, head_dim, state_size], before them
    Returns y without D, like x, and the memory after them.
    """
    size = min(_CHUNK_TOKENS, x.shape[1])
    outs = []
    for start in range(0, x.shape[1], size * _CHUNKS):
        span = slice(start, start + size * _CHUNKS)
        out, memory = _scan(x[:, span], log_decay[:, span], b[:, span], c[:, span], memory, size)
        outs.append(out)
    return torch.cat(outs, dim=1), memory


def _scan(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, memory: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """`scan_chunks` over K chunks of `size` tokens at once.

    In comments: G groups of R heads; L tokens of a chunk; P channels of a head, N of B and C.
    """
    tokens, groups = x.shape[1], b.shape[2]
    x, log_decay, b, c = (_in_chunks(part, size) for part in (x, log_decay, b, c))
    x = x.transpose(2, 3).unflatten(2, (groups, -1))  # [n, K, G, R, L, P]
    log_decay = log_decay.mT.unflatten(2, (groups, -1))  # [n, K, G, R, L]
    b, c = b.transpose(2, 3), c.transpose(2, 3)  # [n, K, G, L, N]
    # What a token has added to the memory, as it is at each token of its chunk.
    left = _decays(log_decay)  # [n, K, G, R, L, L]
    within = ((c @ b.mT).unsqueeze(3) * left) @ x
    added = (x * left[..., -1, :, None]).mT.flatten(3, 4) @ b  # [n, K, G, R * P, N]
    ends = linear_scan(
        log_decay.sum(-1).exp()[..., None, None],
        added.unflatten(3, (-1, x.shape[-1])),
        memory.unflatten(1, (groups, -1)),
    )
    starts = torch.cat((memory.unflatten(1, (groups, -1))[:, None], ends[:, :-1]), dim=1)
    before = (starts.flatten(3, 4) @ c.mT).unflatten(3, (-1, x.shape[-1])).mT
    out = within + before * log_decay.cumsum(-1).exp()[..., None]
    out = out.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :tokens]
    return out, ends[:, -1].flatten(1, 2)


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """[n, T, …] -> [n, chunks, size, …], filled with zeros, which neither add nor decay."""
    missing = -x.shape[1] % size
    if missing:
        x = torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1)
    return x.view(x.shape[0], -1, size, *x.shape[2:])


def _decays(logs: Tensor) -> Tensor:
    """[…, L] -> […, L, L]: exp(Σ logs from j + 1 to i) at [i, j], 0 where j > i.

    The sums are added up as they are: as differences of longer ones they would be inexact.
    """
    length = logs.shape[-1]
    from_each = logs.unsqueeze(-1).expand(*logs.shape, length).tril(-1)
    return from_each.cumsum(-2).exp().tril()
