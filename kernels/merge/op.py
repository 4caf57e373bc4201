"""The public operators `merge_states` and `merge_sinks`."""

from __future__ import annotations

import torch

from kvmesh.kernels import gpu
from kvmesh.kernels.merge import reference


def merge_states(
    outs: torch.Tensor, lses: torch.Tensor, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over disjoint sets of keys into attention over their union.

    outs: [num_parts, num_tokens, num_heads, head_dim], each part's normalised output
    lses: [num_parts, num_tokens, num_heads] fp32, natural log; -inf if a part had no
        visible key (its output is then ignored, whatever it holds)
    backend: None picks the kernel on GPUs and plain torch elsewhere
    Returns out: [num_tokens, num_heads, head_dim] like outs; lse: [num_tokens,
    num_heads] fp32. Where no part had a visible key, out is 0 and lse -inf.
    Source: the split-softmax of FlashDecoding, (Σ e^(lse_i - lse) out_i, log Σ e^lse_i).
    """
    if outs.dim() != 4 or outs.shape[0] == 0 or lses.shape != outs.shape[:3]:
        raise ValueError(
            "outs, lses: expected [num_parts, num_tokens, num_heads, head_dim] and its first "
            f"three dimensions, got {tuple(outs.shape)} and {tuple(lses.shape)}"
        )
    if gpu.picks_kernel(outs, backend):
        from kvmesh.kernels.merge import triton_merge

        return triton_merge.merge_states(outs, lses)
    return reference.merge_states(outs, lses)


def merge_sinks(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries that also see a sink: a score without a key, whose value is 0.

    out: [num_tokens, num_heads, head_dim]; lse: [num_tokens, num_heads] fp32, natural log
    sinks: [num_heads], each head's score
    Returns out and lse like those given. It is `merge_states` with one more part, of output 0
    and lse `sinks`; so the weights of the keys are multiplied by σ(lse - sink).
    """
    if sinks.shape != lse.shape[1:] or lse.shape != out.shape[:2]:
        raise ValueError(
            "out, lse, sinks: expected [num_tokens, num_heads, head_dim] and its dimensions, "
            f"got {tuple(out.shape)}, {tuple(lse.shape)} and {tuple(sinks.shape)}"
        )
    # -inf for both would give NaN; NaN of lse, which is a fault, stays.
    sinks = sinks.float().clamp_min(-1e30)
    share = torch.sigmoid(lse - sinks).unsqueeze(-1)
    return (out.float() * share).to(out.dtype), torch.logaddexp(lse, sinks.expand_as(lse))
