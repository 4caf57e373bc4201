"""Which heads a rank's part of the channels belongs to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvmesh.workers.parallel.heads import of_pieces


@pytest.mark.parametrize(("num_heads", "kvp"), [(4, 1), (4, 2), (7, 2), (2, 4), (28, 8)])
@pytest.mark.parametrize("tp_rank", [0, 1])
def test_the_pieces_of_all_kvp_ranks_are_those_of_all_heads(
    num_heads: int, kvp: int, tp_rank: int
) -> None:
    """Of a share of the heads, whichever it is."""
    head_dim, numbers = 64, torch.arange(num_heads)
    channels: list[int] = []
    for kvp_rank in range(kvp):
        comm: Any = SimpleNamespace(kvp=kvp, kvp_rank=kvp_rank, rank=tp_rank * kvp + kvp_rank)
        pieces = of_pieces(numbers, head_dim, comm)
        width = num_heads * head_dim // kvp // len(pieces)
        channels += pieces.repeat_interleave(width).tolist()
    assert channels == numbers.repeat_interleave(head_dim).tolist()
