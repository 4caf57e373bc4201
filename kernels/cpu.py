"""What the operators ask about tensors on a CPU."""

from __future__ import annotations

import importlib.util

import torch

_HAS_NUMBA = importlib.util.find_spec("numba") is not None


def has_loops(x: torch.Tensor) -> bool:
    """Whether there are compiled loops for tensors like x: fp32 on CPUs, without gradients."""
    on_cpu = x.device.type == "cpu" and not x.requires_grad
    return _HAS_NUMBA and on_cpu and x.dtype == torch.float32
