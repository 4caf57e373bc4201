"""The public operator `merge_states`."""

from __future__ import annotations

from collections.abc import Callable

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
    return _implementation(outs, backend)(outs, lses)


def _implementation(
    outs: torch.Tensor, backend: str | None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    if backend is None:
        backend = "triton" if gpu.runs_kernels(outs) else "reference"
    if backend == "reference":
        return reference.merge_states
    if backend == "triton":
        from kvmesh.kernels.merge import triton_merge

        return triton_merge.merge_states
    raise ValueError(f"backend: expected None, 'triton' or 'reference', got {backend!r}")
