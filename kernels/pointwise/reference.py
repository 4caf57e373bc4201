"""The operators in plain torch; the same signatures as the public ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvmesh.kernels.write.reference import write_hot


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    return rms_norm(residual.add_(x), weight, eps)


def silu_mul(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    hot: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    write_hot(rotate(k, cos, sin), v, hot, slots)
    return rotate(q, cos, sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE whose pairs are the two halves of the first D channels of a head.

    x: [T, H, ≥ D]; cos, sin: [T, D], with two equal halves
    """
    dim = cos.shape[-1]
    half = dim // 2
    cos, sin = cos.unsqueeze(1), sin[:, :half].unsqueeze(1)
    wide = x[..., :dim].to(cos.dtype)  # OLMo rotates in float32 for any dtype of the weights
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin, value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin)
    out = out.to(x.dtype)
    return out if dim == x.shape[-1] else torch.cat((out, x[..., dim:]), dim=-1)
