"""A linear recurrence over time, without a loop over it."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_scan(keep: Tensor, added: Tensor, before: Tensor) -> Tensor:
    """h_t = keep_t · h_{t−1} + added_t, in log2(T) passes (Hillis and Steele, 1986).

    added: [n, T, …] fp32; keep: like it, or with dimensions of 1; before: [n, …], h_{−1}
    Returns like added.
    """
    first = added[:, :1] + keep[:, :1] * before[:, None]
    found = torch.cat((first, added[:, 1:]), dim=1)
    step = 1
    while step < found.shape[1]:
        later = found[:, step:] + keep[:, step:] * found[:, :-step]
        found = torch.cat((found[:, :step], later), dim=1)
        keep = torch.cat((keep[:, :step], keep[:, step:] * keep[:, :-step]), dim=1)
        step *= 2
    return found
