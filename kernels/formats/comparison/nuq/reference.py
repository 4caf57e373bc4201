"""Plain-torch codec of `NonUniform`: KVQuant (Hooper et al., arXiv 2401.18079), page by page.

    keys     | codes (packing.py) | outliers | their channels | position, int32 |
    values   | codes (packing.py) | outliers | their channels | scales | offsets |

with n = `side.outliers(head_dim)` outliers per token, [page_size, n] of bf16 and then
[page_size, n] of a byte; one scale per token in e5m3 (scales.py) and one offset in int8, in
64ths of the scale.

    t = (x - zero) / scale,  code = the interval of `bounds` that contains t,
    x^ = levels[code] * scale + zero

Keys are rotated back by RoPE's angle before encoding and forward after decoding, since only
without RoPE do a channel's numbers keep to their range. Scale and zero of their channels are
calibrated. A page holds the position of its first token, so that reading needs no other
information. YaRN's factor on the rotated channels is left in: it commutes with the rotation.

Values are coded from the range of a token's numbers without its outliers, scaled to [-1, 1].
Then scale and zero are chosen to make the values unbiased, as in EDEN (Vargaftik et al., 2022).

`bounds` are half-way between the levels that k-means found; for keys, `levels` are those
after Q-Norm (workers/calibration/nuq.py). A token's outliers are the n numbers with the largest
coding error, which for keys is weighted by how sensitive the model is to an error in that
channel. (KVQuant takes the largest numbers, but codes may represent those well.) Outliers
replace the coded numbers.

params
    levels [2^width], bounds [2^width - 1] fp32
    keys: scale, zero, importance [num_kv_heads, head_dim], inv_freq [planes] fp32,
        interleaved [1] uint8
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.kernels.formats.base import PageShape, Params
from kvmesh.kernels.formats.comparison.nuq.rope import RopePairs, phases
from kvmesh.kernels.formats.comparison.nuq.side import (
    POSITION_BYTES,
    SCALE_BYTES,
    VALUE_BYTES,
    NonUniform,
)
from kvmesh.kernels.formats.packing import pack, packed_bytes, unpack
from kvmesh.kernels.formats.scales import (
    BF16_MAX,
    E5M3_MAX,
    E5M3_MIN,
    load_scale,
    rounded_scale,
    store_scale,
)

# Rotating a pair of two such numbers stays finite, with room to add the level.
MAX_INPUT = 0.25 * BF16_MAX
OFFSET_STEPS = 64.0


def encode(side: NonUniform, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
    x = x.float().clamp(-MAX_INPUT, MAX_INPUT)
    if side.values:
        return _encode_values(side, x, params)
    assert positions is not None, "KVFormat.encode and seal_pages check this"
    rope = RopePairs(_interleaved(params))
    x = rope.rotate(x, _token_phases(params, x.shape[-2]).conj())
    page_phase = phases(params["inv_freq"], positions)[:, None, None, :]
    x = rope.rotate(x, page_phase.conj()).clamp_(-MAX_INPUT, MAX_INPUT)
    scale, zero = params["scale"].unsqueeze(1), params["zero"].unsqueeze(1)
    codes = _codes((x - zero).div_(scale), params)
    missed = _numbers(codes, params).mul_(scale).add_(zero).sub_(x).abs_()
    first = positions.to(torch.int32).view(-1, 1, 1).expand(-1, x.shape[1], 1).contiguous()
    return torch.cat(
        (
            pack(codes.to(torch.uint8), side.width, values=False),
            *_outliers(side, x, missed.mul_(params["importance"].unsqueeze(1))),
            first.view(torch.uint8),
        ),
        dim=-1,
    )


def _encode_values(side: NonUniform, x: Tensor, params: Params) -> Tensor:
    apart = _farthest(side, x)
    scale, zero = _ranges(x, apart)
    t = x.sub(zero[..., None]).div_(scale[..., None])
    codes = _codes(t, params)
    chosen = _numbers(codes, params)
    scale, offset = _stored(*_unbiased(t, apart, chosen, scale, zero))
    missed = chosen.mul_(scale[..., None]).add_(_zero(scale, offset)[..., None]).sub_(x).abs_()
    return torch.cat(
        (
            pack(codes.to(torch.uint8), side.width, values=True),
            *_outliers(side, x, missed),
            store_scale(scale, "e5m3"),
            offset.to(torch.int8).view(torch.uint8),
        ),
        dim=-1,
    )


def _farthest(side: NonUniform, x: Tensor) -> Tensor:
    """The n channels of each token that are farthest from its mean: [..., page_size, n] int64."""
    mean = x.mul(1.0 / x.shape[-1]).sum(-1, keepdim=True)
    return (x - mean).abs_().topk(side.outliers(x.shape[-1]), dim=-1).indices


def _ranges(x: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero that map a token's other channels to [-1, 1]: [..., page_size] each."""
    low = x.scatter(-1, apart, torch.inf).amin(-1)
    high = x.scatter(-1, apart, -torch.inf).amax(-1)
    zero = low.add(high).mul_(0.5)
    # Wide enough to keep the offset within twice the scale.
    scale = torch.maximum(high.sub(low).mul_(0.5), zero.abs().mul_(0.5))
    return scale.clamp_(E5M3_MIN, E5M3_MAX), zero


def _unbiased(
    t: Tensor,
    apart: Tensor,
    chosen: Tensor,
    scale: Tensor,
    zero: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scale and zero for the chosen levels that give <x, x^> = |x|² around the token's mean.

    t: the numbers in units of scale and zero; the channels in `apart` do not count
    """
    others = torch.ones_like(t).scatter_(-1, apart, 0.0)
    t = t.scatter(-1, apart, 0.0)
    count = float(t.shape[-1] - apart.shape[-1])
    mean = t.sum(-1, keepdim=True) / count
    mean_level = (chosen * others).sum(-1, keepdim=True) / count
    centred = (t - mean).mul_(others)
    slope = centred.square().sum(-1) / (centred * chosen).sum(-1).clamp_min(1e-9)
    scaled = scale * slope
    shifted = zero + scale * (mean.squeeze(-1) - slope * mean_level.squeeze(-1))
    # If all numbers are equal, or the result cannot be stored, the range will do.
    plausible = (slope > 0.5) & (slope < 2.0) & (shifted.abs() < 1.9 * scaled)
    return torch.where(plausible, scaled, scale), torch.where(plausible, shifted, zero)


def _stored(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The scale after storing and loading, and the offset in its steps."""
    scale = rounded_scale(scale, "e5m3")
    return scale, zero.div(scale).mul_(OFFSET_STEPS).round_().clamp_(-128.0, 127.0)


def _zero(scale: Tensor, offset: Tensor) -> Tensor:
    return offset * (scale * (1.0 / OFFSET_STEPS))


def decode(side: NonUniform, pages: Tensor, shape: PageShape, params: Params) -> Tensor:
    page_size, head_dim, _ = shape
    codes = unpack(pages, side.width, page_size, head_dim, values=side.values)
    if side.values:
        return _values(side, pages, _numbers(codes, params))
    scale, zero = (params[name].unsqueeze(1) for name in ("scale", "zero"))
    x = _with_outliers(side, _numbers(codes, params).mul_(scale).add_(zero), pages)
    rope = RopePairs(_interleaved(params))
    x = rope.rotate(x, _token_phases(params, page_size))
    return rope.rotate(x, phases(params["inv_freq"], _positions(pages)).unsqueeze(-2))


def _values(side: NonUniform, pages: Tensor, x: Tensor) -> Tensor:
    page_size = x.shape[-2]
    start = pages.shape[-1] - 2 * page_size
    scale = load_scale(pages[..., start : start + SCALE_BYTES * page_size], "e5m3")
    offset = pages[..., start + SCALE_BYTES * page_size :].contiguous().view(torch.int8).float()
    x = x.mul_(scale[..., None]).add_(_zero(scale, offset)[..., None])
    return _with_outliers(side, x, pages)


def _codes(t: Tensor, params: Params) -> Tensor:
    return torch.bucketize(t.contiguous(), params["bounds"])


def _numbers(codes: Tensor, params: Params) -> Tensor:
    # On CPUs five times as fast as levels[codes].
    return params["levels"].index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _outliers(side: NonUniform, x: Tensor, missed: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers with the largest coding errors, and their channels, as bytes."""
    apart = missed.topk(side.outliers(x.shape[-1]), dim=-1).indices
    kept = x.gather(-1, apart).to(torch.bfloat16).flatten(-2)
    return kept.view(torch.uint8), apart.to(torch.uint8).flatten(-2)


def _with_outliers(side: NonUniform, x: Tensor, pages: Tensor) -> Tensor:
    page_size, head_dim = x.shape[-2:]
    count = side.outliers(head_dim)
    start = packed_bytes(side.width, page_size, head_dim)
    middle = start + page_size * count * VALUE_BYTES
    kept = pages[..., start:middle].contiguous().view(torch.bfloat16).float()
    channels = pages[..., middle : middle + page_size * count].long()
    shape = (page_size, count)
    return x.scatter_(-1, channels.unflatten(-1, shape), kept.unflatten(-1, shape))


def _positions(pages: Tensor) -> Tensor:
    """[..., num_bytes] -> [...] int32"""
    return pages[..., -POSITION_BYTES:].contiguous().view(torch.int32).squeeze(-1)


def _interleaved(params: Params) -> bool:
    return bool(params["interleaved"].item())


def _token_phases(params: Params, page_size: int) -> Tensor:
    """Of a page's tokens relative to its first: [page_size, planes]."""
    inv_freq = params["inv_freq"]
    return phases(inv_freq, torch.arange(page_size, device=inv_freq.device))
