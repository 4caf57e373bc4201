"""What the launchers ask about the GPU that holds a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

Capability = tuple[int, int]

# Attention over latents takes 68 KiB of shared memory; a processor had 64 before.
LATENTS_FROM: Capability = (8, 0)


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """capability: of its multiprocessors, None for Triton's interpreter, which supports everything
    processors: number of multiprocessors
    """

    capability: Capability | None
    processors: int


INTERPRETER = GpuDevice(None, 8)


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether operators on this tensor pick the Triton kernels by themselves."""
    return x.is_cuda


def picks_kernel(x: torch.Tensor, backend: str | None) -> bool:
    """Whether an operator runs its Triton kernel: `backend` is "triton", or None on a GPU.

    Raises ValueError for another backend than those and "reference".
    """
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend: expected None, 'triton' or 'reference', got {backend!r}")
    return runs_kernels(x) if backend is None else backend == "triton"


def copied(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device, without waiting until it is there."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def gpu_of(x: torch.Tensor) -> GpuDevice:
    """The GPU for which kernels on this tensor are compiled. Triton's driver knows it."""
    return _gpu_of(x.device.index or 0)


@cache
def _gpu_of(device: int) -> GpuDevice:
    import triton
    from triton.runtime.driver import driver

    if triton.knobs.runtime.interpret:
        return INTERPRETER
    arch = int(driver.active.get_current_target().arch)
    properties = driver.active.utils.get_device_properties(device)
    return GpuDevice((arch // 10, arch % 10), int(properties["multiprocessor_count"]))
