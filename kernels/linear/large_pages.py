"""Weights next to each other in large pages of memory."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from contextlib import suppress

import torch

from kvmesh.kernels.linear.packed import PackedWeight

_ALIGNMENT = 64


def move_to_large_pages(weights: Iterable[PackedWeight]) -> None:
    """Move the weights to one region, in their order, in pages of 2 MiB if the system has them.

    A decode step reads every weight once, and in pages of 4 KiB looks up where each of them is.
    Addresses of weights that were taken before are no longer theirs.
    """
    unique = {id(weight): weight for weight in weights}.values()
    moving = [
        (weight, name)
        for weight in unique
        for name in ("codes", "scales")
        if getattr(weight, name) is not None and weight.device.type == "cpu"
    ]
    num_bytes = sum(_aligned(getattr(weight, name).nbytes) for weight, name in moving)
    if not num_bytes:
        return
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of a system that was built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    region, start = torch.frombuffer(memory, dtype=torch.uint8), 0
    for weight, name in moving:
        tensor = getattr(weight, name)
        place = region[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        # Frozen for everybody else: all who have this weight have it moved.
        object.__setattr__(weight, name, place.copy_(tensor))
        start += _aligned(tensor.nbytes)
    del tensor
    # What held the weights before is otherwise kept by glibc; other C libraries have no such call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
