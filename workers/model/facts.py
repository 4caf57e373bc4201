"""Facts of a model that are known before any weight is loaded.

They are read from the model's JSON files and the headers of its weights without
torch, so that the control plane can use them. `load_model` checks these facts
against how transformers reads the same configuration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.architectures import ARCHITECTURES, Architecture
from kvmesh.workers.model.config_keys import keys_not_implemented
from kvmesh.workers.model.tensors import TensorInfo, read_tensors

NAME_FILE = "kvmesh.json"

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLE_BYTES = 1 << 16
_SAMPLES_PER_FILE = 16


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts of a model, over all ranks.

    revision: digest of configuration, tokenizer and weights (weights by header, size
        and samples), the same wherever the same files are stored
    max_model_len: positions that the model supports, in tokens
    weight_bytes: of the checkpoint as stored, in `dtype`
    sliding_windows: per layer in tokens, None for the whole context
    vocab_size: width of the logits
    unused_token_ids: those below it that the tokenizer has no token for
    """

    name: str
    revision: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    weight_bytes: int
    dtype: str
    sliding_windows: tuple[int | None, ...]
    unused_token_ids: tuple[int, ...] = ()

    @property
    def num_token_ids(self) -> int:
        """All tokens have ids below it: `vocab_size` without its padding."""
        unused = set(self.unused_token_ids)
        return next((i + 1 for i in reversed(range(self.vocab_size)) if i not in unused), 0)


def read_facts(path: Path) -> ModelFacts:
    """Facts of the model in directory `path`.

    Raises ConfigError naming a file that is missing or malformed, and
    UnsupportedModelError for a model that would be computed incorrectly.
    """
    config = read_json(path / "config.json")
    architecture = check_supported(config, path)
    tensors = read_tensors(path)
    integers = {key: _positive(config, key, path) for key in _REQUIRED}
    heads = integers["num_attention_heads"]
    return ModelFacts(
        name=_name(path),
        revision=_revision(path, tensors),
        architecture=architecture.name,
        num_layers=integers["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or architecture.kv_heads or heads,
        head_dim=config.get("head_dim")
        or architecture.head_dim
        or integers["hidden_size"] // heads,
        hidden_size=integers["hidden_size"],
        intermediate_size=integers["intermediate_size"],
        vocab_size=integers["vocab_size"],
        max_model_len=max_model_len(config),
        eos_token_ids=eos_token_ids(path),
        weight_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        dtype=_DTYPE_NAMES[max((t.dtype for t in tensors.values()), default="F32")],
        sliding_windows=architecture.sliding_windows(config),
        unused_token_ids=unused_token_ids(path),
    )


_REQUIRED = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; raises ConfigError naming the file."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError("model", f"{file} is missing") from error
    except (OSError, ValueError) as error:
        raise ConfigError("model", f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("model", f"{file} must contain a JSON object")
    return value


def check_architecture(config: Mapping[str, Any], source: Path) -> Architecture:
    """The architecture that `config` names; raises UnsupportedModelError if it is not served."""
    names = config.get("architectures") or []
    name = names[0] if names else f"of model type {config.get('model_type')}"
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise UnsupportedModelError(
            "model",
            f"{source}: architecture {name} is not supported; expected one of"
            f" {', '.join(ARCHITECTURES)}",
        )
    if config.get("model_type", architecture.model_type) != architecture.model_type:
        raise UnsupportedModelError(
            "model",
            f"{source}: {name} must have model type {architecture.model_type},"
            f" got {config['model_type']}",
        )
    return architecture


def check_supported(config: Mapping[str, Any], path: Path) -> Architecture:
    """The architecture; raises UnsupportedModelError if the model would be computed wrongly."""
    architecture = check_architecture(config, path)
    reason = None
    if config.get("quantization_config") is not None:
        reason = "its weights are quantised (quantization_config)"
    elif config.get("auto_map"):
        reason = "it brings its own code (auto_map), which is never run"
    elif config.get("use_bidirectional_attention"):
        reason = "its attention is bidirectional (use_bidirectional_attention)"
    elif config.get("is_encoder_decoder") or config.get("add_cross_attention"):
        reason = "it has cross-attention"
    elif _rope(config)[0] not in _ROPE_TYPES:
        reason = (
            f"its RoPE scaling {_rope(config)[0]!r} is not one of {', '.join(_ROPE_TYPES)}"
            " (scaling that depends on the sequence's length would invalidate cached keys)"
        )
    elif unknown := sorted(keys_not_implemented(config, architecture)):
        reason = (
            f"{', '.join(unknown)} in its config.json may change what it computes, and "
            f"{'is' if len(unknown) == 1 else 'are'} not implemented"
        )
    if reason is not None:
        raise UnsupportedModelError("model", f"{path} ({architecture.name}): {reason}")
    return architecture


def _rope(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """RoPE type and its parameters, from the keys of transformers 5 or of older versions."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        return repr(parameters), {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return str(kind), parameters


def max_model_len(config: Mapping[str, Any]) -> int:
    """Positions that the model supports, in tokens, with what RoPE's scaling adds."""
    positions = int(config["max_position_embeddings"])
    kind, parameters = _rope(config)
    original = parameters.get("original_max_position_embeddings")
    if kind == "yarn" and original:
        return max(positions, int(original * parameters["factor"]))
    return positions


def _positive(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(
            "model", f"{path / 'config.json'}: {key} must be a positive integer, got {value!r}"
        )
    return value


def eos_token_ids(path: Path) -> tuple[int, ...]:
    """The end-of-sequence tokens of generation config, configuration and tokenizer together.

    path: a directory that has these; it needs no weights
    """
    config, ids = read_json(path / "config.json"), list[int]()
    if (path / "generation_config.json").exists():
        ids += _as_ids(read_json(path / "generation_config.json").get("eos_token_id"))
    ids = ids or _as_ids(config.get("eos_token_id"))
    ids += _tokenizer_eos(path)
    return tuple(dict.fromkeys(ids))


def _as_ids(value: object) -> list[int]:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [int(item) for item in value]
    return [value] if isinstance(value, int) else []


def _tokenizer_eos(path: Path) -> list[int]:
    if not (path / "tokenizer_config.json").exists():
        return []
    tokenizer = read_json(path / "tokenizer_config.json")
    eos = tokenizer.get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(text, str):
        return []
    decoder = tokenizer.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return [int(i) for i, token in decoder.items() if token.get("content") == text]
    added = read_json(path / "tokenizer.json").get("added_tokens", [])
    return [int(token["id"]) for token in added if token.get("content") == text]


def unused_token_ids(path: Path) -> tuple[int, ...]:
    """Ids below the width of the logits that the tokenizer does not use; none without one.

    path: a directory that has the tokenizer and the configuration; it needs no weights
    """
    vocab_size = _positive(read_json(path / "config.json"), "vocab_size", path)
    file = path / "tokenizer.json"
    if not file.exists():
        return ()
    stat = file.stat()
    return _unused_of(file, stat.st_mtime_ns, stat.st_size, vocab_size)


@lru_cache(maxsize=8)
def _unused_of(file: Path, mtime_ns: int, size: int, vocab_size: int) -> tuple[int, ...]:
    """mtime_ns, size: of the file, which is large and read several times"""
    tokenizer = read_json(file)
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    used = set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
    used.update(token["id"] for token in tokenizer.get("added_tokens") or ())
    return tuple(token_id for token_id in range(vocab_size) if token_id not in used)


def _name(path: Path) -> str:
    if (path / NAME_FILE).exists():
        return str(read_json(path / NAME_FILE)["name"])
    return path.resolve().name


def _revision(path: Path, tensors: Mapping[str, TensorInfo]) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if (path / name).exists():
            digest.update(name.encode() + (path / name).read_bytes())
    for file in sorted({tensor.file for tensor in tensors.values()}):
        digest.update(sample_digest(file))
    return digest.hexdigest()[:16]


def sample_digest(file: Path) -> bytes:
    """Digest of `file` from its size and samples spread over it: fast for any size."""
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        for sample in range(_SAMPLES_PER_FILE):
            stream.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES_PER_FILE - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()
