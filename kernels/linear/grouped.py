"""Weights stored in 4 or 8 bits for the kernels that multiply with them on GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmesh.kernels.linear.packed import BLOCK

Kind = Literal["uint4", "uint8", "e4m3", "e2m1"]
GroupedFormat = Literal["int8", "int4", "fp8"]

# Inputs that share a scale where weights are rounded at load; FP8 has one scale for an output.
GROUP_SIZES = {"int4": 32, "int8": 128}
MIDDLES = {"uint4": 8, "uint8": 128, "e4m3": 0, "e2m1": 0}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_HALF = BLOCK // 2
_E4M3_MAX = 448.0
_OUTPUTS_AT_A_TIME = 1024


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A linear's weight [outputs, inputs], or those of several experts, [experts, outputs, inputs].

    A weight is (code - zero) * scale, or code * scale + offset, in fp32, rounded to the dtype of
    the inputs that it is multiplied with. Outputs are adjacent in memory.

    kind: what a code is

        uint4   from 0 to 15; codes […, blocks * 16, outputs]: in blocks of 32 inputs, row i has
                inputs i and 16 + i in its low and high half
        uint8   from 0 to 255; codes […, inputs, outputs]
        e4m3    FP8, as uint8; codes likewise; never NaN
        e2m1    FP4, of MXFP4; codes like those of uint4

    codes: uint8
    scales: […, groups, outputs] of any float dtype; of e2m1 uint8, a power of two, as its exponent
        plus 127
    zeros: like `scales`, of any dtype; None for the middle of the codes, 8 or 128, and for floats
    has_offsets: `zeros` are offsets
    group: inputs that share a scale, in order; a multiple of 32
    index: […, inputs] int32, the group of each input, where groups are not that; else None
    """

    kind: Kind
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    index: Tensor | None
    in_features: int
    has_offsets: bool = False

    @property
    def shape(self) -> torch.Size:
        """[outputs, inputs] or [experts, outputs, inputs]"""
        return torch.Size((*self.codes.shape[:-2], self.codes.shape[-1], self.in_features))

    @property
    def device(self) -> torch.device:
        """As of a tensor, which models of transformers may ask for."""
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        """Of codes and all that decodes them."""
        others = (self.scales, self.zeros, self.index)
        return self.codes.nbytes + sum(part.nbytes for part in others if part is not None)

    def to(self, device: torch.device | str) -> GroupedWeight:
        """On that device."""
        return self._with_each(lambda part: part.to(device), "codes", "scales", "zeros", "index")

    def dim(self) -> int:
        """2 or 3, as of a tensor."""
        return self.codes.dim()

    def decoded(self) -> Tensor:
        """The weights in fp32, like `shape`, not contiguous."""
        codes = _numbers(self.kind, self.codes, self.in_features)
        index = self._groups()
        shape = (*self.codes.shape[:-2], self.in_features, self.codes.shape[-1])
        if index.dim() > 1:
            index = index.unsqueeze(-1).expand(shape)
            scales = _exact_scales(self.scales).gather(-2, index)
            zeros = None if self.zeros is None else self.zeros.gather(-2, index)
        else:
            scales = _exact_scales(self.scales)[..., index, :]
            zeros = None if self.zeros is None else self.zeros[..., index, :]
        if self.has_offsets:
            assert zeros is not None
            return codes.mul_(scales).add_(zeros.float()).mT
        codes -= MIDDLES[self.kind] if zeros is None else zeros.float()
        return codes.mul_(scales).mT

    def expert(self, at: int) -> GroupedWeight:
        """The weight of one of several experts."""
        return self._with_each(lambda part: part[at], "codes", "scales", "zeros", "index")

    def rows(self, which: Tensor | slice) -> GroupedWeight:
        """Some outputs. which: [n] int64 or a slice"""
        return self._with_each(
            lambda part: part[..., which].contiguous(), "codes", "scales", "zeros"
        )

    def columns(self, first: int, end: int) -> GroupedWeight:
        """Inputs [first, end). Groups are divided where the part begins within one."""
        codes = self.codes
        if self.kind in ("uint8", "e4m3"):
            codes = codes[..., first:end, :]
        elif first % BLOCK == 0:
            codes = codes[..., first // 2 : -(-end // BLOCK) * _HALF, :]
        else:
            codes = _in_halves(_in_order(codes)[..., first:end, :])
        shared = math.gcd(first, self.group)
        if self.index is None and shared % BLOCK == 0:
            # Groups that are as long as divides where the part begins, the last maybe cut.
            used = torch.arange(first // shared, -(-end // shared), device=self.device)
            used, group, index = used // (self.group // shared), shared, None
        else:
            used, index = self._groups()[..., first:end].unique(return_inverse=True)
            group, index = BLOCK, index.int().contiguous()
        return replace(
            self._with_each(lambda part: part[..., used, :].contiguous(), "scales", "zeros"),
            codes=codes.contiguous(),
            group=group,
            index=index,
            in_features=end - first,
        )

    def fits(self, other: GroupedWeight) -> bool:
        """Whether both can be parts of one weight without decoding them."""
        mine, theirs = (
            (
                *(one.kind, one.has_offsets, one.group, one.in_features, one.scales.shape[-2]),
                one.index is None,
            )
            for one in (self, other)
        )
        return mine == theirs

    @staticmethod
    def joined(parts: Sequence[GroupedWeight]) -> GroupedWeight | None:
        """The outputs of all `parts`, one after the other; None if their inputs are not coded in
        the same way."""
        first = parts[0]
        same = all(
            first.fits(part)
            and (first.index is None or part.index is None or first.index.equal(part.index))
            for part in parts
        )
        return first._combined(parts, lambda tensors: torch.cat(tensors, -1)) if same else None

    @staticmethod
    def stacked(experts: Sequence[GroupedWeight]) -> GroupedWeight | None:
        """Of all experts, whose weights have one shape; None if they are coded differently."""
        first = experts[0]
        if not all(first.fits(one) and first.codes.shape == one.codes.shape for one in experts):
            return None
        found = first._combined(experts, torch.stack)
        indices = [one.index for one in experts if one.index is not None]
        if not indices:
            return found
        return replace(found, index=torch.stack(indices))

    def _with_each(self, change: Callable[[Tensor], Tensor], *names: str) -> GroupedWeight:
        """With these tensors changed, of which it may lack some."""
        parts = ((name, getattr(self, name)) for name in names)
        changed: dict[str, Any] = {name: change(part) for name, part in parts if part is not None}
        return replace(self, **changed)

    def _combined(
        self, parts: Sequence[GroupedWeight], combine: Callable[[list[Tensor]], Tensor]
    ) -> GroupedWeight:
        """All but the index, which stays that of the first."""
        zeros = None
        if any(part.zeros is not None for part in parts):
            given = [part._all_zeros() for part in parts]
            widest = given[0].dtype
            for some in given[1:]:
                widest = torch.promote_types(widest, some.dtype)
            zeros = combine([some.to(widest) for some in given])
        scales = [part.scales for part in parts]
        if len({scale.dtype for scale in scales}) > 1:
            scales = [scale.float() for scale in scales]
        codes = combine([part.codes for part in parts])
        return replace(self, codes=codes, scales=combine(scales), zeros=zeros)

    def _all_zeros(self) -> Tensor:
        if self.zeros is not None:
            return self.zeros
        return torch.full_like(self.scales, MIDDLES[self.kind], dtype=torch.uint8)

    def _groups(self) -> Tensor:
        """[…, inputs] int64"""
        if self.index is not None:
            return self.index.long()
        return torch.arange(self.in_features, device=self.device) // self.group


def grouped(
    kind: Kind,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    group: int,
) -> GroupedWeight:
    """A weight from its codes.

    codes: [outputs, inputs] uint8, one a byte
    scales, zeros: [outputs, groups], as in `GroupedWeight`
    group: inputs of a group; groups: [inputs], the group of each input, None if they are in order
    Raises ValueError for an e4m3 code that is NaN.
    """
    num_inputs = codes.shape[1]
    if kind == "e4m3" and bool(((codes & 127) == 127).any()):
        raise ValueError("it has codes that are NaN")
    in_order = torch.arange(num_inputs, device=codes.device) // group
    index = None
    if scales.shape[1] == 1:
        group = -(-num_inputs // BLOCK) * BLOCK
    elif group % BLOCK or not (groups is None or groups.equal(in_order)):
        found = in_order if groups is None else groups
        index, group = found.int().contiguous(), BLOCK
    if zeros is not None and not zeros.is_floating_point():
        low, high = zeros.aminmax()
        fits = int(low) >= 0 and int(high) < 256
        zeros = zeros.to(torch.uint8 if fits else torch.int16)
    by_input = codes.T
    return GroupedWeight(
        kind,
        (_in_halves(by_input) if kind in ("uint4", "e2m1") else by_input).contiguous(),
        scales.T.contiguous(),
        None if zeros is None else zeros.T.contiguous(),
        group,
        index,
        num_inputs,
    )


def quantise(weight: Tensor, weight_format: GroupedFormat) -> GroupedWeight:
    """`weight` [outputs, inputs] or [experts, outputs, inputs], rounded.

    int4: for each 32 inputs an offset, their minimum, and a scale, a 15th of their range, both in
        bfloat16; as `pack` does it in fp32
    int8: for each 128 inputs a scale in bfloat16, absmax / 127
    fp8: e4m3; for each output a scale in fp32, absmax / 448
    Raises ValueError if a weight is not finite.
    """
    if weight.dim() == 3:
        stacked = GroupedWeight.stacked([quantise(one, weight_format) for one in weight])
        assert stacked is not None
        return stacked
    encode = {"int4": _to_uint4, "int8": _to_uint8, "fp8": _to_e4m3}[weight_format]
    # Some outputs at a time, so that temporary copies stay small.
    parts = []
    for some in weight.split(_OUTPUTS_AT_A_TIME):
        if not some.isfinite().all():
            raise ValueError(f"weight: {weight_format} needs finite weights, got NaN or infinity")
        parts.append(encode(some.float()))
    joined = GroupedWeight.joined(parts)
    assert joined is not None
    return joined


def _to_uint4(weight: Tensor) -> GroupedWeight:
    group = GROUP_SIZES["int4"]
    blocks = _blocks(weight, group)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    offsets = low.bfloat16()
    scales = (high / 15 - offsets.float() / 15).bfloat16()
    codes = ((blocks - offsets.float()) * _inverse(scales)).round_().clamp_(0, 15)
    return replace(_encoded("uint4", weight, codes, scales, offsets, group), has_offsets=True)


def _to_uint8(weight: Tensor) -> GroupedWeight:
    group = GROUP_SIZES["int8"]
    blocks = _blocks(weight, group)
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).bfloat16()
    codes = (blocks * _inverse(scales)).round_().clamp_(-127, 127).add_(MIDDLES["uint8"])
    return _encoded("uint8", weight, codes, scales, None, group)


def _to_e4m3(weight: Tensor) -> GroupedWeight:
    scales = weight.abs().amax(-1, keepdim=True) / _E4M3_MAX
    values = (weight * _inverse(scales)).clamp_(-_E4M3_MAX, _E4M3_MAX)
    codes = values.to(torch.float8_e4m3fn).view(torch.uint8)
    return grouped("e4m3", codes, scales, group=BLOCK)


def _encoded(
    kind: Kind, weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int
) -> GroupedWeight:
    """codes: [outputs, groups, group]; scales, zeros: [outputs, groups, 1]"""
    flat = codes.to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    zeros = None if zeros is None else zeros.squeeze(-1)
    return grouped(kind, flat, scales.squeeze(-1), zeros, group=group)


def _blocks(weight: Tensor, group: int) -> Tensor:
    """[outputs, groups, group], the last maybe filled up with what its scale is for"""
    more = -weight.shape[1] % group
    filled = torch.cat((weight, weight[:, -1:].expand(-1, more)), 1) if more else weight
    blocks: Tensor = filled.unflatten(1, (-1, group))
    return blocks


def _inverse(scales: Tensor) -> Tensor:
    """Zero where all weights of a group are 0, or too small."""
    exact = scales.float()
    inverse: Tensor = 1 / exact
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _numbers(kind: Kind, codes: Tensor, num_inputs: int) -> Tensor:
    """The codes as fp32, […, inputs, outputs]"""
    if kind == "uint8":
        return codes.float()
    if kind == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    halves = _in_order(codes)[..., :num_inputs, :]
    if kind == "uint4":
        return halves.float()
    return torch.tensor(E2M1, device=codes.device)[halves.int()]


def _exact_scales(scales: Tensor) -> Tensor:
    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    return scales.float()


def _in_halves(codes: Tensor) -> Tensor:
    """[inputs, outputs] uint8 -> [blocks * 16, outputs]; any leading dimensions"""
    padded = F.pad(codes, (0, 0, 0, -codes.shape[-2] % BLOCK)).unflatten(-2, (-1, 2, _HALF))
    low, high = padded.unbind(-3)
    packed: Tensor = low | (high << 4)
    return packed.flatten(-3, -2)


def _in_order(codes: Tensor) -> Tensor:
    """Undoes `_in_halves`, but for the padding."""
    blocks = codes.unflatten(-2, (-1, _HALF))
    return torch.stack((blocks & 15, blocks >> 4), -3).flatten(-4, -2)
