"""Converts GGUF files once to the safetensors directory that all other code reads.

The gguf package names and dequantises tensors, transformers rebuilds the tokenizer. Weights are
stored in float32, which represents the dequantised values exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.architectures import ARCHITECTURES
from kvmesh.workers.model.gguf_config import config_of_gguf
from kvmesh.workers.model.gguf_metadata import GGUFMetadata
from kvmesh.workers.model.gguf_tokenizer import check_tokenizer, convert_tokenizer

_MAGIC = b"GGUF"
_WEIGHT_BYTES = 4  # float32
_OTHER_BYTES = 64 << 20  # more than the tokenizer of any model takes
_SHARD_BYTES = 4 << 30
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_UNREAD = frozenset({"tokenizer.ggml.merges", "tokenizer.ggml.scores"})  # large
# Their norms multiply by 1 + weight, which is what the file has.
_CENTRED_NORMS = frozenset({"gemma2", "gemma3"})


def is_gguf(file: Path) -> bool:
    """Whether `file` begins like a GGUF file."""
    with file.open("rb") as stream:
        return stream.read(4) == _MAGIC


def check_gguf(file: Path) -> int:
    """An upper bound of the bytes that the conversion of `file` writes.

    Raises UnsupportedModelError for a file whose conversion would lose something or was never
    checked, ConfigError naming a file that is malformed.
    """
    metadata = _metadata(file, _read(file))
    _config(metadata)
    weights = sum(math.prod(shape) for shape in metadata.shapes.values())
    return weights * _WEIGHT_BYTES + _OTHER_BYTES


def convert_gguf(file: Path, target: Path) -> None:
    """Convert the model in `file` to safetensors in directory `target`, with its tokenizer.

    Raises as `check_gguf`, and for tensors that are missing or not of the model.
    """
    reader = _read(file)
    metadata = _metadata(file, reader)
    config = _config(metadata)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    names = _names(file, metadata, config)
    _save(_tensors(reader, names, metadata.architecture, config), target)
    convert_tokenizer(file, metadata, target)


def _config(metadata: GGUFMetadata) -> dict[str, Any]:
    check_tokenizer(metadata)
    return config_of_gguf(metadata)


def _read(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ConfigError("model", f"{file} is not a complete GGUF file: {error}") from error


def _metadata(file: Path, reader: Any) -> GGUFMetadata:
    from gguf import dequantize

    try:
        values = {
            name: entry.contents() for name, entry in reader.fields.items() if name not in _UNREAD
        }
    except (ValueError, IndexError, KeyError) as error:
        raise ConfigError("model", f"{file} is not a complete GGUF file: {error}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in tensors.items()}
    factors = {
        name: dequantize(tensors[name].data, tensors[name].tensor_type)
        for name in _FACTORS
        if name in tensors
    }
    return GGUFMetadata(file, values, shapes, factors)


def _names(
    file: Path, metadata: GGUFMetadata, config: Mapping[str, Any]
) -> Mapping[str, list[str]]:
    """The names in the file that each of the model's tensors is made of.

    Raises UnsupportedModelError for tensors that are missing, of other shapes, or not used.
    """
    import gguf
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    their_names = gguf.get_tensor_name_map(
        kinds[metadata.architecture], config["num_hidden_layers"]
    )
    model_type = ARCHITECTURES[config["architectures"][0]].model_type
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(dict(config)))
    model.tie_weights()
    found: dict[str, list[str]] = {}
    unused = metadata.shapes.keys() - set(_FACTORS)
    for name, weight in model.named_parameters():
        if name.endswith(".experts.gate_up_proj"):
            layer = name.split(".")[2]
            parts = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up")]
        else:
            with_suffix = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
            parts = [their_names.get_name(with_suffix, (".weight", ".bias")) or name]
        for part in parts:
            shape = metadata.shapes.get(part)
            if shape is None:
                raise metadata.refused(f"it has no tensor {part} ({name})")
            rows = weight.shape[1] // 2 if len(parts) == 2 else None
            expected = (
                tuple(weight.shape) if rows is None else (len(weight), rows, *weight.shape[2:])
            )
            if shape != expected:
                raise metadata.refused(f"{part} has shape {shape}, expected {expected}")
        found[name] = parts
        unused -= set(parts)
    if unused:
        raise metadata.refused(f"{min(unused)} is not a tensor of {config['architectures'][0]}")
    return found


def _tensors(
    reader: Any, names: Mapping[str, list[str]], architecture: str, config: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The model's tensors, [name, array], as transformers stores them."""
    import numpy as np
    from gguf import dequantize

    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, parts in names.items():
        arrays = [dequantize(stored[part].data, stored[part].tensor_type) for part in parts]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
        if architecture in _CENTRED_NORMS and name.endswith("norm.weight"):
            array = array - 1
        if architecture == "llama" and ".self_attn.q_proj." in name:
            array = _halves(array, config["num_attention_heads"])
        if architecture == "llama" and ".self_attn.k_proj." in name:
            array = _halves(array, config["num_key_value_heads"])
        yield name, np.ascontiguousarray(array, dtype=np.float32)


def _halves(array: Any, heads: int) -> Any:
    """Rows whose pairs are neighbours, as llama.cpp rotates Llama's, as the halves of a head."""
    by_pair = array.reshape(heads, -1, 2, *array.shape[1:])
    return by_pair.swapaxes(1, 2).reshape(array.shape)


def _save(tensors: Iterator[tuple[str, Any]], target: Path) -> None:
    """Write safetensors files of limited size, so that memory holds no more than one.

    Raises ConfigError if the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    files: dict[str, str] = {}
    for number, shard in enumerate(_shards(tensors), start=1):
        file = f"model-{number:05}.safetensors"
        try:
            save_file(shard, target / file, metadata={"format": "pt"})
        except SafetensorError as error:  # also for the system's errors
            raise ConfigError(
                "model", f"the converted weights cannot be written to {target.parent}: {error}"
            ) from error
        files |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": files}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(tensors: Iterator[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    shard: dict[str, Any] = {}
    for name, array in tensors:
        shard[name] = array
        if sum(part.nbytes for part in shard.values()) >= _SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard
