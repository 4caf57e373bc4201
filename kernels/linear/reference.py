"""Plain torch: the definition of `linear`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kvmesh.kernels.linear.packed import PackedWeight, unpack


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    return F.linear(x, unpack(weight))
