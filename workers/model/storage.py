"""How a rank stores the weights of linears, experts and the output projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvmesh.kernels.linear import GroupedFormat, PackedWeight, pack, quantise
from kvmesh.kernels.linear import WeightFormat as PackedFormat
from kvmesh.workers.config import WeightFormatName
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.parallel.linears import Stored

# Of a linear's weight [outputs, inputs], or those of experts, [experts, outputs, inputs].
Pack = Callable[[Tensor], Stored]


@dataclass(frozen=True, slots=True)
class Storage:
    """pack: linears and experts; head: an output projection with weights of its own; tied_head:
    one that has the embeddings'

    keeps_bits: what a checkpoint has quantised is not decoded
    """

    pack: Pack
    head: Pack
    tied_head: Pack
    keeps_bits: bool = False

    @classmethod
    def of(
        cls, weight_format: WeightFormatName, dtype: torch.dtype, device: torch.device
    ) -> Storage:
        """Raises ConfigError naming `weight_format` where nothing multiplies with such weights."""
        if multiplies_grouped(device):
            return _for_gpus(weight_format)
        if dtype == torch.float32:
            return _for_loops(weight_format)
        if weight_format in ("exact", "decoded"):
            return cls(_as_it_is, _as_it_is, _as_it_is)
        raise ConfigError(
            "weight_format",
            f"{weight_format} needs a GPU, or float32 on a CPU; got {device.type} and "
            f"{str(dtype).removeprefix('torch.')}; use exact",
        )


def multiplies_grouped(device: torch.device) -> bool:
    """Whether kernels there multiply with `GroupedWeight`."""
    return device.type == "cuda"


def _for_gpus(weight_format: WeightFormatName) -> Storage:
    if weight_format == "exact" or weight_format == "decoded":
        return Storage(_as_it_is, _as_it_is, _as_it_is, keeps_bits=weight_format == "exact")
    # The largest product has the largest say in what a token is. Embeddings are not rounded, so
    # that those which are the output projection, too, are not stored twice.
    head: GroupedFormat = "int8" if weight_format == "int4" else weight_format
    return Storage(_quantiser(weight_format), _quantiser(head), _as_it_is)


def _for_loops(weight_format: WeightFormatName) -> Storage:
    """Of CPUs, which compute in fp32."""
    if weight_format == "fp8":
        # Rounded as on GPUs, to measure what that costs; there is no loop for it.
        in_fp8 = _naming(_in_fp8)
        return Storage(in_fp8, in_fp8, partial(_packed, "exact"))
    if weight_format == "decoded":
        return Storage(_as_it_is, _as_it_is, _as_it_is)
    head: PackedFormat = "int8" if weight_format == "int4" else weight_format
    packed, packed_head = (_naming(partial(_packed, kind)) for kind in (weight_format, head))
    return Storage(packed, packed_head, packed_head)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _quantiser(weight_format: GroupedFormat) -> Pack:
    return _naming(lambda weight: quantise(weight, weight_format))


def _naming(pack_one: Pack) -> Pack:
    """The same, with ConfigError for weights that cannot be rounded."""

    def named(weight: Tensor) -> Stored:
        try:
            return pack_one(weight)
        except ValueError as error:
            raise ConfigError("weight_format", f"the checkpoint's {error}; use exact") from error

    return named


def _packed(weight_format: PackedFormat, weight: Tensor) -> PackedWeight:
    """Experts' one below the other."""
    return pack(weight.flatten(0, -2), weight_format)


def _in_fp8(weight: Tensor) -> PackedWeight:
    return pack(quantise(weight, "fp8").decoded().flatten(0, -2).contiguous(), "exact")
