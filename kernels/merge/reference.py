"""`merge_states` in plain torch; the same signature as the public operator."""

from __future__ import annotations

import torch


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lses = lses.float()
    lse = torch.logsumexp(lses, dim=0)
    weights = (lses - lse.masked_fill(lse == -torch.inf, 0.0)).exp_().unsqueeze(-1)
    # A part without keys may hold anything, NaN included, and 0 * NaN is NaN.
    parts = outs.float().masked_fill(weights == 0.0, 0.0)
    return (parts * weights).sum(0).to(outs.dtype), lse
