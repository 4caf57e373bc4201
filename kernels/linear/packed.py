"""Weights stored in 4 to 32 bits, for the loops that multiply with them on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # inputs that share a scale
_INT8_MAX = 127
_UINT4_MAX = 15
_FEW_ROWS = 16
_ROWS_AT_A_TIME = 1024

WeightFormat = Literal["exact", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A linear's weight [out_features, in_features], in whole blocks of 32 inputs.

    codes, scales: one of

        uint8     [out_features, blocks * 16]; byte i of a block has inputs i and 16 + i in its low
                  and high half; scales [out_features, blocks, 2] fp32, a factor and an offset: a
                  weight is factor * code + offset
        int8      [out_features, blocks * 32]; scales [out_features, blocks, 1] fp32, a factor
        bfloat16  [out_features, blocks * 32], the weights themselves; scales None
        float32   likewise
    """

    codes: Tensor
    scales: Tensor | None
    in_features: int

    @property
    def shape(self) -> torch.Size:
        """[out_features, in_features]"""
        return torch.Size((self.codes.shape[0], self.in_features))

    @property
    def device(self) -> torch.device:
        """As of a tensor, which models of transformers may ask for."""
        return self.codes.device

    @property
    def num_blocks(self) -> int:
        """Of a row."""
        return -(-self.in_features // BLOCK)

    @property
    def num_bytes(self) -> int:
        """Of codes and scales."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.codes.nbytes + scales

    def rows(self, index: Tensor | slice) -> PackedWeight:
        """Some outputs. index: [n] int64 or a slice"""
        scales = None if self.scales is None else self.scales[index]
        return PackedWeight(self.codes[index], scales, self.in_features)

    @staticmethod
    def joined(parts: list[PackedWeight]) -> PackedWeight:
        """The outputs of all `parts`, which have the same inputs, one after the other."""
        if len({part.codes.dtype for part in parts}) > 1:
            return _pack_floats(torch.cat([unpack(part) for part in parts]))
        scales = [part.scales for part in parts if part.scales is not None]
        return PackedWeight(
            torch.cat([part.codes for part in parts]),
            torch.cat(scales) if scales else None,
            parts[0].in_features,
        )


def pack(weight: Tensor, weight_format: WeightFormat) -> PackedWeight:
    """`weight` [out_features, in_features] fp32, as `weight_format` stores it.

    exact: with the fewest bits that hold every weight exactly. 4 and 8 bits hold what had as many
        before, with fp16 scales for blocks of 32 inputs or multiples of that: GGUF's Q4_0, Q4_1
        and Q8_0, AWQ, GPTQ. bfloat16 holds most other checkpoints
    int8: absmax / 127 of each block is its factor, as in Q8_0 but in fp32
    int4: of each block, the minimum is the offset, and a 15th of the range the factor, as in Q4_1
    Raises ValueError for int8 and int4 and weights that are not finite.
    """
    if weight_format == "exact":
        return (
            _pack_exactly(weight, _to_uint4_exactly)
            or _pack_exactly(weight, _to_int8_exactly)
            or _pack_floats(weight)
        )
    if not all(part.isfinite().all() for part in weight.split(_ROWS_AT_A_TIME)):
        raise ValueError(f"weight: {weight_format} needs finite weights, got NaN or infinity")
    return _pack_blocks(weight, _to_int8 if weight_format == "int8" else _to_uint4)


def unpack(weight: PackedWeight) -> Tensor:
    """The weights [out_features, in_features] in fp32."""
    codes = weight.codes
    if codes.dtype == torch.uint8:
        halves = codes.unflatten(1, (-1, BLOCK // 2))
        codes = torch.cat((halves & _UINT4_MAX, halves >> 4), dim=-1).flatten(1)
    values = codes.float()
    if weight.scales is not None:
        factor, *offset = weight.scales.split(1, dim=-1)
        values = values.unflatten(1, (-1, BLOCK)) * factor
        for more in offset:
            values += more
        values = values.flatten(1)
    return values[:, : weight.in_features]


def _pack_floats(weight: Tensor) -> PackedWeight:
    """In bfloat16 if that holds every weight, otherwise in float32."""
    more = -weight.shape[1] % BLOCK
    padded = (F.pad(weight, (0, more)) if more else weight).contiguous()
    narrow = torch.empty_like(padded, dtype=torch.bfloat16)
    parts = zip(*(tensor.split(_ROWS_AT_A_TIME) for tensor in (narrow, padded)), strict=True)
    fits = all(part.copy_(rows).float().equal(rows) for part, rows in parts)
    return PackedWeight(narrow if fits else padded, None, weight.shape[1])


# [rows, blocks, 32] fp32 -> codes [rows, bytes], scales [rows, blocks, numbers]
_Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


def _pack_blocks(weight: Tensor, encode: _Encode) -> PackedWeight:
    """Some rows at a time, so that temporary copies stay small."""
    more = -weight.shape[1] % BLOCK
    parts = []
    for rows in weight.split(_ROWS_AT_A_TIME):
        if more:  # with what the block's scales are for
            rows = torch.cat((rows, rows[:, -1:].expand(-1, more)), dim=1)
        parts.append(encode(rows.unflatten(1, (-1, BLOCK))))
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return PackedWeight(codes, scales, weight.shape[1])


def _pack_exactly(weight: Tensor, encode: _Encode) -> PackedWeight | None:
    """None unless the codes mean every weight exactly. A few rows, tried first, refuse most."""
    for some in (weight[:_FEW_ROWS], weight):
        packed = _pack_blocks(some, encode)
        for first in range(0, some.shape[0], _ROWS_AT_A_TIME):
            rows = slice(first, first + _ROWS_AT_A_TIME)
            if not unpack(packed.rows(rows)).equal(some[rows]):
                return None
    return packed


def _to_int8(blocks: Tensor) -> tuple[Tensor, Tensor]:
    factor = blocks.abs().amax(-1, keepdim=True).div_(_INT8_MAX)
    return _int8_codes(blocks, factor), factor


def _to_int8_exactly(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """If every block has a code of 127 or -127, as the formats have that round to the nearest."""
    factor = _half(blocks.abs().amax(-1, keepdim=True) / _INT8_MAX)
    return _int8_codes(blocks, factor), factor


def _to_uint4(blocks: Tensor) -> tuple[Tensor, Tensor]:
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    factor = (high - low) / _UINT4_MAX
    return _uint4_codes(blocks, factor, low), torch.cat((factor, low), -1)


def _to_uint4_exactly(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A block's range is some number of factors: 15 in GGUF, maybe fewer with longer blocks."""
    scales = blocks.new_empty(*blocks.shape[:-1], 2)
    codes = torch.empty_like(blocks, dtype=torch.uint8)
    left = torch.ones(blocks.shape[:-1], dtype=torch.bool)
    for steps in range(_UINT4_MAX, 0, -1):
        some = blocks[left]
        if not len(some):
            break
        low, high = some.aminmax(dim=-1, keepdim=True)
        factor = _half((high - low) / steps)
        found = _uint4_codes_of(some, factor, low)
        scales[left], codes[left] = torch.cat((factor, low), -1), found
        left[left.clone()] = (found * factor + low).ne(some).any(-1)
    return _in_halves(codes), scales


def _half(factor: Tensor) -> Tensor:
    """Rounded to fp16, so that its product with a code is exact in fp32."""
    return factor.half().float()


def _int8_codes(blocks: Tensor, factor: Tensor) -> Tensor:
    codes = _divided(blocks, factor).round_().clamp_(-_INT8_MAX, _INT8_MAX)
    return codes.to(torch.int8).flatten(1)


def _uint4_codes(blocks: Tensor, factor: Tensor, low: Tensor) -> Tensor:
    return _in_halves(_uint4_codes_of(blocks, factor, low))


def _uint4_codes_of(blocks: Tensor, factor: Tensor, low: Tensor) -> Tensor:
    return _divided(blocks - low, factor).round_().clamp_(0, _UINT4_MAX).to(torch.uint8)


def _in_halves(codes: Tensor) -> Tensor:
    """[rows, blocks, 32] uint8 -> [rows, blocks * 16]"""
    low, high = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
    packed: Tensor = low | (high << 4)
    return packed.flatten(1)


def _divided(blocks: Tensor, factor: Tensor) -> Tensor:
    """A block whose numbers are all 0, or too small, has factor 0 and codes 0."""
    return blocks * torch.where(factor > 0, 1 / factor, 0.0)
