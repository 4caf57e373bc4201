"""What each layer of a model is, by its configuration: windows, RoPE, states. Torch-free.

The tables below name the rules; an architecture (architectures.py) has one of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.state_shape import StateShape


def layers_of(config: Mapping[str, Any]) -> range:
    return range(int(config["num_hidden_layers"]))


def _no_layer(config: Mapping[str, Any]) -> tuple[bool, ...]:
    return (False,) * len(layers_of(config))


def _every_layer(config: Mapping[str, Any]) -> tuple[bool, ...]:
    return (True,) * len(layers_of(config))


def _typed_or_every_layer(config: Mapping[str, Any]) -> tuple[bool, ...]:
    return _typed(config) or _every_layer(config)


def _if_enabled(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Qwen3-MoE: every layer, if enabled."""
    return (bool(config.get("use_sliding_window", False)),) * len(layers_of(config))


def _upper_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Qwen2 and Qwen3: the layers from `max_window_layers` on, if enabled."""
    if not config.get("use_sliding_window", False):
        return _no_layer(config)
    first = int(config.get("max_window_layers", 28))
    return _typed(config) or tuple(layer >= first for layer in layers_of(config))


def _unrotated_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """SmolLM3: the layers without RoPE, if enabled."""
    if not config.get("use_sliding_window", False) or config.get("sliding_window") is None:
        return _no_layer(config)
    return _typed(config) or tuple(not rotated for rotated in _by_no_rope_layers(config, ()))


def _rotated_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Llama 4: the layers with RoPE."""
    return _typed(config) or _by_no_rope_layers(config, ())


def _all_but_every(period: int) -> Any:
    """All but the layers `period`, 2 * `period`, … counted from 1."""

    def slides(config: Mapping[str, Any]) -> tuple[bool, ...]:
        every = int(config.get("sliding_window_pattern") or period)
        return _typed(config) or tuple((layer + 1) % every != 0 for layer in layers_of(config))

    return slides


def _typed(config: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """What the configuration says of each layer, if it does."""
    types = config.get("layer_types")
    return tuple(kind in _WINDOWS for kind in types) if types else None


_WINDOWS = ("sliding_attention", "chunked_attention")


def _all_rotated(config: Mapping[str, Any], windows: tuple[int | None, ...]) -> tuple[bool, ...]:
    return (True,) * len(windows)


def _rotated_if_sliding(
    config: Mapping[str, Any], windows: tuple[int | None, ...]
) -> tuple[bool, ...]:
    """Cohere 2: only layers with a sliding window."""
    return tuple(window is not None for window in windows)


def _by_no_rope_layers(
    config: Mapping[str, Any], windows: tuple[int | None, ...]
) -> tuple[bool, ...]:
    """SmolLM3: `no_rope_layers` has 1 for layers with RoPE; by default 0 for every fourth."""
    flags = config.get("no_rope_layers")
    if flags:
        return tuple(bool(flags[layer]) for layer in layers_of(config))
    interval = int(config.get("no_rope_layer_interval", 4))
    return tuple((layer + 1) % interval != 0 for layer in layers_of(config))


def _rotated_if_rope(
    config: Mapping[str, Any], windows: tuple[int | None, ...]
) -> tuple[bool, ...]:
    """Granite 4: no layer, unless it says 'rope'."""
    return (config.get("position_embedding_type") == "rope",) * len(windows)


def _not_full_attention(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Qwen3-Next: all but every fourth layer, unless it says otherwise."""
    types = config.get("layer_types")
    if types:
        return tuple(kind == "linear_attention" for kind in types)
    every = int(config.get("full_attention_interval") or 4)
    return tuple((layer + 1) % every != 0 for layer in layers_of(config))


def _delta_net(config: Mapping[str, Any], layers: int) -> StateShape:
    """Of gated delta nets: a matrix for each head."""

    def number(name: str, default: int) -> int:
        return int(config.get(f"linear_{name}", default))

    key_heads, value_heads = number("num_key_heads", 16), number("num_value_heads", 32)
    key_dim, value_dim = number("key_head_dim", 128), number("value_head_dim", 128)
    return StateShape(
        layers=layers,
        channels=2 * key_heads * key_dim + value_heads * value_dim,
        tail=number("conv_kernel_dim", 4) - 1,
        memory=(value_heads, key_dim, value_dim),
        groups=key_heads,
    )


def _recurrent_blocks(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """RecurrentGemma: `block_types`, repeated."""
    kinds = config.get("block_types") or ("recurrent", "recurrent", "attention")
    return tuple(kinds[layer % len(kinds)] == "recurrent" for layer in layers_of(config))


def _no_recurrent_block(config: Mapping[str, Any]) -> tuple[bool, ...]:
    return tuple(not recurrent for recurrent in _recurrent_blocks(config))


def _gated_recurrence(config: Mapping[str, Any], layers: int) -> StateShape:
    """Of RecurrentGemma: a number for each channel."""
    width = int(config.get("lru_width") or config["hidden_size"])
    tail = int(config.get("conv1d_width", 4)) - 1
    return StateShape(layers, width, tail, (width,), int(config["num_attention_heads"]))


def _mamba_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Granite 4: all layers, unless it says otherwise, by the names of any version."""
    types = config.get("layer_types") or config.get("layers_block_type")
    if not types:
        return _every_layer(config)
    return tuple(kind in ("mamba", "linear_attention") for kind in types)


def _layers_without_attention(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Bamba: all but those that are listed."""
    listed = config.get("attn_layer_indices") or ()
    return tuple(layer not in listed for layer in layers_of(config))


def _mamba2(config: Mapping[str, Any], layers: int) -> StateShape:
    """Of Mamba-2: a matrix for each head; groups of heads share what is written and read."""

    def number(name: str, default: int) -> int:
        value = config.get(f"mamba_{name}", default)
        if type(value) is not int or value < 1:
            raise ConfigError("model", f"mamba_{name} must be a positive integer, got {value!r}")
        return value

    heads, groups, state = number("n_heads", 128), number("n_groups", 1), number("d_state", 256)
    if heads % groups:
        raise ConfigError("model", f"mamba_n_groups must divide mamba_n_heads, got {groups}")
    head_dim = config.get("mamba_d_head", "auto")
    if head_dim == "auto":
        head_dim = number("expand", 2) * int(config["hidden_size"]) // heads
    else:
        head_dim = number("d_head", 0)
    return StateShape(
        layers=layers,
        channels=heads * head_dim + groups * 2 * state,
        tail=number("d_conv", 4) - 1,
        memory=(heads, head_dim, state),
        groups=heads,
        shared_groups=groups,
        shared_channels=2 * state,
    )


# Layers that attend through a window.
SLIDING = {
    "none": _no_layer,
    "every layer": _every_layer,
    "every layer unless typed": _typed_or_every_layer,
    "every layer if enabled": _if_enabled,
    "upper layers": _upper_layers,
    "unrotated layers": _unrotated_layers,
    "rotated layers": _rotated_layers,
    "all but every second": _all_but_every(2),
    "all but every fourth": _all_but_every(4),
    "attention blocks": _no_recurrent_block,
    "all but every sixth": _all_but_every(6),
}
# Layers with RoPE, of those with windows.
ROTATED = {
    "none": _all_rotated,
    "full attention": _rotated_if_sliding,
    "no_rope_layers": _by_no_rope_layers,
    "all unless it says rope": _rotated_if_rope,
}
# Layers with a state instead of keys and values, and that state.
RECURRENT = {
    "none": _no_layer,
    "delta nets": _not_full_attention,
    "gated recurrences": _recurrent_blocks,
    "mamba": _mamba_layers,
    "mamba unless listed": _layers_without_attention,
}
STATES = {
    "delta nets": _delta_net,
    "gated recurrences": _gated_recurrence,
    "mamba": _mamba2,
    "mamba unless listed": _mamba2,
}
