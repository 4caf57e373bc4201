"""Facts of a model that are known before any weight is loaded.

They are read from the model's JSON files and the headers of its weights without
torch, so that the control plane can use them. `load_model` checks these facts
against how transformers reads the same configuration.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.architectures import ARCHITECTURES, Architecture
from kvmesh.workers.model.config_keys import keys_not_implemented
from kvmesh.workers.model.quantisation import quantisation_of, why_not_read
from kvmesh.workers.model.rope_scaling import RopeScaling
from kvmesh.workers.model.standard_keys import standard_keys
from kvmesh.workers.model.state_shape import StateShape
from kvmesh.workers.model.tensors import TensorInfo, read_tensors
from kvmesh.workers.model.text_part import text_tensors, wrapper_of
from kvmesh.workers.rope_override import RopeOverride

logger = logging.getLogger(__name__)

NAME_FILE = "kvmesh.json"

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLE_BYTES = 1 << 16
_SAMPLES_PER_FILE = 16


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts of a model, over all ranks.

    revision: digest of configuration, tokenizer and weights (weights by header, size
        and samples), the same wherever the same files are stored
    max_model_len: positions that the model supports, in tokens
    weight_bytes: of the text model in the checkpoint as stored, in `dtype`
    sliding_windows: per layer in tokens, None for the whole context
    vocab_size: width of the logits
    unused_token_ids: those below it that the tokenizer has no token for
    rotated_layers: per layer, whether RoPE is applied; () for all
    mlp_sizes: widths of its MLPs that are not one expert of many: of dense layers and of
        experts that compute every token
    num_experts: of each mixture of experts; 0 if the model has none
    expert_size: width of one expert's MLP
    values_in_keys: how many channels of a key are its value; 0 if values are of their own
    recurrent_layers: per layer, whether it has a state instead of keys and values; () for none
    state: what these layers keep of a sequence
    trained_len: positions that it was trained for before its RoPE was scaled
    rope: how RoPE is scaled, as `kvmesh status` shows it
    text_of: the class of the checkpoint if it has other modalities than text
    """

    name: str
    revision: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    mlp_sizes: tuple[int, ...]
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    weight_bytes: int
    dtype: str
    sliding_windows: tuple[int | None, ...]
    unused_token_ids: tuple[int, ...] = ()
    rotated_layers: tuple[bool, ...] = ()
    num_experts: int = 0
    expert_size: int = 0
    values_in_keys: int = 0
    recurrent_layers: tuple[bool, ...] = ()
    state: StateShape | None = None
    trained_len: int = 0
    rope: str = "default"
    text_of: str = ""

    @property
    def num_kv_layers(self) -> int:
        """Layers with keys and values."""
        return self.num_layers - sum(self.recurrent_layers)

    @property
    def num_token_ids(self) -> int:
        """All tokens have ids below it: `vocab_size` without its padding."""
        unused = set(self.unused_token_ids)
        return next((i + 1 for i in reversed(range(self.vocab_size)) if i not in unused), 0)


def read_facts(path: Path, rope: RopeOverride | None = None) -> ModelFacts:
    """Facts of the model in directory `path`.

    rope: replaces the scaling in its configuration
    Raises ConfigError naming a file that is missing or malformed, and
    UnsupportedModelError for a model that would be computed incorrectly.
    """
    contents = read_json(path / "config.json")
    stored = standard_keys(contents, path)
    architecture = check_supported(stored, path)
    config = architecture.with_positions(stored)
    if architecture.in_chunks and "attention_chunk_size" in config:
        _positive(config, "attention_chunk_size", path)
    if rope is not None and architecture.rope_types == ("default",) and rope.type != "ntk":
        raise ConfigError(
            "rope", f"{architecture.name} has no scaling {rope.type!r} of RoPE; use 'ntk'"
        )
    tensors = read_tensors(path)
    used = text_tensors(tensors, architecture.unused(config))
    integers = {key: _positive(config, key, path) for key in _REQUIRED}
    if rope is not None and not any(architecture.rotated_layers(config)):
        raise ConfigError("rope", f"{path} ({architecture.name}) has no RoPE to scale")
    heads = integers["num_attention_heads"]
    scaling = RopeScaling.of(config)
    try:
        max_model_len, trained_len = scaling.max_model_len(config), scaling.trained_len(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "model", f"{path / 'config.json'}: its positions cannot be read: {error!r}"
        ) from error
    if rope is not None:
        trained_len, max_model_len = rope.positions(trained_len)
    num_kv_heads = config.get("num_key_value_heads") or architecture.kv_heads or heads
    head_dim = config.get("head_dim") or architecture.head_dim or integers["hidden_size"] // heads
    values_in_keys = 0
    if architecture.latent:
        num_kv_heads, values_in_keys = 1, _positive(config, "kv_lora_rank", path)
        head_dim = values_in_keys + _positive(config, "qk_rope_head_dim", path)
    recurrent = architecture.recurrent_layers(config)
    if all(recurrent):
        raise UnsupportedModelError(
            "model", f"{path} ({architecture.name}): none of its layers has keys and values"
        )
    num_experts = expert_size = 0
    experts = architecture.experts_in(config)
    if experts is not None:
        names = experts.count
        count = next((name for name in names if config.get(name) is not None), names[0])
        num_experts = _positive(config, count, path)
        expert_size = _positive(config, experts.width, path)
    return ModelFacts(
        name=_name(path),
        revision=_revision(path, tensors, rope),
        architecture=architecture.name,
        num_layers=integers["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=integers["hidden_size"],
        mlp_sizes=_mlp_sizes(config, architecture, path),
        vocab_size=integers["vocab_size"],
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids(path),
        weight_bytes=sum(tensor.num_bytes for _, tensor in used.values()),
        dtype=_DTYPE_NAMES[
            max((t.dtype for _, t in used.values() if t.dtype in _DTYPE_NAMES), default="F32")
        ],
        sliding_windows=architecture.sliding_windows(config),
        unused_token_ids=unused_token_ids(path),
        rotated_layers=architecture.rotated_layers(config),
        num_experts=num_experts,
        expert_size=expert_size,
        values_in_keys=values_in_keys,
        recurrent_layers=recurrent,
        state=architecture.state(config),
        trained_len=trained_len,
        rope=str(scaling) if rope is None else f"{rope}, instead of {scaling}",
        text_of=contents["architectures"][0] if wrapper_of(contents) else "",
    )


def _mlp_sizes(
    config: Mapping[str, Any], architecture: Architecture, path: Path
) -> tuple[int, ...]:
    experts, dense = architecture.experts_in(config), architecture.mlp_key(config)
    if experts is None:
        return (_positive(config, dense, path) // architecture.mlp_parts,)
    shared = experts.shared_width(lambda key: _positive(config, key, path))
    found = {shared} if shared else set()
    if not all(experts.layers(config)):
        found.add(_positive(config, dense, path))
    return tuple(sorted(found))


_REQUIRED = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
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
    quantisation = quantisation_of(config)
    refused = None
    if quantisation is not None and not _is_mxfp4(quantisation, architecture):
        refused = why_not_read(quantisation)
    if refused is not None:
        reason = refused
    elif config.get("auto_map") and not architecture.own_code:
        reason = "it brings its own code (auto_map), which is never run"
    elif config.get("use_bidirectional_attention"):
        reason = "its attention is bidirectional (use_bidirectional_attention)"
    elif config.get("is_encoder_decoder") or config.get("add_cross_attention"):
        reason = "it has cross-attention"
    elif (kind := RopeScaling.of(config).kind) not in architecture.rope_types:
        reason = f"its RoPE scaling {kind!r} is not one of {', '.join(architecture.rope_types)}"
    elif unknown := sorted(keys_not_implemented(config, architecture)):
        reason = (
            f"{', '.join(unknown)} in its config.json may change what it computes, and "
            f"{'is' if len(unknown) == 1 else 'are'} not implemented"
        )
    if reason is not None:
        raise UnsupportedModelError("model", f"{path} ({architecture.name}): {reason}")
    return architecture


def _is_mxfp4(quantisation: Mapping[str, Any], architecture: Architecture) -> bool:
    """Whether only experts are quantised, in a format that their own reader decodes."""
    return architecture.model_type == "gpt_oss" and quantisation.get("quant_method") == "mxfp4"


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
    Ids for which there are no logits are left out: the model cannot end with them.
    """
    config, ids = standard_keys(read_json(path / "config.json"), path), list[int]()
    if (path / "generation_config.json").exists():
        ids += _as_ids(read_json(path / "generation_config.json").get("eos_token_id"))
    ids = ids or _as_ids(config.get("eos_token_id"))
    ids = list(dict.fromkeys([*ids, *_tokenizer_eos(path)]))
    vocab_size = _positive(config, "vocab_size", path)
    known = tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)
    if len(known) < len(ids):
        logger.warning(
            "%s: of its end-of-sequence tokens %s, those outside its vocabulary of %d are ignored",
            *(path, ids, vocab_size),
        )
    return known


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
    config = standard_keys(read_json(path / "config.json"), path)
    vocab_size = _positive(config, "vocab_size", path)
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


def _revision(path: Path, tensors: Mapping[str, TensorInfo], rope: RopeOverride | None) -> str:
    digest = hashlib.sha256(b"" if rope is None else rope.model_dump_json().encode())
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
