"""Plain-torch codec of `NonUniform`: KVQuant (Hooper et al., arXiv 2401.18079), page by page.

    keys     | codes (packing.py) | outliers | their channels | position, int32 |
    values   | codes (packing.py) | outliers | their channels | scales | offsets |

with n = `side.outliers(head_dim)` outliers a token, [page_size, n] bf16 and then
[page_size, n] of a byte; a scale a token in e5m3 (scales.py) and an offset in int8, in
64ths of the scale.

    t = (x - zero) / scale,  code = the interval of `bounds` that t lies in,
    x^ = levels[code] * scale + zero

Keys are turned back by RoPE's angle before and forth after, since a channel's numbers
keep to their range only without it. Scale and zero of their channels bring what lies
between two percentiles to [-1, 1]. A page holds the position of its first token, so
that reading needs to know nothing else. The factor that YaRN gives the turned channels
is left in: it commutes with turning.

Values have their scale and zero from what a token's outliers leave, whose range
they bring to [-1, 1].

`bounds` lie half-way between the levels that k-means found; `levels` are those after
Q-Norm (see workers/calibration). A token's outliers are the n numbers that its codes
would miss by most (keys), or that lie farthest from the token's mean (values).
They replace what the codes say.

params
    levels [2^width], bounds [2^width - 1] fp32
    keys: scale, zero [num_kv_heads, head_dim], inv_freq [planes] fp32, interleaved [1] uint8
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvmesh.kernels.formats.base import Params, SideTile
from kvmesh.kernels.formats.nuq.side import POSITION_BYTES, SCALE_BYTES, VALUE_BYTES, NonUniform
from kvmesh.kernels.formats.packing import by_token, pack, packed_bytes, unpack
from kvmesh.kernels.formats.scales import load_scale, rounded_scale, store_scale
from kvmesh.kernels.formats.tiles import BF16_MAX, DenseTile

# Turning a plane of two such numbers stays finite, with room for the level beside them.
GREATEST = 0.25 * BF16_MAX
OFFSET_STEPS = 64.0


def encode(
    side: NonUniform, x: torch.Tensor, params: Params, positions: torch.Tensor | None
) -> torch.Tensor:
    x = x.float()
    if side.values:
        return _encode_values(side, x.clamp(-GREATEST, GREATEST), params)
    assert positions is not None, "KVFormat.encode and seal_pages see to it"
    turn = _Turn.of(params, x.shape[-2])
    page_phase = _phase(params, positions).unflatten(-2, (-1, 1, 1))
    x = turn.by(turn.by(x, turn.tokens.conj()), page_phase.conj()).clamp_(-GREATEST, GREATEST)
    scale, zero = params["scale"].unsqueeze(1), params["zero"].unsqueeze(1)
    codes = _codes(x.sub(zero).div_(scale), params)
    missed = params["levels"][codes].mul_(scale).add_(zero).sub_(x).abs_()
    apart = missed.topk(side.outliers(x.shape[-1]), dim=-1).indices
    stored = positions.to(torch.int32).view(-1, 1, 1).expand(-1, x.shape[1], 1).contiguous()
    return torch.cat(
        (
            pack(codes.to(torch.uint8), side.width, values=False),
            *_outliers(x, apart),
            stored.view(torch.uint8),
        ),
        dim=-1,
    )


def _encode_values(side: NonUniform, x: torch.Tensor, params: Params) -> torch.Tensor:
    mean = x.mul(1.0 / x.shape[-1]).sum(-1, keepdim=True)
    apart = (x - mean).abs_().topk(side.outliers(x.shape[-1]), dim=-1).indices
    rest = x.scatter(-1, apart, mean.expand_as(apart))
    low, high = rest.amin(-1), rest.amax(-1)
    middle = low.add(high).mul_(0.5)
    # Wide enough for the offset to be at most twice the scale.
    scale = torch.maximum(high.sub(low), middle.abs()).mul_(0.5)
    scale = rounded_scale(scale, "e5m3")
    offset = middle.div(scale).mul_(OFFSET_STEPS).round_().clamp_(-128.0, 127.0)
    zero = offset.mul(scale * (1.0 / OFFSET_STEPS))
    codes = _codes(x.sub(zero[..., None]).div_(scale[..., None]), params)
    return torch.cat(
        (
            pack(codes.to(torch.uint8), side.width, values=True),
            *_outliers(x, apart),
            store_scale(scale, "e5m3"),
            offset.to(torch.int8).view(torch.uint8),
        ),
        dim=-1,
    )


def load(
    side: NonUniform,
    pages: torch.Tensor,
    rows: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    params: Params,
) -> SideTile:
    if side.values:
        return DenseTile(_values(side, pages, page_size, head_dim, params).view(rows, -1, head_dim))
    heads = params["scale"].shape[0]
    by_head = pages.view(rows // heads, heads, -1, pages.shape[-1])
    x = _keys_before_rope(side, by_head, page_size, head_dim, params)
    turn = _Turn.of(params, page_size)
    x = turn.by(x, turn.tokens).view(rows, -1, page_size, head_dim)
    # A page's position is the same for all heads.
    phase = _phase(params, _positions(by_head[:, 0])).repeat_interleave(heads, 0)
    return _TurnedKeys(x, phase, turn)


def decode(
    side: NonUniform,
    pages: torch.Tensor,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    params: Params,
) -> torch.Tensor:
    if side.values:
        return _values(side, pages, page_size, head_dim, params)
    x = _keys_before_rope(side, pages.unsqueeze(2), page_size, head_dim, params).squeeze(2)
    turn = _Turn.of(params, page_size)
    return turn.by(turn.by(x, turn.tokens), _phase(params, _positions(pages)).unsqueeze(-2))


def _keys_before_rope(
    side: NonUniform, pages: torch.Tensor, page_size: int, head_dim: int, params: Params
) -> torch.Tensor:
    """pages [n, num_kv_heads, p, num_bytes] -> [n, num_kv_heads, p, page_size, head_dim]"""
    codes = unpack(pages, side.width, page_size, head_dim, values=False)
    scale, zero = (params[name][:, None, None, :] for name in ("scale", "zero"))
    x = params["levels"][codes.int()].mul_(scale).add_(zero)
    return _with_outliers(side, x, pages)


def _values(
    side: NonUniform, pages: torch.Tensor, page_size: int, head_dim: int, params: Params
) -> torch.Tensor:
    table = unpack(pages, side.width, page_size, head_dim, values=True)
    x = params["levels"][by_token(table, values=True).int().contiguous()]
    start = pages.shape[-1] - 2 * page_size
    scale = load_scale(pages[..., start : start + SCALE_BYTES * page_size], "e5m3")
    offset = pages[..., start + SCALE_BYTES * page_size :].contiguous().view(torch.int8)
    zero = offset.float().mul_(scale * (1.0 / OFFSET_STEPS))
    return _with_outliers(side, x.mul_(scale[..., None]).add_(zero[..., None]), pages)


def _codes(t: torch.Tensor, params: Params) -> torch.Tensor:
    return torch.bucketize(t.contiguous(), params["bounds"])


def _outliers(x: torch.Tensor, apart: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of x in the channels `apart`, and those channels, as bytes."""
    kept = x.gather(-1, apart).to(torch.bfloat16).flatten(-2)
    return kept.view(torch.uint8), apart.to(torch.uint8).flatten(-2)


def _with_outliers(side: NonUniform, x: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    page_size, head_dim = x.shape[-2:]
    count = side.outliers(head_dim)
    start = packed_bytes(side.width, page_size, head_dim)
    middle = start + page_size * count * VALUE_BYTES
    kept = pages[..., start:middle].contiguous().view(torch.bfloat16).float()
    channels = pages[..., middle : middle + page_size * count].long()
    shape = (page_size, count)
    return x.scatter_(-1, channels.unflatten(-1, shape), kept.unflatten(-1, shape))


def _positions(pages: torch.Tensor) -> torch.Tensor:
    """[..., num_bytes] -> [...] int32"""
    return pages[..., -POSITION_BYTES:].contiguous().view(torch.int32).squeeze(-1)


def _phase(params: Params, positions: torch.Tensor) -> torch.Tensor:
    """e^(i angle) of positions [...] -> [..., planes] complex64.

    The angles are computed in fp64: at a million tokens fp32 is off by some hundredths.
    """
    angle = positions.double().unsqueeze(-1) * params["inv_freq"].double()
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


@dataclass(frozen=True, slots=True)
class _Turn:
    """RoPE on channels in pairs.

    tokens: [page_size, planes] complex64, the phases of a page's tokens against its first
    """

    tokens: torch.Tensor
    interleaved: bool

    @classmethod
    def of(cls, params: Params, page_size: int) -> _Turn:
        offsets = torch.arange(page_size, device=params["inv_freq"].device)
        return cls(_phase(params, offsets), bool(params["interleaved"].item()))

    def by(self, x: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        """x [..., head_dim] fp32, phase [..., planes], broadcast -> like x, turned"""
        planes = phase.shape[-1]
        out = x.clone()
        if self.interleaved:
            first, second = slice(0, 2 * planes, 2), slice(1, 2 * planes, 2)
        else:
            first, second = slice(0, planes), slice(planes, 2 * planes)
        cos, sin = phase.real, phase.imag
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out


@dataclass(frozen=True, slots=True)
class _TurnedKeys:
    """Keys turned by their places in their pages; what the pages' positions add, queries
    are turned back by, which are far fewer.

    x: [rows, pages, page_size, head_dim] fp32; phase: [rows, pages, planes]
    """

    x: torch.Tensor
    phase: torch.Tensor
    turn: _Turn

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        rows, pages, page_size, head_dim = self.x.shape
        phase = self.phase.conj().unsqueeze(2)
        turned = self.turn.by(q.unsqueeze(1).expand(-1, pages, -1, -1), phase)
        products = torch.bmm(
            turned.view(rows * pages, -1, head_dim),
            self.x.view(rows * pages, page_size, head_dim).mT,
        )
        return products.view(rows, pages, -1, page_size).transpose(1, 2).flatten(2)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weights, self.dense())

    def dense(self) -> torch.Tensor:
        return self.turn.by(self.x, self.phase.unsqueeze(2)).flatten(1, 2)
