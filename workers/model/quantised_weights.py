"""Weights of quantised checkpoints, decoded when they are loaded.

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
from typing import Any

import torch
from torch import Tensor

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.weights import WeightReader

_AWQ_BITS = 4
# Where output i of eight is in an int32 of AWQ.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class QuantisedWeights:
    """Has the interface of WeightReader. A weight is decoded whole, then a rank's part is taken.

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
        base = name.removesuffix("weight")
        parts = {part.removeprefix(base): self._reader.raw(part) for part in self._parts(name)}
        try:
            if "weight_packed" in parts:
                weight = _packed(parts, shape)
            elif "qweight" not in parts:
                weight = _scaled(parts, shape, self._block)
            elif self._method == "awq":
                weight = _awq(parts, shape)
            else:
                weight = _gptq(parts, shape, self._zero_shift)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise ConfigError(
                "model", f"the quantised weight {name} of shape {list(shape)} is malformed: {error}"
            ) from error
        return weight.to(self.dtype)


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


def _gptq(parts: Mapping[str, Tensor], shape: torch.Size, zero_shift: int) -> Tensor:
    num_outputs, num_inputs = shape
    packed = parts["qweight"].t()
    bits = _bits_of(packed.shape[1], num_inputs)
    codes = unpacked(packed, bits, num_inputs)
    scales = parts["scales"].float().t()
    zeros = unpacked(parts["qzeros"], bits, num_outputs).t() + zero_shift
    groups = _groups(parts.get("g_idx"), num_inputs, scales.shape[1])
    return _checked((codes - zeros[:, groups]) * scales[:, groups], shape)


def _awq(parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    num_outputs, num_inputs = shape
    codes = _awq_codes(parts["qweight"], num_outputs)
    scales = parts["scales"].float()
    zeros = _awq_codes(parts["qzeros"], num_outputs)
    groups = _groups(None, num_inputs, scales.shape[0])
    return _checked(((codes - zeros[groups]) * scales[groups]).t(), shape)


def _awq_codes(packed: Tensor, num_outputs: int) -> Tensor:
    codes = unpacked(packed, _AWQ_BITS, num_outputs)
    eights = codes.view(codes.shape[0], -1, len(_AWQ_PLACES))
    return eights[..., _AWQ_PLACES].flatten(1)


def _packed(parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    num_outputs, num_inputs = shape
    packed = parts["weight_packed"]
    bits = _bits_of(packed.shape[1], num_inputs)
    middle = 1 << (bits - 1)
    codes = unpacked(packed, bits, num_inputs) - middle
    scales = parts["weight_scale"].float()
    groups = _groups(parts.get("weight_g_idx"), num_inputs, scales.shape[1])
    zeros = parts.get("weight_zero_point")
    if zeros is None:
        return _checked(codes * scales[:, groups], shape)
    if zeros.dtype == torch.int32:
        zeros = unpacked(zeros.t(), bits, num_outputs).t() - middle
    return _checked((codes - zeros.int()[:, groups]) * scales[:, groups], shape)


def _scaled(
    parts: Mapping[str, Tensor], shape: torch.Size, block: tuple[int, int] | None
) -> Tensor:
    scales = parts.get("weight_scale", parts.get("weight_scale_inv"))
    assert scales is not None
    values = _checked(parts["weight"].float(), shape)
    zeros = parts.get("weight_zero_point")
    if zeros is not None:
        values = values - _spread(zeros.float(), shape, block)
    return values * _spread(scales.float(), shape, block)


def _spread(scales: Tensor, shape: torch.Size, block: tuple[int, int] | None) -> Tensor:
    """As many as weights, or fewer that broadcast: of all, outputs, groups of inputs, or blocks."""
    num_outputs, num_inputs = shape
    if scales.numel() == 1:
        return scales.reshape(1, 1)
    if scales.dim() == 1:
        scales = scales.unsqueeze(1)
    if scales.shape[0] == num_outputs:
        return scales[:, _groups(None, num_inputs, scales.shape[1])]
    if block is None or scales.shape != tuple(
        math.ceil(size / length) for size, length in zip(shape, block, strict=True)
    ):
        raise ValueError(f"scales of shape {list(scales.shape)} do not fit blocks of {block}")
    by_row = scales.repeat_interleave(block[0], 0)[:num_outputs]
    return by_row.repeat_interleave(block[1], 1)[:, :num_inputs]


def _groups(stored: Tensor | None, num_inputs: int, num_groups: int) -> Tensor:
    """The group of each input: as stored, or equal ones in order."""
    if stored is None:
        if num_groups < 1:
            raise ValueError("it has no groups")
        size = math.ceil(num_inputs / num_groups)
        return torch.arange(num_inputs) // size
    if stored.shape != (num_inputs,) or stored.min() < 0 or stored.max() >= num_groups:
        raise ValueError(f"its inputs are not in groups from 0 to {num_groups - 1}")
    return stored.long()


def _bits_of(num_words: int, count: int) -> int:
    """The size of numbers of which `count` fill that many words of 32 bits, the last in part."""
    for bits in range(1, 9):
        if math.ceil(count * bits / 32) == num_words:
            return bits
    raise ValueError(f"{count} numbers of up to 8 bits do not fill {num_words} words of 32")


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of `bits` bits in each row of words, dense, lowest bits first.

    words: [rows, ceil(count * bits / 32)] int32 -> [rows, count] int32
    """
    if words.dtype != torch.int32:
        raise ValueError(f"its words are {words.dtype}, expected torch.int32")
    wide = words.long() & 0xFFFFFFFF
    # A number may continue in the next word.
    pairs = wide | torch.cat((wide[:, 1:], torch.zeros_like(wide[:, :1])), 1) << 32
    starts = torch.arange(count, device=words.device) * bits
    return (pairs[:, starts // 32] >> (starts % 32) & (1 << bits) - 1).int()


def _block_size(quantisation: Mapping[str, Any]) -> tuple[int, int] | None:
    """Outputs and inputs that share a scale, if it is said."""
    found = quantisation.get("weight_block_size")
    for group in (quantisation.get("config_groups") or {}).values():
        found = found or (group.get("weights") or {}).get("block_structure")
    return None if found is None else (int(found[0]), int(found[1]))


def _checked(weight: Tensor, shape: torch.Size) -> Tensor:
    if weight.shape != shape:
        raise ValueError(f"its parts make {list(weight.shape)}")
    return weight
