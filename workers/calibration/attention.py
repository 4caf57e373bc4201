"""Exact, differentiable causal attention within one window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmesh.workers.model.hook import AttendArgs


def causal_attention(q: Tensor, k: Tensor, v: Tensor, args: AttendArgs) -> Tensor:
    """q [T, num_heads, head_dim], k and v [T, num_kv_heads, head_dim] -> like q."""
    group = q.shape[1] // k.shape[1]
    queries = q.transpose(0, 1)
    keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    window = args.sliding_window
    plain = args.softcap is None and args.sinks is None
    if plain and (window is None or abs(window) >= len(q)):
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=args.scale
        )
        return out.transpose(0, 1)
    scores = torch.matmul(queries.float(), keys.float().mT) * args.scale
    if args.softcap is not None:
        scores = torch.tanh(scores / args.softcap) * args.softcap
    at = torch.arange(len(q), device=q.device)
    unseen = at[None, :] > at[:, None]
    if window is not None and window > 0:
        unseen |= at[None, :] <= at[:, None] - window
    elif window is not None:  # chunks of -window tokens
        unseen |= at[None, :] // -window != at[:, None] // -window
    scores = scores.masked_fill(unseen, float("-inf"))
    if args.sinks is not None:  # their values are 0
        sinks = args.sinks.float()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1)[..., : len(q)]
    return torch.matmul(weights, values.float()).to(q.dtype).transpose(0, 1)
