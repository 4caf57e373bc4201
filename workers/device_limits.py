"""How many sequences and tokens a step may have by default, by the device. Torch-free.

A CPU is busy with a few sequences, and a longer chunk of a prompt only delays them. A GPU reads its
weights once for all sequences of a step, so it is given as many as its memory can hold the pages
and activations of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """max_num_seqs: sequences that run at a time; max_num_batched_tokens: tokens of a step
    cuda_graphs: whether decode steps run from CUDA graphs"""

    max_num_seqs: int
    max_num_batched_tokens: int
    cuda_graphs: bool


CPU_LIMITS: Final = DeviceLimits(16, 512, cuda_graphs=False)
# For devices with at least this much memory; "80 GB" is 79 or 74.5 GiB, as it is counted.
_GPU_LIMITS: Final = (
    (70 * GIB, DeviceLimits(256, 8192, cuda_graphs=True)),
    (36 * GIB, DeviceLimits(256, 4096, cuda_graphs=True)),
    (20 * GIB, DeviceLimits(128, 2048, cuda_graphs=True)),
    (0, DeviceLimits(64, 1024, cuda_graphs=True)),
)


def device_limits(device: str, memory_bytes: int) -> DeviceLimits:
    """device: cpu or cuda; memory_bytes: all that a GPU has, of no matter for a CPU"""
    if device == "cpu":
        return CPU_LIMITS
    return next(limits for at_least, limits in _GPU_LIMITS if memory_bytes >= at_least)
