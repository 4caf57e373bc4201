"""Token embeddings that are stored like the output projection that they are often shared with."""

from __future__ import annotations

from torch import Tensor, nn

from kvmesh.kernels.linear import PackedWeight, unpack


class PackedEmbedding(nn.Module):
    """weight: [vocab_size, hidden_size]"""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [...] int64 -> [..., hidden_size] fp32"""
        rows = unpack(self.weight.rows(ids.flatten()))
        return rows.view(*ids.shape, -1)
