"""The public operator `merge_states`."""

from __future__ import annotations

import torch

from kvmesh.kernels.merge import reference


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over disjoint sets of keys into attention over their union.

    outs: [num_parts, num_tokens, num_heads, head_dim], each part's normalised output
    lses: [num_parts, num_tokens, num_heads] fp32, natural log; -inf where a part
        had no key to see (its output is then ignored, whatever it holds)
    Returns out: [num_tokens, num_heads, head_dim] like outs; lse: [num_tokens,
    num_heads] fp32. Where no part saw a key, out is 0 and lse -inf.
    Source: the split-softmax of FlashDecoding, (Σ e^(lse_i - lse) out_i, log Σ e^lse_i).
    """
    if outs.dim() != 4 or outs.shape[0] == 0 or lses.shape != outs.shape[:3]:
        raise ValueError(
            "outs, lses: expected [num_parts, num_tokens, num_heads, head_dim] and its first "
            f"three dimensions, got {tuple(outs.shape)} and {tuple(lses.shape)}"
        )
    return reference.merge_states(outs, lses)
