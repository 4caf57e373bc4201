"""Converts GGUF files once to the safetensors directory that all other code reads.

transformers does the reading: it dequantises, undoes the permutation of Llama's
query and key weights, and rebuilds the tokenizer. It ignores metadata that it does not know, so
what it does not read is set here, and what neither reads is refused by name. Weights are stored
in float32, which represents the dequantised values exactly.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmesh.workers.errors import ConfigError, UnsupportedModelError

_MAGIC = b"GGUF"
_BYTES_PER_GGUF_BYTE = 8  # float32 from 4-bit blocks


def is_gguf(file: Path) -> bool:
    """Whether `file` begins like a GGUF file."""
    with file.open("rb") as stream:
        return stream.read(4) == _MAGIC


def converted_bytes(file: Path) -> int:
    """An upper bound of what the conversion of `file` writes."""
    return file.stat().st_size * _BYTES_PER_GGUF_BYTE


@dataclass(frozen=True, slots=True)
class _Kind:
    """An architecture of GGUF, and which of its metadata transformers does not read.

    config: metadata -> attribute of the configuration that it is
    equal: metadata -> attribute that it must repeat, because no other value is represented
    """

    config: Mapping[str, str] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)


_WHOLE_HEADS = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
}
_OWN_HEAD_DIM = {name: of for name, of in _WHOLE_HEADS.items() if name != "attention.key_length"}
_KINDS: Mapping[str, _Kind] = {
    "llama": _Kind(equal=_WHOLE_HEADS),
    "qwen2": _Kind(equal=_WHOLE_HEADS),
    "qwen3": _Kind({"attention.key_length": "head_dim"}, _OWN_HEAD_DIM),
    "qwen3moe": _Kind(
        {
            "attention.key_length": "head_dim",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        {
            **_OWN_HEAD_DIM,
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
        },
    ),
}
# Metadata that transformers reads for all of them.
_READ = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.freq_base",
        "vocab_size",
    }
)
# Values that say nothing.
_NEUTRAL: tuple[object, ...] = (None, 0, 0.0, False, "", "none", [])


def convert_gguf(file: Path, target: Path) -> None:
    """Convert the model in `file` to safetensors in directory `target`, with its tokenizer.

    Raises UnsupportedModelError for a model whose conversion was not checked,
    ConfigError naming a file that is malformed.
    """
    values = check_gguf(file)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # transformers draws progress bars on stderr, and none of its settings disables them here.
    with contextlib.redirect_stderr(io.StringIO()):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        _complete(file, config, values)
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
        )
        _check_report(file, report)
        # The weights are no longer quantised, but with these two set transformers does not save.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(target)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.save_pretrained(target)


def _complete(file: Path, config: Any, values: Mapping[str, Any]) -> None:
    """Set in `config` what transformers does not read from the metadata `values`.

    Raises UnsupportedModelError for metadata that it cannot express.
    """
    architecture = values["general.architecture"]
    kind = _KINDS[architecture]
    found = {
        name.removeprefix(f"{architecture}."): value
        for name, value in values.items()
        if name.startswith(f"{architecture}.")
    }
    for name, attribute in kind.config.items():
        if name in found:
            setattr(config, attribute, found[name])
    for name, attribute in kind.equal.items():
        own = getattr(config, attribute, None)
        if attribute == "head_dim" and own is None:
            own = config.hidden_size // config.num_attention_heads
        if found.get(name, own) != own:
            raise _refused(
                file, f"{architecture}.{name} is {found[name]}, but its {attribute} is {own}"
            )


def _check_report(file: Path, report: Mapping[str, Any]) -> None:
    """Check for mismatches, since transformers fills missing weights with random numbers."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise UnsupportedModelError(
                "model", f"{file}: {what.replace('_', ' ')} in the conversion: {min(report[what])}"
            )


def check_gguf(file: Path) -> Mapping[str, Any]:
    """Refuse files whose conversion would lose something or was never checked.

    Returns the file's metadata without its tokenizer.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        values = {
            name: entry.contents()
            for name, entry in reader.fields.items()
            if not name.startswith("tokenizer.ggml.")
        }
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ConfigError("model", f"{file} is not a complete GGUF file: {error}") from error
    architecture = values.get("general.architecture")
    kind = _KINDS.get(str(architecture))
    if kind is None:
        raise _refused(
            file,
            f"GGUF files of architecture {architecture!r} are not supported, only of"
            f" {', '.join(_KINDS)}",
        )
    if any(tensor.name.startswith(("rope_freqs", "rope_factors")) for tensor in reader.tensors):
        raise _refused(file, "its RoPE scaling would be lost in the conversion")
    known = {*_READ, *kind.config, *kind.equal}
    lost = sorted(
        name
        for name, value in values.items()
        if name.startswith(f"{architecture}.")
        and name.removeprefix(f"{architecture}.") not in known
        and value not in _NEUTRAL
    )
    if lost:
        raise _refused(file, f"{', '.join(lost)} would be lost in the conversion")
    return values


def _refused(file: Path, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError("model", f"{file}: {reason}; use its safetensors weights")
