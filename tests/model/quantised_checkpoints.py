"""Writes checkpoints as the tools of each method lay them out, and what they mean.

The packing is written here one number at a time, as the formats are described, and shares no code
with the reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
# name -> (quantization_config, weight [outputs, inputs] -> (tensors by their last name, meaning))
Quantise = Callable[[Tensor, torch.Generator], tuple[dict[str, Tensor], Tensor]]


def pack_dense(codes: list[list[int]], bits: int) -> Tensor:
    """Rows of numbers as rows of int32, lowest bits first."""
    rows = []
    for row in codes:
        value = sum(code << (bits * place) for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words = [(value >> (32 * word)) & 0xFFFFFFFF for word in range(count)]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def affine(weight: Tensor, bits: int, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes [outputs, inputs], scales and zero points [outputs, groups]."""
    top, count = (1 << bits) - 1, int(groups.max()) + 1
    scales = torch.empty(weight.shape[0], count)
    zeros = torch.empty(weight.shape[0], count, dtype=torch.int32)
    codes = torch.empty(weight.shape, dtype=torch.int32)
    for group in range(count):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[:, group] = ((high - low) / top).half().float()
        zeros[:, group] = (-low / scales[:, group]).round().clamp(1, top)
        found = part / scales[:, group, None] + zeros[:, group, None]
        codes[:, groups == group] = found.round().clamp(0, top).int()
    return codes, scales, zeros


def gptq(bits: int, *, act_order: bool = False, shift: int = 1) -> Quantise:
    def quantise(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        num_inputs = weight.shape[1]
        groups = torch.arange(num_inputs) // GROUP
        if act_order:
            groups = groups[torch.randperm(num_inputs, generator=generator)]
        codes, scales, zeros = affine(weight, bits, groups)
        stored = {
            "qweight": pack_dense(codes.tolist(), bits).t().contiguous(),
            "qzeros": pack_dense((zeros.t() - shift).tolist(), bits),
            "scales": scales.t().half().contiguous(),
            "g_idx": groups.int(),
        }
        return stored, (codes - zeros[:, groups]) * scales[:, groups]

    return quantise


def awq(weight: Tensor, _generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    groups = torch.arange(weight.shape[1]) // GROUP
    codes, scales, zeros = affine(weight, 4, groups)

    def pack(rows: Tensor) -> Tensor:
        eights = rows.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)
        return pack_dense(eights.tolist(), 4)

    stored = {
        "qweight": pack(codes.t()),
        "qzeros": pack(zeros.t()),
        "scales": scales.t().half().contiguous(),
    }
    return stored, (codes - zeros[:, groups]) * scales[:, groups]


def fp8_blocks(weight: Tensor, _generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Blocks of 48 by 40, which do not divide the weight."""
    rows, columns = 48, 40
    spread = torch.empty_like(weight)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = spread[block] = weight[block].abs().max() / 448
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * spread


def fp8_tensor(weight: Tensor, _generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return stored, codes.float() * scale


def compressed(bits: int, *, packed: bool) -> Quantise:
    """compressed-tensors' integers, which are signed; packed ones count from the lowest."""

    def quantise(weight: Tensor, _generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        size = GROUP if packed else weight.shape[1]
        groups = torch.arange(weight.shape[1]) // size
        codes, scales, zeros = affine(weight, bits, groups)
        meant = (codes - zeros[:, groups]) * scales[:, groups]
        if packed:
            return {
                "weight_packed": pack_dense(codes.tolist(), bits),
                "weight_scale": scales,
                "weight_zero_point": pack_dense(zeros.t().tolist(), bits).t().contiguous(),
                "weight_shape": torch.tensor(weight.shape),
            }, meant
        middle = 1 << (bits - 1)
        signed = {"weight": codes - middle, "weight_zero_point": zeros - middle}
        return {**{k: v.to(torch.int8) for k, v in signed.items()}, "weight_scale": scales}, meant

    return quantise


GPTQ = {"quant_method": "gptq", "group_size": GROUP}
COMPRESSED = {"quant_method": "compressed-tensors"}
CHECKPOINTS: dict[str, tuple[dict[str, Any], Quantise]] = {
    "gptq-4": ({**GPTQ, "bits": 4}, gptq(4)),
    "gptq-3": ({**GPTQ, "bits": 3}, gptq(3)),
    "gptq-8": ({**GPTQ, "bits": 8}, gptq(8)),
    "gptq-act-order": ({**GPTQ, "bits": 4, "desc_act": True}, gptq(4, act_order=True)),
    "gptq-v2": ({**GPTQ, "bits": 2, "checkpoint_format": "gptq_v2"}, gptq(2, shift=0)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "packed-4": ({**COMPRESSED, "format": "pack-quantized"}, compressed(4, packed=True)),
    "packed-3": ({**COMPRESSED, "format": "pack-quantized"}, compressed(3, packed=True)),
    "int8": ({**COMPRESSED, "format": "int-quantized"}, compressed(8, packed=False)),
    "fp8-blocks": ({"quant_method": "fp8", "weight_block_size": [48, 40]}, fp8_blocks),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor),
}


def quantise_checkpoint(path: Path, config: dict[str, Any], quantise: Quantise) -> None:
    """Quantise the linears of the checkpoint in `path`; what they mean goes to <path>-plain."""
    plain = path.with_name(path.name + "-plain")
    plain.mkdir()
    for file in path.iterdir():
        if file.is_file():
            (plain / file.name).write_bytes(file.read_bytes())
    (file,) = path.glob("*.safetensors")
    tensors, meaning = load_file(file), load_file(file)
    generator = torch.Generator().manual_seed(5)
    for name, weight in list(tensors.items()):
        if ".layers." in name and weight.dim() == 2 and not name.endswith(".gate.weight"):
            parts, meant = quantise(tensors.pop(name).float(), generator)
            base = name.removesuffix("weight")
            tensors |= {base + part: tensor.contiguous() for part, tensor in parts.items()}
            meaning[name] = meant.to(weight.dtype)
    save_file(tensors, file, {"format": "pt"})
    save_file(meaning, plain / file.name, {"format": "pt"})
    contents = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**contents, "quantization_config": config}))
