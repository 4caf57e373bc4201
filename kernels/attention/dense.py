"""Attention over plain keys that every query sees, by the fastest operator that is installed.

Which one is decided once per shape of heads: the first that runs on the device and agrees with
plain torch, in its output and in its lse. cuDNN's is not among them: it prepares itself again
for every number of queries and of keys, while requests wait.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

logger = logging.getLogger(__name__)

# Of the output and of the lse, for numbers around 1. bf16 has 8 bits; an lse to base 2 is off by
# more than 2.
TOLERANCE = 0.02

# (q [n, num_heads, head_dim], k and v [num_kv_heads, m, head_dim], scale) -> out like q,
# lse [n, num_heads] fp32, natural log
Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]
]


@dataclass(frozen=True, slots=True)
class DenseAttention:
    """An operator and its name, as users read it."""

    name: str
    attend: Attend


@cache
def dense_attention(
    device: torch.device, dtype: torch.dtype, group: int, head_dim: int
) -> DenseAttention | None:
    """The operator to use; None if there is none for these numbers and heads.

    group: query heads per KV head
    """
    for found in _installed(device):
        try:
            error = _error(found.attend, device, dtype, group, head_dim)
        except (RuntimeError, ValueError, TypeError, ImportError) as reason:
            logger.warning("%s does not attend to %s keys here: %s", found.name, dtype, reason)
            continue
        if error <= TOLERANCE:
            return found
        logger.warning("%s is off by %.3g, so it is not used", found.name, error)
    return None


def _installed(device: torch.device) -> Iterator[DenseAttention]:
    if device.type == "cpu":
        yield DenseAttention("torch", _torch_on_cpu)
        return
    if importlib.util.find_spec("flashinfer") is not None:
        yield DenseAttention("flashinfer", _flashinfer)
    yield DenseAttention("torch", _torch_flash)


def _torch_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention 2 as torch has it, which lets several query heads read one KV head."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q.transpose(0, 1)[None], k[None], v[None], scale=scale
    )
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _torch_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    group = q.shape[1] // k.shape[0]
    heads = (-1, group, -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.unflatten(1, (-1, group)).permute(1, 2, 0, 3),
        k.unsqueeze(1).expand(heads),
        v.unsqueeze(1).expand(heads),
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


def _flashinfer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from flashinfer import single_prefill_with_kv_cache

    out, lse = single_prefill_with_kv_cache(
        q, k, v, causal=False, kv_layout="HND", sm_scale=scale, return_lse=True
    )
    return out, lse * math.log(2.0)  # to base 2 there


def _error(
    attend: Attend, device: torch.device, dtype: torch.dtype, group: int, head_dim: int
) -> float:
    """The largest difference from plain torch in fp64, of the output or the lse."""
    generator = torch.Generator().manual_seed(0)
    heads = 2

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    q = numbers(130, heads * group, head_dim)
    k, v = (numbers(heads, 200, head_dim) for _ in range(2))
    scale = head_dim**-0.5
    out, lse = attend(q, k, v, scale)
    keys, values = (x.double().repeat_interleave(group, 0) for x in (k, v))
    scores = torch.einsum("nhd,hmd->nhm", q.double(), keys) * scale
    want = torch.einsum("nhm,hmd->nhd", scores.softmax(-1), values)
    wrong = (out.double() - want).abs().max(), (lse.double() - scores.logsumexp(-1)).abs().max()
    return max(float(x) for x in wrong)
