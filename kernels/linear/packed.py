"""Weights stored in 8, 16 or 32 bits, for the loops that multiply with them on CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # inputs that share a scale
_INT8_MAX = 127
_ROWS_AT_A_TIME = 1024

WeightFormat = Literal["exact", "int8"]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A linear's weight [out_features, in_features].

    codes: [out_features, in_padded] int8, bfloat16 or float32, where in_padded is in_features
        rounded up to whole blocks, with zeros
    scales: [out_features, in_padded / 32] fp32, one a block of int8 codes; None for the others,
        whose codes are the weights
    """

    codes: Tensor
    scales: Tensor | None
    in_features: int

    @property
    def shape(self) -> torch.Size:
        """[out_features, in_features]"""
        return torch.Size((self.codes.shape[0], self.in_features))

    @property
    def num_bytes(self) -> int:
        """Of codes and scales."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.codes.nbytes + scales

    @staticmethod
    def joined(parts: list[PackedWeight]) -> PackedWeight:
        """The outputs of all `parts`, which have the same inputs, one after the other."""
        dtype = parts[0].codes.dtype
        if any(part.codes.dtype != dtype for part in parts):  # bfloat16 and float32
            dtype = torch.float32
        scales = [part.scales for part in parts if part.scales is not None]
        return PackedWeight(
            torch.cat([part.codes.to(dtype) for part in parts]),
            torch.cat(scales) if scales else None,
            parts[0].in_features,
        )


def pack(weight: Tensor, weight_format: WeightFormat) -> PackedWeight:
    """`weight` [out_features, in_features] fp32, as `weight_format` stores it.

    exact: in bfloat16 if that holds every weight exactly, as it does for most checkpoints,
        otherwise in float32
    int8: absmax / 127 of each block of 32 inputs is its scale, as in GGUF's Q8_0 but in fp32
    Raises ValueError for int8 and weights that are not finite.
    """
    in_features = weight.shape[1]
    more = -in_features % BLOCK
    padded = (F.pad(weight, (0, more)) if more else weight).contiguous()
    if weight_format == "exact":
        narrow = torch.empty_like(padded, dtype=torch.bfloat16)
        fits = all(
            part.copy_(rows).float().equal(rows)
            for part, rows in zip(_parts(narrow), _parts(padded), strict=True)
        )
        return PackedWeight(narrow if fits else padded, None, in_features)
    codes = torch.empty_like(padded, dtype=torch.int8)
    scales = padded.new_empty(padded.shape[0], padded.shape[1] // BLOCK)
    for rows, code_rows, scale_rows in zip(*map(_parts, (padded, codes, scales)), strict=True):
        blocks = rows.unflatten(1, (-1, BLOCK))
        torch.amax(blocks.abs(), -1, out=scale_rows).div_(_INT8_MAX)
        if not scale_rows.isfinite().all():
            raise ValueError("weight: int8 needs finite weights, got NaN or infinity")
        # A block of zeros has scale 0.
        inverse = torch.where(scale_rows > 0, 1 / scale_rows, 0.0).unsqueeze(-1)
        code_rows.copy_((blocks * inverse).round_().clamp_(-_INT8_MAX, _INT8_MAX).flatten(1))
    return PackedWeight(codes, scales, in_features)


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Some rows at a time, so that temporary copies stay small."""
    return torch.split(tensor, _ROWS_AT_A_TIME)


def unpack(weight: PackedWeight) -> Tensor:
    """The weights [out_features, in_features] in fp32."""
    values = weight.codes.float()
    if weight.scales is not None:
        values = (values.unflatten(1, (-1, BLOCK)) * weight.scales.unsqueeze(-1)).flatten(1)
    return values[:, : weight.in_features]
