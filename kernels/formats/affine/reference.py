"""Plain-torch codec of `Affine`.

    side of a page   | codes (packing.py) | offsets | scales |    one of each per run, in order

    scale = (max - min) / (2^bits - 1),  code = round((x - offset) / scale)

A run is a token, or a channel; or a part of one (`comparison/grouped`): then runs of channels
come token by token, and runs of tokens one after the other, with all channels of each.

How scale and offset are fitted to a run:

range           from its minimum to its maximum: LMDeploy's online int8 and int4,
                KIVI (arXiv 2402.02750), Quanto
least_squares   the grid with the smallest squared error, by alternating between codes for
                the grid and the line through (code, number) (Lloyd's iteration on a
                uniform grid); starts from the range

Why offsets are bf16, and how "range" rounds. bf16 has fp32's range, so 1e38 needs no
special case, and the minimum of bf16 numbers is itself a bf16 number. The codes are
computed against the *stored* numbers, which "range" rounds outwards (minimum down,
scale up): the stored grid then covers the run, and no code saturates by more
than the rounding of one division. The cost is a step that is at most 2^-7 wider. For
fp32 runs far from zero the grid also has to reach down to the rounded minimum,
at most 2^-7 |min| away: half a step is then 2^-12 |min| with four bits, still finer
than bf16's own resolution. A lower bound on the scale keeps constant runs from
dividing by zero; their codes are 0 and they decode to the stored minimum.
Everything is computed on halves of the numbers, because max - min may overflow
fp32 where max and min do not; fits are computed in steps from the minimum, which
cannot overflow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvmesh.kernels.cpu import has_loops
from kvmesh.kernels.formats.affine.side import OFFSET_BYTES, Affine
from kvmesh.kernels.formats.base import PageShape, Params
from kvmesh.kernels.formats.packing import (
    pack,
    packed_bytes,
    unpack,
)
from kvmesh.kernels.formats.scales import (
    BF16_MAX,
    SCALE_FLOOR,
    load_scale,
    rounded_scale,
    store_scale,
)

SCALE_CEILING = 2.0**126
FIT_ROUNDS = 6
# Where least squares starts, as a share of the range: with few levels the best grid is narrower.
FIRST_SHARE = {2: 0.8, 3: 0.9}
_UPPER_HALF = -65536  # 0xFFFF0000 as int32: the bits of an fp32 number that bf16 keeps

Grid = tuple[Tensor, Tensor]  # offsets and scales, as stored


def encode(side: Affine, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
    return encode_on(fit_range if side.fit == "range" else _fit_least_squares, side, x)


def encode_on(fit: Callable[[Tensor, Affine], Grid], side: Affine, x: Tensor) -> Tensor:
    """fit: (half of the numbers [..., run], side) -> the grid of each run, [...]"""
    page_size, head_dim = x.shape[-2:]
    half = _to_runs(side, x.float() * 0.5)
    offset, scale = fit(half, side)
    # floor(t + 0.5) rather than round-half-even, so that all backends agree
    codes = half.sub_((offset * 0.5)[..., None]).div_((scale * 0.5)[..., None])
    codes = codes.add_(0.5).floor_().clamp_(0.0, 2.0**side.width - 1).to(torch.uint8)
    offsets = offset.to(torch.bfloat16).flatten(2).view(torch.uint8)
    scales = store_scale(scale.flatten(2), side.scale)
    packed = pack(_from_runs(side, codes, page_size, head_dim), side.width, values=side.values)
    return torch.cat((packed, offsets, scales), dim=-1)


def decode(side: Affine, pages: Tensor, shape: PageShape, params: Params) -> Tensor:
    page_size, head_dim, _ = shape
    start = packed_bytes(side.width, page_size, head_dim)
    middle = start + side.runs(page_size, head_dim) * OFFSET_BYTES
    codes = unpack(pages, side.width, page_size, head_dim, values=side.values).float()
    along_token, run = side.along == "token", side.run_length(page_size, head_dim)
    runs = codes.unflatten(-1 if along_token else -2, (-1, run))

    def halves(stored: Tensor, kind: str) -> Tensor:
        """Half of each run's number, to be broadcast over its codes."""
        numbers = load_scale(stored, kind) * 0.5
        if along_token:
            return numbers.unflatten(-1, (page_size, -1)).unsqueeze(-1)  # type: ignore[no-any-return]
        return numbers.unflatten(-1, (-1, head_dim)).unsqueeze(-2)  # type: ignore[no-any-return]

    # In halves, which are finite even for runs that span almost all of fp32's range.
    runs.mul_(halves(pages[..., middle:], side.scale))
    runs.add_(halves(pages[..., start:middle], "bf16"))
    return codes.clamp_(-0.5 * BF16_MAX, 0.5 * BF16_MAX).mul_(2.0)


def _to_runs(side: Affine, x: Tensor) -> Tensor:
    """[..., page_size, head_dim] -> [..., page_size, runs, run] along tokens, or
    [..., runs, head_dim, run] along channels; a copy or a view."""
    run = side.run_length(*x.shape[-2:])
    if side.along == "token":
        return x.unflatten(-1, (-1, run))  # type: ignore[no-any-return]
    return x.unflatten(-2, (-1, run)).transpose(-1, -2).contiguous()  # type: ignore[no-any-return]


def _from_runs(side: Affine, runs: Tensor, page_size: int, head_dim: int) -> Tensor:
    if side.along == "channel":
        runs = runs.transpose(-1, -2)
    return runs.reshape(*runs.shape[:-3], page_size, head_dim).contiguous()


def fit_range(half: Tensor, side: Affine) -> Grid:
    """half: half of the numbers, [..., run] -> offset, scale, [...], after storing and loading"""
    levels = 2.0**side.width - 1
    offset = _round_down_to_bf16(half.amin(-1) * 2.0)
    half_scale = (half.amax(-1) - offset * 0.5) / levels
    scale = _round_up_to_bf16((half_scale * 2.0).clamp_min(SCALE_FLOOR))
    return offset, rounded_scale(scale, side.scale)


def _fit_least_squares(half: Tensor, side: Affine) -> Grid:
    """With x in steps, t = a q + b + error: alternates between the codes q and the line a, b."""
    levels = 2.0**side.width - 1
    steps, mean, half_min, half_step = in_steps(half, levels)
    a, q_mean = _line(steps, mean, levels, FIRST_SHARE.get(side.width, 1.0))
    scale = stored_scale(half_step * a.squeeze(-1) * 2.0, side)
    # Refit the offset so that the line through the means holds with the stored scale.
    b = mean - (scale * 0.5 / half_step).unsqueeze(-1) * q_mean
    return stored_offset(half_min, half_step, b.squeeze(-1)), scale


def _line(
    steps: torch.Tensor, mean: torch.Tensor, levels: float, first_share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The line's slope a, and the mean of the codes: like `mean`, as in `in_steps`."""
    if has_loops(steps):
        from kvmesh.kernels.formats.affine.numba import line

        return line(steps, mean, levels, first_share, FIT_ROUNDS)
    a = torch.full_like(mean, first_share)
    b = (0.5 * levels) * (1.0 - a)
    for _ in range(FIT_ROUNDS):
        q = steps.sub(b).div_(a).add_(0.5).floor_().clamp_(0.0, levels)
        q_mean = q.mean(-1, keepdim=True)
        q.sub_(q_mean)
        spread = q.square().sum(-1, keepdim=True)
        # If all codes are equal, the run is constant up to rounding and any grid will do.
        slope = (q * (steps - mean)).sum(-1, keepdim=True) / spread.clamp_min(1e-9)
        a = torch.where(spread > 1e-9, slope.clamp_min(1e-3), a)
        b = mean - a * q_mean
    return a, q_mean


def in_steps(half: Tensor, levels: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The numbers in steps of the run's range above its minimum, from 0 to `levels`; their mean
    (with a last dimension of 1), and half the minimum and half a step."""
    half_min = half.amin(-1)
    half_step = ((half.amax(-1) - half_min) / levels).clamp_min(0.5 * SCALE_FLOOR)
    steps = (half - half_min[..., None]).div_(half_step[..., None])
    return steps, steps.mean(-1, keepdim=True), half_min, half_step


def stored_scale(scale: Tensor, side: Affine) -> Tensor:
    return rounded_scale(scale.clamp(SCALE_FLOOR, SCALE_CEILING), side.scale)


def stored_offset(half_min: Tensor, half_step: Tensor, steps: Tensor) -> Tensor:
    half = (half_min + half_step * steps).clamp(-0.5 * BF16_MAX, 0.5 * BF16_MAX)
    return (half * 2.0).to(torch.bfloat16).float()


def _round_up_to_bf16(x: Tensor) -> Tensor:
    """Positive fp32 numbers rounded up to bf16, still as fp32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & _UPPER_HALF).view(torch.float32)


def _round_down_to_bf16(x: Tensor) -> Tensor:
    """fp32 numbers rounded down to bf16, at least bf16's minimum, still as fp32."""
    bits = x.contiguous().view(torch.int32)
    # Truncating the magnitude rounds towards zero: down only for x > 0.
    away = torch.where(x < 0, 0xFFFF, 0).to(torch.int32)
    return ((bits + away) & _UPPER_HALF).view(torch.float32).clamp_min(-BF16_MAX)
