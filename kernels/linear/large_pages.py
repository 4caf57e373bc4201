"""Weights next to each other in large pages of memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

from kvmesh.kernels.linear.packed import PackedWeight

_ALIGNMENT = 64


def move_to_large_pages(weights: Iterable[PackedWeight]) -> None:
    """Move the weights to one region, in their order, in pages of 2 MiB if the system has them.

    A decode step reads every weight once; in pages of 4 KiB each of them is looked up anew. Whoever
    has taken an address of a weight before must do so again.
    """
    unique = {id(weight): weight for weight in weights}.values()
    tensors = [(w, n, getattr(w, n)) for w in unique for n in ("codes", "scales")]
    moved = [(w, n, t) for w, n, t in tensors if t is not None and t.device.type == "cpu"]
    num_bytes = sum(_aligned(tensor.nbytes) for *_, tensor in moved)
    if not num_bytes:
        return
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    region = torch.frombuffer(memory, dtype=torch.uint8)
    start = 0
    del tensors
    while moved:
        weight, name, tensor = moved.pop(0)
        place = region[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        object.__setattr__(weight, name, place.copy_(tensor))
        start += _aligned(tensor.nbytes)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
