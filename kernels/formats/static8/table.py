"""The parameters of `Static8` as compiled kernels read them.

for each head  | scale [head_dim] | zero [head_dim] |
"""

from __future__ import annotations

import torch

from kvmesh.kernels.formats.base import Params
from kvmesh.kernels.formats.static8.side import Static8


def table(side: Static8, params: Params, page_size: int) -> torch.Tensor:
    return torch.stack((params["scale"], params["zero"]), dim=1).float().flatten()
