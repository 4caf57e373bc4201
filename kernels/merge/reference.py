"""`merge_states` in plain torch; the same signature as the public operator."""

from __future__ import annotations

import torch


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lses = lses.float()
    top = lses.amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    # Weights relative to the largest and divided by their own sum, not e^(lse_i - lse):
    # the rounding error of a large lse would scale the output.
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    # A part without keys may hold anything, including NaN, and 0 * NaN is NaN.
    parts = outs.float().masked_fill((weights == 0.0).unsqueeze(-1), 0.0)
    out = (parts * weights.unsqueeze(-1)).sum(0) / total.clamp_min(1e-37).unsqueeze(-1)
    return out.to(outs.dtype), top + total.log()
