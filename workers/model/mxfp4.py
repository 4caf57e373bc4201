"""Weights stored in MXFP4 (OCP Microscaling Formats 1.0), decoded when they are loaded, or kept.

32 consecutive inputs of an output share a scale, a power of two; each is an e2m1 number:

    <name>_blocks   [..., outputs, inputs / 32, 16] uint8, two numbers a byte, the low half first
    <name>_scales   [..., outputs, inputs / 32] uint8, the exponent plus 127
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.kernels.linear import GroupedWeight, grouped
from kvmesh.kernels.linear.grouped import E2M1
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.weights import Weights

_BLOCK = 32


def from_mxfp4(
    weights: Weights,
    name: str,
    shape: tuple[int, int, int],
    experts: slice,
    outputs: slice,
    inputs: slice,
) -> Tensor | GroupedWeight:
    """Part of a tensor of `shape` [experts, outputs, inputs], decoded unless the weights keep their
    bits.

    Raises ConfigError naming `tp` if the part does not consist of whole blocks.
    """
    num_experts, num_outputs, num_inputs = shape
    first, end, _ = inputs.indices(num_inputs)
    if first % _BLOCK or end % _BLOCK:
        raise ConfigError(
            "tp",
            f"must split the {num_inputs} inputs of {name} between blocks of {_BLOCK}, which share "
            "a scale in MXFP4; or set expert_parallel",
        )
    blocks = slice(first // _BLOCK, end // _BLOCK)
    stored = (num_experts, num_outputs, num_inputs // _BLOCK)
    index = (experts, outputs, blocks)
    pairs = weights.part(f"{name}_blocks", torch.Size((*stored, _BLOCK // 2)), *index)
    exponents = weights.part(f"{name}_scales", torch.Size(stored), *index)
    if weights.keeps_bits:
        return keep_mxfp4(pairs, exponents)
    return decode_mxfp4(pairs, exponents, weights.dtype)


def keep_mxfp4(pairs: Tensor, exponents: Tensor) -> GroupedWeight:
    """pairs: [experts, outputs, blocks, 16] uint8; exponents: [experts, outputs, blocks] uint8"""
    experts = [
        grouped("e2m1", torch.stack((two & 15, two >> 4), -1).flatten(1), scales, group=_BLOCK)
        for two, scales in zip(pairs, exponents, strict=True)
    ]
    stacked = GroupedWeight.stacked(experts)
    assert stacked is not None
    return stacked


def decode_mxfp4(pairs: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """pairs: [..., blocks, 16] uint8; exponents: [..., blocks] uint8 -> [..., blocks * 32]"""
    table = torch.tensor(E2M1, dtype=torch.float32, device=pairs.device)
    out = torch.empty(*pairs.shape, 2, dtype=dtype, device=pairs.device)
    # One leading slice at a time, since indices take eight bytes each.
    scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 127)
    for at in range(pairs.shape[0]):
        codes = torch.stack((pairs[at] & 15, pairs[at] >> 4), dim=-1).int()
        out[at] = table[codes] * scales[at][..., None, None]
    return out.flatten(-3)
