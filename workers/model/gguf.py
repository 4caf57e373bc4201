"""Converts GGUF files once to the safetensors directory that all other code reads.

transformers does the reading: it dequantises, undoes the permutation of Llama's
query and key weights, and rebuilds the tokenizer. Weights are stored in float32,
which represents the dequantised values exactly.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
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


def convert_gguf(file: Path, target: Path) -> None:
    """Convert the model in `file` to safetensors in directory `target`, with its tokenizer.

    Raises UnsupportedModelError for a model whose conversion was not checked,
    ConfigError naming a file that is malformed.
    """
    check_gguf(file)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers draws progress bars on stderr, and none of its settings disables them here.
    with contextlib.redirect_stderr(io.StringIO()):
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        _check_report(file, report)
        # The weights are no longer quantised, but with these two set transformers does not save.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(target)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.save_pretrained(target)


def _check_report(file: Path, report: Mapping[str, Any]) -> None:
    """Check for mismatches, since transformers fills missing weights with random numbers."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise UnsupportedModelError(
                "model", f"{file}: {what.replace('_', ' ')} in the conversion: {min(report[what])}"
            )


def check_gguf(file: Path) -> None:
    """Refuse files whose conversion would lose something or was never checked."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        values = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.ggml.")
        }
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ConfigError("model", f"{file} is not a complete GGUF file: {error}") from error
    architecture = values.get("general.architecture")
    reason = None
    if architecture != "llama":
        reason = f"GGUF files of architecture {architecture!r} are not supported, only 'llama'"
    elif values.get("llama.expert_count"):
        reason = "mixtures of experts are not supported"
    elif values.get("llama.rope.scaling.type", "none") != "none" or any(
        tensor.name.startswith("rope_freqs") for tensor in reader.tensors
    ):
        reason = "its RoPE scaling would be lost in the conversion"
    if reason is not None:
        raise UnsupportedModelError("model", f"{file}: {reason}; use its safetensors weights")
