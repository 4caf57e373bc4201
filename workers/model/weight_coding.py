"""How many bytes weights take on GPUs, by how they are stored. Torch-free.

With `engine.weight_format: exact` that follows from a checkpoint's `quantization_config`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvmesh.workers.model.quantisation import quantisation_of

_BLOCK = 32  # inputs, of which 4-bit codes are stored whole
BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class WeightCoding:
    """bits: of a code, 4 or 8
    group: inputs that share a scale; 0 for all of an output
    scale_bytes, zero_bytes: of a group's scale, and of its zero, 0 without
    index_bytes: of an input's group, 0 where they are in order
    """

    bits: int
    group: int
    scale_bytes: int
    zero_bytes: int = 0
    index_bytes: int = 0

    def bytes_of(self, outputs: int, inputs: int) -> int:
        """Of a weight [outputs, inputs]."""
        codes = -(-inputs // _BLOCK) * _BLOCK // 2 if self.bits == 4 else inputs
        groups = -(-inputs // self.group) if self.group else 1
        each = codes + groups * (self.scale_bytes + self.zero_bytes)
        return outputs * each + inputs * self.index_bytes


# Of weights that are rounded at load, as kernels/linear/grouped.py does it.
ONLINE: Mapping[str, WeightCoding] = {
    "int4": WeightCoding(4, 32, 2, 2),
    "int8": WeightCoding(8, 128, 2),
    "fp8": WeightCoding(8, 0, 4),
}


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """linears, experts, head: how they are coded, None in the compute dtype
    left_out: whether the checkpoint has not quantised a module, by its name
    """

    linears: WeightCoding | None = None
    experts: WeightCoding | None = None
    head: WeightCoding | None = None
    left_out: Callable[[str], bool] = lambda _name: False

    @property
    def is_coded(self) -> bool:
        return bool(self.linears or self.experts or self.head)

    @classmethod
    def of(cls, weight_format: str, config: Mapping[str, Any]) -> StoredWeights:
        """weight_format: as in `engine`; config: the contents of config.json"""
        online = ONLINE.get(weight_format)
        if online is not None:
            return cls(online, online, ONLINE["int8"] if weight_format == "int4" else online)
        quantisation = quantisation_of(config)
        if weight_format == "decoded" or quantisation is None:
            return cls()
        if quantisation.get("quant_method") == "mxfp4":
            return cls(experts=WeightCoding(4, 32, 1))
        coding = _coding(quantisation)
        left_out = _left_out(quantisation)
        head: WeightCoding | None = None
        if coding and (quantisation.get("lm_head") or _targets_head(quantisation, left_out)):
            head = coding
        return cls(coding, coding, head, left_out)


def _coding(quantisation: Mapping[str, Any]) -> WeightCoding | None:
    """Of linears; an estimate of what the tensors say, such as their scales' dtypes."""
    method = quantisation.get("quant_method")
    group = quantisation.get("group_size", 128)
    group = group if type(group) is int and group > 0 else 0
    if method == "gptq":
        bits = 4 if quantisation.get("bits", 4) <= 4 else 8
        return WeightCoding(bits, group, 2, 1, 4 if quantisation.get("desc_act") else 0)
    if method == "awq":
        return WeightCoding(4, group, 2, 1)
    if method == "fp8":
        block = quantisation.get("weight_block_size")
        return WeightCoding(8, int(block[1]) if block else 0, 4)
    for found in (quantisation.get("config_groups") or {}).values():
        weights = found.get("weights") or {}
        bits, size = weights.get("num_bits", 8), weights.get("group_size")
        block = weights.get("block_structure")
        group = int(block[1]) if block else size if type(size) is int and size > 0 else 0
        zero = 0 if weights.get("symmetric", True) else 1
        return WeightCoding(4 if bits <= 4 else 8, group, 2, zero)
    return None


def _left_out(quantisation: Mapping[str, Any]) -> Callable[[str], bool]:
    names = [
        *(quantisation.get("modules_to_not_convert") or ()),
        *(quantisation.get("ignore") or ()),
        *(quantisation.get("ignored_layers") or ()),
    ]
    patterns = [re.compile(name[3:]) for name in names if name.startswith("re:")]
    plain = [name for name in names if not name.startswith("re:")]
    return lambda module: (
        any(module == name or f".{name}." in f".{module}." for name in plain)
        or any(pattern.match(module) for pattern in patterns)
    )


def _targets_head(quantisation: Mapping[str, Any], left_out: Callable[[str], bool]) -> bool:
    """compressed-tensors quantises every linear that is not left out."""
    return quantisation.get("quant_method") == "compressed-tensors" and not left_out("lm_head")
