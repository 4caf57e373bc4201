"""The gated activation of an expert, between its two products."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class GatedUnit:
    """gate · sigmoid(alpha · gate) · (up + shift)

    limit: gate is clamped to (-∞, limit] and up to [-limit, limit] first; None for no clamp

    With alpha 1, shift 0 and no limit it is SwiGLU (Shazeer, arXiv 2002.05202); GPT-OSS has
    alpha 1.702, shift 1 and limit 7.
    """

    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """gate, up: of equal shape -> like them"""
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
        if self.alpha == 1.0:
            gate = torch.nn.functional.silu(gate)
        else:
            gate = gate * torch.sigmoid(gate * self.alpha)
        return gate * (up + self.shift) if self.shift else gate * up


SWIGLU = GatedUnit()
