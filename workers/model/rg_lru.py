"""RecurrentGemma's recurrent block: a linear recurrence, gated by its inputs.

    a = exp(−8 softplus(Λ) σ(W_a x)),   h ← a h + √(1 − a²) σ(W_x x) x

for each channel, after a short convolution, times another branch (De et al., Griffin, arXiv
2402.19427). At a sequence's first token the root is 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvmesh.workers.model.hook import AttendSlot
from kvmesh.workers.model.linear_scan import linear_scan
from kvmesh.workers.model.short_convolution import convolve

_SHARPNESS = 8.0


class GatedLinearRecurrence(nn.Module):
    """From hidden states to hidden states, with this rank's channels.

    layer: number among the layers with states
    """

    def __init__(self, source: Any, layer: int, slot: AttendSlot) -> None:
        super().__init__()
        self.linear_x, self.linear_y = source.linear_x, source.linear_y
        self.linear_out, self.act_fn = source.linear_out, source.act_fn
        self.conv_1d: nn.Conv1d = source.conv_1d
        self.rg_lru = source.rg_lru
        self._layer = layer
        self._slot = slot

    def forward(self, hidden_states: Tensor, **_kwargs: Any) -> tuple[Tensor, None]:
        """[1, T, hidden] -> ([1, T, hidden], None), as the decoder layer expects"""
        states, positions = self._slot.states, self._slot.positions
        assert states is not None, "a recurrent layer was called outside ServedModel.forward"
        assert positions is not None
        x = self.linear_x(hidden_states[0])
        tails, memories = states.read(self._layer)
        new_tails, new_memories = torch.empty_like(tails), torch.empty_like(memories)
        out = torch.empty_like(x)
        for part in states.parts:
            convolved, new_tails[part.seqs] = convolve(
                self.conv_1d, x[part.tokens], tails[part.seqs], part.length
            )
            keep, gated = self._gates(convolved, positions[part.tokens])
            by_seq = (-1, part.length, x.shape[-1])
            scanned = linear_scan(keep.view(by_seq), gated.view(by_seq), memories[part.seqs])
            new_memories[part.seqs] = scanned[:, -1]
            out[part.tokens] = scanned.flatten(0, 1).to(x.dtype)
        states.write(self._layer, new_tails, new_memories)
        y = self.act_fn(self.linear_y(hidden_states[0]))
        return self.linear_out(out * y).unsqueeze(0), None

    def _gates(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x: [n, channels] -> what is kept of the memory and what is added, both fp32"""
        gate = self.rg_lru
        heads = x.unflatten(-1, (-1, gate.block_width)).transpose(0, 1)

        def sigmoid_of(weight: Tensor, bias: Tensor) -> Tensor:
            product = torch.baddbmm(bias[:, None, :], heads, weight)
            return torch.sigmoid(product.transpose(0, 1).flatten(1))

        enter = sigmoid_of(gate.input_gate_weight, gate.input_gate_bias)
        leave = sigmoid_of(gate.recurrent_gate_weight, gate.recurrent_gate_bias)
        log_keep = -_SHARPNESS * leave * F.softplus(gate.recurrent_param)
        root = torch.sqrt(1 - torch.exp(2 * log_keep))
        root = torch.where((positions == 0)[:, None], torch.ones_like(root), root)
        return torch.exp(log_keep).float(), (x * enter * root.to(x.dtype)).float()
