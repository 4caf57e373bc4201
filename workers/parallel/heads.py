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


def merge_over_ranks(
    out: Tensor, lse: Tensor, comm: Communicator, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every one of the kvp ranks calls it with the same shapes.

    out: [num_tokens, num_heads, head_dim]; lse: [num_tokens, num_heads] fp32, natural log; where
        this rank has no visible key 0 and -inf
    order: [num_tokens, kvp] int64, from `order_of_ranks`: a token's result has the same bits in any
        batch, and whichever rank has its first page. None for the ranks' own order
    Returns out and lse of the rank's part of the channels, in pieces that lie in one head each:
    [num_tokens, pieces, width] like out, and [num_tokens, pieces] fp32
    """
    num_tokens, num_heads, head_dim = out.shape
    pieces, width = pieces_of(num_heads, head_dim, comm.kvp)
    shape = (num_tokens, comm.kvp, pieces)
    each = lse.repeat_interleave(head_dim // width, dim=1)
    packed = torch.cat((out.reshape(*shape, width).float(), each.view(*shape, 1)), dim=-1)
    found = comm.exchange(packed.transpose(0, 1).contiguous())
    if order is not None:
        found = found.take_along_dim(order.T[..., None, None], dim=0)
    tokens = [found]
    if order is not None and not out.is_cuda:
        # Plain torch computes a number in another way where it is one of many; the kernel does not.
        tokens = [token.clone() for token in found.split(1, dim=1)]
    merged = [
        merge_states(token[..., :width].contiguous(), token[..., width].contiguous())
        for token in tokens
    ]
    parts, totals = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*merged, strict=True))
    return parts.to(out.dtype), totals


def order_of_ranks(firsts: Tensor, counts: Tensor, num_tokens: int, comm: Communicator) -> Tensor:
    """The ranks in the order of the first pages that they have of a token's sequence.

    firsts: [num_seqs], the first page of each sequence that is on this rank
    counts: [num_seqs], tokens of each; num_tokens: their sum
    Returns [num_tokens, kvp] int64
    """
    first_rank = (comm.kvp_rank - firsts.long()) % comm.kvp
    first_rank = first_rank.repeat_interleave(counts, output_size=num_tokens)
    ranks = torch.arange(comm.kvp, device=firsts.device)
    return (first_rank[:, None] + ranks) % comm.kvp


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
