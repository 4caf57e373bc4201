"""Sums of small tensors between the GPUs of a host, in one launch without a library's protocol.

Every rank writes its part where all others can read it, waits for theirs, and sums all of them in
rank order, so that a sum has the same bits on every rank (torch's symmetric memory,
`one_shot_all_reduce`). Each rank reads all parts: NCCL moves less where parts are large.
"""

from __future__ import annotations

import logging
from typing import Self

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

# 32 rows of 4,096 numbers. With eight GPUs a rank reads eight times as much, 5 µs of an NVLink 4.
MAX_BYTES = 256 << 10
MAX_RANKS = 8
ALIGNMENT_BYTES = 16


class OneShotSums:
    """One rank's end. Make it with `try_to_meet`, on every rank of the process group."""

    def __init__(self, buffer: torch.Tensor, group_name: str) -> None:
        """buffer: [MAX_BYTES / 2] bf16, in memory that all ranks have mapped"""
        self._buffer = buffer
        self._group_name = group_name

    @classmethod
    def try_to_meet(cls, device: torch.device) -> Self | None:
        """None on every rank if one of them cannot map the others' memory, or sums wrongly."""
        rank, size = dist.get_rank(), dist.get_world_size()
        if size > MAX_RANKS:
            return None
        found = None
        try:
            found = cls._meet(device)
            # Whole numbers, which bf16 adds exactly.
            trial = torch.arange(64, device=device, dtype=torch.bfloat16) + rank
            want = size * torch.arange(64, device=device) + size * (size - 1) // 2
            found.all_reduce(trial)
            if not trial.equal(want.bfloat16()):
                raise RuntimeError(f"a sum over {size} ranks is {trial[0].item()}")
        except (RuntimeError, ImportError, AttributeError) as reason:
            logger.warning("no one-shot sums between GPUs, NCCL sums alone: %s", reason)
            found = None
        works = torch.tensor([found is not None], device=device, dtype=torch.int32)
        dist.all_reduce(works, dist.ReduceOp.MIN)
        return found if works.item() else None

    @classmethod
    def _meet(cls, device: torch.device) -> Self:
        from torch.distributed import _symmetric_memory as symmetric_memory

        assert dist.group.WORLD is not None, "the process group exists"
        name = dist.group.WORLD.group_name
        buffer = symmetric_memory.empty(MAX_BYTES // 2, dtype=torch.bfloat16, device=device)
        symmetric_memory.rendezvous(buffer, name)
        return cls(buffer, name)

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether it sums such tensors. The same on every rank, as shapes are."""
        return (
            tensor.dtype == self._buffer.dtype
            and 0 < tensor.nbytes <= MAX_BYTES
            and tensor.nbytes % ALIGNMENT_BYTES == 0
            and tensor.is_contiguous()
            and tensor.storage_offset() * tensor.itemsize % ALIGNMENT_BYTES == 0
        )

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks in place; `takes` says which tensors."""
        flat = tensor.view(-1)
        there = self._buffer[: flat.numel()]
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(there, flat, "sum", self._group_name, flat)
