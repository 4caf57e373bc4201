"""Which shard each module of a model is: how the ranks of a group divide its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

# What a rank has of a module, and what the module becomes (`Placer`).
Shard = Literal[
    "whole",
    # Linears: a rank has some of the outputs, or a part of every output's inputs.
    "rows",
    "rows of heads",
    "every row",
    "queries, keys, values",
    "gate, up",
    "channels",
    "gate, channels, steps",
    "columns",
    # Weights of other modules
    "weight rows",
    "weight rows of heads",
    "convolution",
    "module per head",
    "split norm",
    "experts",
    "router",
]

_Plan = Mapping[str, Shard]
_ATTENTION: _Plan = {
    **{f"layers.*.self_attn.{name}_proj": "rows of heads" for name in ("q", "k", "v")},
    "layers.*.self_attn.o_proj": "columns",
}


def _mlp(name: str) -> _Plan:
    """Of an MLP, by its module's name."""
    inward: _Plan = {f"{name}.{part}_proj": "rows" for part in ("gate", "up")}
    return {**inward, f"{name}.down_proj": "columns"}


_MLP: _Plan = _mlp("layers.*.mlp")
_JOINED_ATTENTION: _Plan = {
    "layers.*.self_attn.qkv_proj": "queries, keys, values",
    "layers.*.self_attn.o_proj": "columns",
}
_JOINED_MLP: _Plan = {
    "layers.*.mlp.gate_up_proj": "gate, up",
    "layers.*.mlp.down_proj": "columns",
}
_MAMBA2: _Plan = {
    "layers.*.mamba": "weight rows",
    "layers.*.mamba.in_proj": "gate, channels, steps",
    "layers.*.mamba.conv1d": "convolution",
    "layers.*.mamba.norm": "weight rows",
    "layers.*.mamba.out_proj": "columns",
}
_DELTA_NET: _Plan = {
    "layers.*.linear_attn": "weight rows",
    "layers.*.linear_attn.conv1d": "convolution",
    "layers.*.linear_attn.out_proj": "columns",
    # Of Qwen3-Next, by key heads, and of Qwen3.5, one after another.
    **{f"layers.*.linear_attn.in_proj_{name}": "rows" for name in ("qkvz", "ba", "z", "b", "a")},
    "layers.*.linear_attn.in_proj_qkv": "channels",
}
_EXPERTS: _Plan = {"layers.*.mlp.experts": "experts", "layers.*.mlp.gate": "router"}


def _norms(names: str, shard: Shard) -> _Plan:
    """Of queries and keys, that are not whole on every rank."""
    return {f"layers.*.self_attn.{side}_{names}": shard for side in ("q", "k")}


_LATENT: _Plan = {
    "layers.*.self_attn.q_proj": "rows of heads",
    "layers.*.self_attn.q_a_proj": "every row",
    "layers.*.self_attn.q_b_proj": "rows of heads",
    "layers.*.self_attn.kv_a_proj_with_mqa": "every row",
    "layers.*.self_attn.kv_b_proj": "weight rows of heads",
    "layers.*.self_attn.o_proj": "columns",
    **_MLP,
    **_mlp("layers.*.mlp.shared_experts"),
    **_EXPERTS,
}


# Norms over all heads: transformers replicates queries and keys for them; SplitRMSNorm makes that
# unnecessary. Norms per head are whole.
_PLANS: Mapping[str, _Plan] = {
    "olmo2": {**_ATTENTION, **_MLP, **_norms("norm", "split norm")},
    "olmo3": {**_ATTENTION, **_MLP, **_norms("norm", "split norm")},
    "olmoe": {**_ATTENTION, **_EXPERTS, **_norms("norm", "split norm")},
    "stablelm": {**_ATTENTION, **_MLP, **_norms("layernorm.norms.*", "module per head")},
    "cohere": {**_ATTENTION, **_MLP, **_norms("norm", "weight rows of heads")},
    "phi3": {**_JOINED_ATTENTION, **_JOINED_MLP},
    "glm": {**_ATTENTION, **_JOINED_MLP},
    "glm4": {**_ATTENTION, **_JOINED_MLP},
    "qwen3_moe": {**_ATTENTION, **_MLP, **_EXPERTS},
    "mixtral": {**_ATTENTION, **_EXPERTS},
    "qwen3_next": {
        **_ATTENTION,
        **_MLP,
        **_mlp("layers.*.mlp.shared_expert"),
        **_EXPERTS,
        **_DELTA_NET,
    },
    "qwen3_5_text": {**_ATTENTION, **_MLP, **_DELTA_NET},
    "qwen3_5_moe_text": {
        **_ATTENTION,
        **_mlp("layers.*.mlp.shared_expert"),
        **_EXPERTS,
        **_DELTA_NET,
    },
    "granitemoehybrid": {
        **_ATTENTION,
        **_MAMBA2,
        "layers.*.shared_mlp.input_linear": "gate, up",
        "layers.*.shared_mlp.output_linear": "columns",
        "layers.*.block_sparse_moe.experts": "experts",
        "layers.*.block_sparse_moe.router": "router",
    },
    "bamba": {**_ATTENTION, **_MAMBA2, **_mlp("layers.*.feed_forward")},
    "recurrent_gemma": {
        **{f"layers.*.temporal_block.{part}_proj": "rows of heads" for part in "qkv"},
        "layers.*.temporal_block.o_proj": "columns",
        "layers.*.temporal_block.linear_x": "rows",
        "layers.*.temporal_block.linear_y": "rows",
        "layers.*.temporal_block.linear_out": "columns",
        "layers.*.temporal_block.conv_1d": "weight rows",
        "layers.*.temporal_block.rg_lru": "weight rows",
        **_mlp("layers.*.mlp_block"),
    },
    "llama4_text": {
        **_ATTENTION,
        **_mlp("layers.*.feed_forward"),
        **_mlp("layers.*.feed_forward.shared_expert"),
        "layers.*.feed_forward.experts": "experts",
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "gpt_oss": {**_ATTENTION, **_EXPERTS, "layers.*.self_attn": "weight rows of heads"},
}
_DENSE: _Plan = {**_ATTENTION, **_MLP}


def shard_of(model_type: str, module: str) -> Shard:
    """How ranks divide the weights of a module of the base model, by its name there."""
    plan = _PLANS.get(model_type, _DENSE)
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", module), "whole")
