"""Weights of quantised checkpoints: decoded when they are loaded, or kept in their bits.

A linear's weight [outputs, inputs] is stored as one of

    GPTQ     qweight [inputs · bits / 32, outputs] int32, dense, lowest bits first
             qzeros [groups, outputs · bits / 32] int32, one less than meant unless it is gptq_v2
             scales [groups, outputs]; g_idx [inputs], the group of each input (act-order)
    AWQ      qweight [inputs, outputs / 8] int32, eight outputs in the order 0 2 4 6 1 3 5 7
             qzeros [groups, outputs / 8] int32, like it; scales [groups, outputs]
    packed   weight_packed [outputs, inputs · bits / 32] int32, dense; weight_scale [outputs,
             groups]; weight_zero_point, packed along the outputs; weight_g_idx, as in GPTQ
    scaled   weight in int8 or FP8; weight_scale for all, for each output, group of inputs or
             block; weight_scale_inv is another name of it

("packed" and "scaled" are compressed-tensors' and DeepSeek's.) What is not quantised, such as norms
and embeddings, is read as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvmesh.kernels.linear import GroupedWeight, Kind, grouped
from kvmesh.kernels.linear.grouped import MIDDLES
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.weights import WeightReader

_AWQ_BITS = 4
_ROWS_AT_A_TIME = 1024
# Where output i of eight is in an int32 of AWQ.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class QuantisedWeights:
    """Has the interface of WeightReader. A weight is read whole, then a rank's part is taken.

    quantisation: the `quantization_config` of the checkpoint, which `why_not_read` has passed
    """

    def __init__(self, reader: WeightReader, quantisation: Mapping[str, Any]) -> None:
        self._reader = reader
        self._method = quantisation["quant_method"]
        self._zero_shift = int(quantisation.get("checkpoint_format") != "gptq_v2")
        self._block = _block_size(quantisation)

    @property
    def dtype(self) -> torch.dtype:
        return self._reader.dtype

    @property
    def keeps_bits(self) -> bool:
        return self._reader.keeps_bits

    def __contains__(self, name: str) -> bool:
        return name in self._reader or self._is_quantised(name)

    def whole(self, name: str, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
        if not self._is_quantised(name):
            return self._reader.whole(name, shape, dtype)
        return self._decoded(name, shape)

    def rows(self, name: str, shape: torch.Size, first: int, end: int) -> Tensor:
        if not self._is_quantised(name):
            return self._reader.rows(name, shape, first, end)
        return self._decoded(name, shape)[first:end].contiguous()

    def columns(self, name: str, shape: torch.Size, first: int, end: int) -> Tensor:
        if not self._is_quantised(name):
            return self._reader.columns(name, shape, first, end)
        return self._decoded(name, shape)[:, first:end].contiguous()

    def part(self, name: str, shape: torch.Size, *index: slice) -> Tensor:
        if not self._is_quantised(name):
            return self._reader.part(name, shape, *index)
        return self._decoded(name, shape)[index].contiguous()

    def kept(self, name: str, shape: torch.Size) -> GroupedWeight | None:
        if not (self.keeps_bits and self._is_quantised(name)):
            return None
        try:
            return self._coded(name, shape).grouped()
        except ValueError as error:
            raise _malformed(name, shape, error) from error

    def leave(self, name: str, shape: torch.Size) -> None:
        if not self._is_quantised(name):
            self._reader.leave(name, shape)
            return
        for part in self._parts(name):
            self._reader.raw(part)

    def check_all_read(self) -> None:
        self._reader.check_all_read()

    def _is_quantised(self, name: str) -> bool:
        base = name.removesuffix(".weight")
        if base == name:
            return False
        stored = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")
        return any(f"{base}.{part}" in self._reader for part in stored)

    def _parts(self, name: str) -> list[str]:
        base = name.removesuffix("weight")
        return [name for part in _PARTS if (name := base + part) in self._reader]

    def _decoded(self, name: str, shape: torch.Size) -> Tensor:
        return self._coded(name, shape).decoded().to(self.dtype)

    def _coded(self, name: str, shape: torch.Size) -> _Coded:
        base = name.removesuffix("weight")
        parts = {part.removeprefix(base): self._reader.raw(part) for part in self._parts(name)}
        try:
            if "weight_packed" in parts:
                found = _packed(parts, shape)
            elif "qweight" not in parts:
                found = _scaled(parts, shape, self._block)
            elif self._method == "awq":
                found = _awq(parts, shape)
            else:
                found = _gptq(parts, shape, self._zero_shift)
            return found.checked(shape)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise _malformed(name, shape, error) from error


def _malformed(name: str, shape: torch.Size, error: Exception) -> ConfigError:
    return ConfigError(
        "model", f"the quantised weight {name} of shape {list(shape)} is malformed: {error}"
    )


@dataclass(frozen=True, slots=True)
class _Coded:
    """A weight is (code + lowest - zero) * scale.

    codes: [outputs, inputs] uint8, or FP8
    bits: of a code
    lowest: what the code 0 is, where there are no zeros, or what they count from
    scales, zeros: [outputs, groups]; zeros may be None
    groups: [inputs] int64, the group of each input; size: of a group if they are in order
    """

    codes: Tensor
    bits: int
    lowest: int
    scales: Tensor
    zeros: Tensor | None
    groups: Tensor
    size: int

    def checked(self, shape: torch.Size) -> _Coded:
        """Itself; raises ValueError if its tensors do not make a weight of that shape."""
        if self.codes.shape != shape:
            raise ValueError(f"its parts make {list(self.codes.shape)}")
        groups = int(self.groups.max()) + 1 if shape[1] else 0
        for name, part in (("scales", self.scales), ("zeros", self.zeros)):
            if part is not None and (part.shape[0] != shape[0] or part.shape[1] < groups):
                raise ValueError(f"its {name} are {list(part.shape)}")
        return self

    def decoded(self) -> Tensor:
        """The weights in fp32."""
        numbers = self.codes.float() + self.lowest
        if self.zeros is not None:
            numbers -= self.zeros.float()[:, self.groups]
        return numbers.mul_(self.scales.float()[:, self.groups])

    def grouped(self) -> GroupedWeight | None:
        """The same weights in 4 or 8 bits; None if they are of a float dtype that has no kernel."""
        zeros = None if self.zeros is None else self.zeros - self.lowest
        if self.codes.is_floating_point():
            if self.codes.dtype != torch.float8_e4m3fn or zeros is not None:
                return None
            kind: Kind = "e4m3"
            codes = self.codes.view(torch.uint8)
        else:
            kind = "uint4" if self.bits <= 4 else "uint8"
            # Without zeros, the code of 0 is the middle of what a kernel reads.
            shift = 0 if zeros is not None else MIDDLES[kind] + self.lowest
            codes = self.codes + shift
        return grouped(kind, codes, self.scales, zeros, self.groups, group=self.size)


_PARTS = (
    "weight",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
    "weight_g_idx",
)


def _gptq(parts: Mapping[str, Tensor], shape: torch.Size, zero_shift: int) -> _Coded:
    num_outputs, num_inputs = shape
    packed = parts["qweight"].t()
    bits = _bits_of(packed.shape[1], num_inputs)
    scales = parts["scales"].t()
    zeros = unpacked(parts["qzeros"], bits, num_outputs).t().int() + zero_shift
    groups, size = _groups(parts.get("g_idx"), num_inputs, scales)
    return _Coded(unpacked(packed, bits, num_inputs), bits, 0, scales, zeros, groups, size)


def _awq(parts: Mapping[str, Tensor], shape: torch.Size) -> _Coded:
    num_outputs, num_inputs = shape
    codes = _awq_codes(parts["qweight"], num_outputs).t()
    scales = parts["scales"].t()
    zeros = _awq_codes(parts["qzeros"], num_outputs).t().int()
    return _Coded(codes, _AWQ_BITS, 0, scales, zeros, *_groups(None, num_inputs, scales))


def _awq_codes(packed: Tensor, num_outputs: int) -> Tensor:
    codes = unpacked(packed, _AWQ_BITS, num_outputs)
    eights = codes.view(codes.shape[0], -1, len(_AWQ_PLACES))
    return eights[..., _AWQ_PLACES].flatten(1)


def _packed(parts: Mapping[str, Tensor], shape: torch.Size) -> _Coded:
    num_outputs, num_inputs = shape
    packed = parts["weight_packed"]
    bits = _bits_of(packed.shape[1], num_inputs)
    lowest = -(1 << (bits - 1))
    codes = unpacked(packed, bits, num_inputs)
    scales = parts["weight_scale"]
    zeros = parts.get("weight_zero_point")
    if zeros is not None:
        if zeros.dtype == torch.int32:
            zeros = unpacked(zeros.t(), bits, num_outputs).t().int() + lowest
        zeros = zeros.int()
    groups, size = _groups(parts.get("weight_g_idx"), num_inputs, scales)
    return _Coded(codes, bits, lowest, scales, zeros, groups, size)


def _scaled(
    parts: Mapping[str, Tensor], shape: torch.Size, block: tuple[int, int] | None
) -> _Coded:
    scales = parts.get("weight_scale", parts.get("weight_scale_inv"))
    assert scales is not None
    codes, zeros, lowest = parts["weight"], parts.get("weight_zero_point"), 0
    if codes.dtype == torch.int8:
        codes, lowest = codes.view(torch.uint8) ^ 128, -128
    scales = _by_output(scales, shape, block)
    if zeros is not None:
        zeros = _by_output(zeros, shape, block)
        zeros = zeros.int() if not zeros.is_floating_point() else zeros.float()
    size = block[1] if block is not None and scales.shape[1] > 1 else 0
    if not size or math.ceil(shape[1] / size) != scales.shape[1]:
        return _Coded(codes, 8, lowest, scales, zeros, *_groups(None, shape[1], scales))
    groups = torch.arange(shape[1], device=codes.device) // size
    return _Coded(codes, 8, lowest, scales, zeros, groups, size)


def _by_output(scales: Tensor, shape: torch.Size, block: tuple[int, int] | None) -> Tensor:
    """[outputs, groups], from one number for all, or for each output, or blocks of both."""
    num_outputs, _ = shape
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(num_outputs, 1)
    if scales.dim() == 1:
        scales = scales.unsqueeze(1)
    if scales.shape[0] == num_outputs:
        return scales
    if block is None or scales.shape != tuple(
        math.ceil(size / length) for size, length in zip(shape, block, strict=True)
    ):
        raise ValueError(f"scales of shape {list(scales.shape)} do not fit blocks of {block}")
    return scales.repeat_interleave(block[0], 0)[:num_outputs]


def _groups(stored: Tensor | None, num_inputs: int, scales: Tensor) -> tuple[Tensor, int]:
    """The group of each input, as stored, or equal ones in order; and the size of those."""
    num_groups = scales.shape[1]
    if num_groups < 1:
        raise ValueError("it has no groups")
    size = math.ceil(num_inputs / num_groups)
    if stored is None:
        return torch.arange(num_inputs, device=scales.device) // size, size
    if stored.shape != (num_inputs,) or stored.min() < 0 or stored.max() >= num_groups:
        raise ValueError(f"its inputs are not in groups from 0 to {num_groups - 1}")
    return stored.long(), size


def _bits_of(num_words: int, count: int) -> int:
    """The size of numbers of which `count` fill that many words of 32 bits, the last in part."""
    for bits in range(1, 9):
        if math.ceil(count * bits / 32) == num_words:
            return bits
    raise ValueError(f"{count} numbers of up to 8 bits do not fill {num_words} words of 32")


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of `bits` bits in each row of words, dense, lowest bits first.

    words: [rows, ceil(count * bits / 32)] int32 -> [rows, count] uint8
    """
    if words.dtype != torch.int32:
        raise ValueError(f"its words are {words.dtype}, expected torch.int32")
    starts = torch.arange(count, device=words.device) * bits
    out = torch.empty(words.shape[0], count, dtype=torch.uint8, device=words.device)
    # Some rows at a time, since each number takes eight bytes here.
    for first in range(0, words.shape[0], _ROWS_AT_A_TIME):
        wide = words[first : first + _ROWS_AT_A_TIME].long() & 0xFFFFFFFF
        # A number may continue in the next word.
        pairs = wide | torch.cat((wide[:, 1:], torch.zeros_like(wide[:, :1])), 1) << 32
        numbers = pairs[:, starts // 32] >> (starts % 32) & (1 << bits) - 1
        out[first : first + _ROWS_AT_A_TIME] = numbers
    return out


def _block_size(quantisation: Mapping[str, Any]) -> tuple[int, int] | None:
    """Outputs and inputs that share a scale, if it is said."""
    found = quantisation.get("weight_block_size")
    for group in (quantisation.get("config_groups") or {}).values():
        found = found or (group.get("weights") or {}).get("block_structure")
    return None if found is None else (int(found[0]), int(found[1]))
