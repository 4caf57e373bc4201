"""DBRX's configuration in the keys of the other architectures. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvmesh.workers.errors import UnsupportedModelError

# Ours -> DBRX's, in the file itself and in two sections of it.
_TOP = {
    "hidden_size": "d_model",
    "max_position_embeddings": "max_seq_len",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
}
_ATTENTION = {"clip_qkv": "clip_qkv", "num_key_value_heads": "kv_n_heads"}
_EXPERTS = {
    "intermediate_size": "ffn_hidden_size",
    "num_experts_per_tok": "moe_top_k",
    "num_local_experts": "moe_num_experts",
}
# Of sections: they say how it was trained, or what is read on its own.
_OTHER = frozenset(
    {
        "attn_pdrop",
        "ffn_act_fn",
        "hidden_size",
        "model_type",
        "moe_jitter_eps",
        "moe_loss_weight",
        "moe_normalize_expert_weights",
        "rope_theta",
    }
)


def dbrx_in_standard_keys(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The configuration `config`, of the model in directory `path`; changed only if it is DBRX's.

    Raises UnsupportedModelError for values that are not implemented.
    """
    if config.get("model_type") != "dbrx":
        return dict(config)
    attention, experts = config.get("attn_config") or {}, config.get("ffn_config") or {}
    known = {**_TOP, **_ATTENTION, **_EXPERTS}.values()
    found = {
        key: value
        for key, value in config.items()
        if key not in known and key not in ("attn_config", "ffn_config")
    }
    for names, section in ((_TOP, config), (_ATTENTION, attention), (_EXPERTS, experts)):
        found |= {ours: section[theirs] for ours, theirs in names.items() if theirs in section}
    for section in (attention, experts):  # what is left is judged like the file's own keys
        rest = {key: section[key] for key in section.keys() - _OTHER - set(known)}
        found = {**rest, **found}
    found["hidden_act"] = (experts.get("ffn_act_fn") or {}).get("name", "silu")
    theta = attention.get("rope_theta")
    if theta is not None:
        given = (found.get("rope_parameters") or {}).get("rope_theta", theta)
        if given != theta:
            raise _refused(path, f"rope_theta is {theta} in attn_config, but {given} elsewhere")
        found["rope_theta"] = theta
    if experts.get("moe_normalize_expert_weights", 1) != 1:
        raise _refused(path, "moe_normalize_expert_weights is not 1")
    if experts.get("hidden_size", found.get("hidden_size")) != found.get("hidden_size"):
        raise _refused(path, "hidden_size of ffn_config is not d_model")
    return found


def _refused(path: Path, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError("model", f"{path} (DbrxForCausalLM): {reason}")
