"""The public operator `write_hot`."""

from __future__ import annotations

import torch

from kvmesh.kernels import gpu
from kvmesh.kernels.write import reference


def write_hot(
    k: torch.Tensor,
    v: torch.Tensor,
    hot: torch.Tensor,
    slots: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Write the keys and values of new tokens into hot pages, in place.

    k, v: [num_tokens, num_kv_heads, head_dim] of the compute dtype
    hot: [num_hot_pages, 2, num_kv_heads, page_size, head_dim] of the compute dtype; or with a
        second dimension of 1, where values are in keys, and v is not looked at
    slots: [num_tokens] int64, hot page id * page_size + offset; a negative slot
        is padding and is skipped
    backend: None picks the kernels on GPUs and plain torch elsewhere
    """
    if k.dim() != 3 or hot.dim() != 5 or (k.shape != v.shape and hot.shape[1] != 1):
        raise ValueError(
            "k, v: expected equal shapes [num_tokens, num_kv_heads, head_dim], "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if hot.shape[2] != k.shape[1] or hot.shape[4] != k.shape[2] or hot.shape[1] not in (1, 2):
        raise ValueError(
            "hot: expected [num_hot_pages, 2, num_kv_heads, page_size, head_dim] for "
            f"k {tuple(k.shape)}, got {tuple(hot.shape)}"
        )
    if slots.shape != k.shape[:1]:
        raise ValueError(f"slots: expected [{k.shape[0]}], got {tuple(slots.shape)}")
    if gpu.picks_kernel(k, backend):
        from kvmesh.kernels.write import triton_write

        triton_write.write_hot(k, v, hot, slots)
    else:
        reference.write_hot(k, v, hot, slots)
