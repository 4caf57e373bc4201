"""Reads a rank's experts from a checkpoint, in whichever of the published layouts.

one by one   each expert's gate, up and down are tensors of their own, as nn.Linear has them
joined       gate_up_proj [experts, 2 * width, hidden] and down_proj [experts, hidden, width];
             Granite calls them input_linear and output_linear
Llama 4      gate_up_proj [experts, hidden, 2 * width] and down_proj [experts, width, hidden]
GPT-OSS      gate_up_proj [experts, hidden, 2 * width], whose columns are gate, up, gate, …,
             down_proj [experts, width, hidden], and biases; or both products in MXFP4
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvmesh.kernels.linear import GroupedWeight
from kvmesh.workers.model.mxfp4 import from_mxfp4
from kvmesh.workers.model.weights import Weights

logger = logging.getLogger(__name__)
Found = dict[str, Tensor | GroupedWeight]


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """What a rank has of a layer's experts.

    name: of the module in transformers
    experts: ids; width: of each expert's MLP; hidden: size of the model's states
    total_experts, total_width: over all ranks
    """

    name: str
    experts: range
    width: range
    hidden: int
    total_experts: int
    total_width: int


# Name of the module -> how checkpoints call it, and its gate, up and down.
_ONE_BY_ONE: Mapping[str, tuple[str, tuple[str, str, str]]] = {
    "mixtral": (".block_sparse_moe.", ("w1", "w3", "w2")),
    "qwen3_moe": (".mlp.", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_next": (".mlp.", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_5_moe_text": (".mlp.", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": (".mlp.", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v2": (".mlp.", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": (".mlp.", ("gate_proj", "up_proj", "down_proj")),
    "glm4_moe_lite": (".mlp.", ("gate_proj", "up_proj", "down_proj")),
}


def read_experts(weights: Weights, share: ExpertShare, model_type: str) -> Found:
    """gate_up, down and, if there are any, gate_up_bias and down_bias, as `Experts` takes them."""
    if model_type == "gpt_oss":
        return _read_gpt_oss(weights, share)
    if model_type == "llama4_text":
        return _read_llama4(weights, share)
    if f"{share.name}.gate_up_proj" in weights:
        return _read_joined(weights, share, f"{share.name}.gate_up_proj", f"{share.name}.down_proj")
    if model_type == "granitemoehybrid":
        block = share.name.removesuffix(".experts")
        names = (f"{block}.{part}_linear.weight" for part in ("input", "output"))
        return _read_joined(weights, share, *names)
    return _read_one_by_one(weights, share, *_ONE_BY_ONE[model_type])


def stored_router(weights: Weights, name: str, model_type: str) -> str:
    """How the checkpoint names the router that is `name` in transformers."""
    if model_type == "granitemoehybrid" and f"{name}.weight" not in weights:
        return f"{name}.layer"
    if f"{name}.weight" in weights or model_type not in _ONE_BY_ONE:
        return name
    block, _ = _ONE_BY_ONE[model_type]
    return name.replace(".mlp.", block)


def _read_one_by_one(
    weights: Weights, share: ExpertShare, block: str, names: tuple[str, str, str]
) -> Found:
    prefix = share.name.replace(".mlp.", block)
    inward = torch.Size((share.total_width, share.hidden))
    outward = torch.Size((share.hidden, share.total_width))
    ends = share.width.start, share.width.stop
    gate, up, down = names
    shapes = {gate: inward, up: inward, down: outward}
    for expert in range(share.total_experts):
        if expert not in share.experts:
            for name, shape in shapes.items():
                weights.leave(f"{prefix}.{expert}.{name}.weight", shape)
    kept = _kept_one_by_one(weights, share, prefix, names)
    if kept is not None:
        return kept
    # Filled expert by expert: two copies of all of them may not fit.
    gate_up = downs = None
    for at, expert in enumerate(share.experts):
        read_gate, read_up = (
            weights.rows(f"{prefix}.{expert}.{name}.weight", inward, *ends) for name in (gate, up)
        )
        read_down = weights.columns(f"{prefix}.{expert}.{down}.weight", outward, *ends)
        if gate_up is None or downs is None:
            count, width = len(share.experts), len(share.width)
            gate_up = read_gate.new_empty(count, 2 * width, share.hidden)
            downs = read_gate.new_empty(count, share.hidden, width)
        torch.cat((read_gate, read_up), out=gate_up[at])
        downs[at] = read_down
    assert gate_up is not None
    assert downs is not None
    return {"gate_up": gate_up, "down": downs}


def _kept_one_by_one(
    weights: Weights, share: ExpertShare, prefix: str, names: tuple[str, str, str]
) -> Found | None:
    """In the bits that they are stored with; None if they are not quantised, or not all alike."""
    inward = torch.Size((share.total_width, share.hidden))
    outward = torch.Size((share.hidden, share.total_width))
    width = _slice(share.width)
    ups, downs = [], []
    for expert in share.experts:
        gate, up, down = (
            weights.kept(f"{prefix}.{expert}.{name}.weight", shape)
            for name, shape in zip(names, (inward, inward, outward), strict=True)
        )
        if gate is None or up is None or down is None:
            return None
        both = GroupedWeight.joined([gate.rows(width), up.rows(width)])
        if both is None:
            logger.warning("%s: decoded, since gate and up are quantised differently", prefix)
            return None
        ups.append(both)
        downs.append(down.columns(width.start, width.stop))
    gate_up, down_all = GroupedWeight.stacked(ups), GroupedWeight.stacked(downs)
    if gate_up is None or down_all is None:
        logger.warning("%s: decoded, since its experts are quantised differently", prefix)
        return None
    return {"gate_up": gate_up, "down": down_all}


def _read_joined(weights: Weights, share: ExpertShare, inward: str, outward: str) -> Found:
    """inward, outward: the tensors' names"""
    experts, width = _slice(share.experts), _slice(share.width)
    shape = torch.Size((share.total_experts, 2 * share.total_width, share.hidden))
    ups = slice(width.start + share.total_width, width.stop + share.total_width)
    gate_up = [weights.part(inward, shape, experts, rows) for rows in (width, ups)]
    down = weights.part(
        outward,
        torch.Size((share.total_experts, share.hidden, share.total_width)),
        experts,
        slice(None),
        width,
    )
    return {"gate_up": torch.cat(gate_up, dim=1), "down": down}


def _read_llama4(weights: Weights, share: ExpertShare) -> Found:
    experts, width = _slice(share.experts), _slice(share.width)
    total, inner, hidden = share.total_experts, share.total_width, share.hidden
    ups = slice(width.start + inner, width.stop + inner)
    shape = torch.Size((total, hidden, 2 * inner))
    name = f"{share.name}.gate_up_proj"
    gate_up = [weights.part(name, shape, experts, slice(None), part).mT for part in (width, ups)]
    down = weights.part(
        f"{share.name}.down_proj", torch.Size((total, inner, hidden)), experts, width
    )
    return {"gate_up": torch.cat(gate_up, dim=1), "down": down.mT.contiguous()}


def _read_gpt_oss(weights: Weights, share: ExpertShare) -> Found:
    experts, width = _slice(share.experts), _slice(share.width)
    both = slice(2 * width.start, 2 * width.stop)
    total, inner, hidden = share.total_experts, share.total_width, share.hidden
    name = share.name
    if f"{name}.gate_up_proj_blocks" in weights:
        # Rows of outputs, blocks of 32 inputs.
        gate_up = from_mxfp4(
            weights, f"{name}.gate_up_proj", (total, 2 * inner, hidden), experts, both, slice(None)
        )
        down = from_mxfp4(
            weights, f"{name}.down_proj", (total, hidden, inner), experts, slice(None), width
        )
    else:
        shape = torch.Size((total, hidden, 2 * inner))
        gate_up = weights.part(f"{name}.gate_up_proj", shape, experts, slice(None), both).mT
        shape = torch.Size((total, inner, hidden))
        down = weights.part(f"{name}.down_proj", shape, experts, width).mT.contiguous()
    gate_up_bias = weights.part(
        f"{name}.gate_up_proj_bias", torch.Size((total, 2 * inner)), experts, both
    )
    found: Found = {
        "gate_up": _apart(gate_up),
        "down": down,
        "gate_up_bias": torch.cat((gate_up_bias[:, ::2], gate_up_bias[:, 1::2]), dim=1),
    }
    # Of experts split by width, the rank with the first part adds the bias.
    down_bias = weights.part(f"{name}.down_proj_bias", torch.Size((total, hidden)), experts)
    if share.width.start == 0:
        found["down_bias"] = down_bias
    return found


def _apart(gate_up: Tensor | GroupedWeight) -> Tensor | GroupedWeight:
    """Rows gate, up, gate, … -> those of the gate, then those of up"""
    if isinstance(gate_up, GroupedWeight):
        rows = torch.arange(gate_up.shape[1], device=gate_up.device)
        return gate_up.rows(torch.cat((rows[::2], rows[1::2])))
    return torch.cat((gate_up[:, ::2], gate_up[:, 1::2]), dim=1)


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)
