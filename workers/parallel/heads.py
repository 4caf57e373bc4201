"""Attention over all pages of a sequence, from what each rank has computed over its own.

The kvp ranks of a share of the heads have each attended from all query rows of these heads to
their own pages. One exchange gives each of them a part of the channels from all, which it merges:

            channels of the heads
    rank 0  | a0 | b0 | c0 |            rank 0   merge(a0, a1, a2)
    rank 1  | a1 | b1 | c1 |     ──►    rank 1   merge(b0, b1, b2)
    rank 2  | a2 | b2 | c2 |            rank 2   merge(c0, c1, c2)

Keys and values do not move, and a part may end within a head: with 28 heads, 8 ranks have three
and a half each. These parts are what the columns of the output projection expect.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvmesh.kernels.merge import merge_states
from kvmesh.workers.parallel.comm import Communicator


def merge_over_ranks(out: Tensor, lse: Tensor, comm: Communicator) -> tuple[Tensor, Tensor]:
    """Every one of the kvp ranks calls it with the same shapes.

    out: [num_tokens, num_heads, head_dim]; lse: [num_tokens, num_heads] fp32, natural log; where
        this rank has no visible key 0 and -inf
    Returns out and lse of the rank's part of the channels, in pieces that lie in one head each:
    [num_tokens, pieces, width] like out, and [num_tokens, pieces] fp32
    """
    num_tokens, num_heads, head_dim = out.shape
    pieces, width = pieces_of(num_heads, head_dim, comm.kvp)
    shape = (num_tokens, comm.kvp, pieces)
    each = lse.repeat_interleave(head_dim // width, dim=1)
    packed = torch.cat((out.reshape(*shape, width).float(), each.view(*shape, 1)), dim=-1)
    found = comm.exchange(packed.transpose(0, 1).contiguous())
    merged, total = merge_states(found[..., :width].contiguous(), found[..., width].contiguous())
    return merged.to(out.dtype), total


def pieces_of(num_heads: int, head_dim: int, kvp: int) -> tuple[int, int]:
    """Number and width of the pieces of a rank's part of the channels."""
    channels = num_heads * head_dim // kvp
    width = math.gcd(head_dim, channels)
    return channels // width, width


def of_pieces(per_head: Tensor, head_dim: int, comm: Communicator) -> Tensor:
    """Numbers of heads, [num_heads], for the pieces of this rank's part, [pieces]."""
    pieces, width = pieces_of(per_head.shape[0], head_dim, comm.kvp)
    every = per_head.repeat_interleave(head_dim // width)
    return every[comm.kvp_rank * pieces : (comm.kvp_rank + 1) * pieces]
