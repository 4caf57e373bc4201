"""The calibration file: parameters measured for one model and one KV format."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvmesh.kernels.formats.base import KVFormat, LayerParams, ModelParams, Side
from kvmesh.workers.config import calibrate_command
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import ModelFacts

_VERSION = "1"


@dataclass(frozen=True, slots=True)
class Calibration:
    """A format's parameters for every layer of a model, over all KV heads.

    Stored as safetensors: tensors `layers.{i}.{k|v}.{name}`, with the model, the format
    and the SHA-256 of the tensors in the metadata.

    sink_pages: of the format, if the statistics left out the tokens of those pages
    samples, context: number of windows of the text, and tokens per window
    """

    model: str
    model_revision: str
    kv_format: str
    head_dim: int
    sink_pages: int
    samples: int
    context: int
    layers: tuple[LayerParams, ...]

    def save(self, path: Path) -> None:
        """Write the file atomically. Raises ConfigError naming `output`."""
        tensors = self._tensors()
        metadata = {
            "version": _VERSION,
            "model": self.model,
            "model_revision": self.model_revision,
            "kv_format": self.kv_format,
            "head_dim": str(self.head_dim),
            "sink_pages": str(self.sink_pages),
            "samples": str(self.samples),
            "context": str(self.context),
            "sha256": _digest(tensors),
        }
        data = save(tensors, metadata)
        try:
            handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.chmod(partial, 0o644)
                os.replace(partial, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
        except OSError as error:
            raise ConfigError("output", f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(
        cls, path: Path, fmt: KVFormat, facts: ModelFacts, model: str, sink_pages: int
    ) -> Calibration:
        """The file's contents, if they are for this format and model.

        model: what the user calls it, for the message
        sink_pages: which the engine reads exactly
        Raises ConfigError (field `calibration`) saying what differs and how to make a file.
        """
        try:
            metadata, tensors = _read(path)
            if (version := metadata["version"]) != _VERSION:
                raise _MismatchError(
                    f"has format version {version}, but this kvmesh reads {_VERSION}"
                )
            found = cls(
                model=metadata["model"],
                model_revision=metadata["model_revision"],
                kv_format=metadata["kv_format"],
                head_dim=_number(metadata, "head_dim"),
                sink_pages=_number(metadata, "sink_pages"),
                samples=_number(metadata, "samples"),
                context=_number(metadata, "context"),
                layers=_layers(tensors),
            )
            found._check(metadata, fmt, facts, sink_pages)
        except _MismatchError as mismatch:
            raise ConfigError(
                "calibration",
                f"{path} {mismatch}; make a new one with: " + calibrate_command(model, fmt.name),
            ) from mismatch.__cause__
        except KeyError as error:
            raise ConfigError(
                "calibration",
                f"{path} is not a calibration file (it has no {error.args[0]}); make one with: "
                + calibrate_command(model, fmt.name),
            ) from None
        return found

    @staticmethod
    def format_of(path: Path) -> str:
        """The KV format of a file. Raises ConfigError (field `calibration`)."""
        try:
            return _read(path)[0]["kv_format"]
        except _MismatchError as mismatch:
            raise ConfigError("calibration", f"{path} {mismatch}") from mismatch.__cause__
        except KeyError:
            raise ConfigError("calibration", f"{path} is not a calibration file") from None

    def for_rank(self, fmt: KVFormat, rank: int, tp: int, device: torch.device) -> ModelParams:
        """Each layer's parameters for this rank's heads, on its device."""
        shares = (layer.share(fmt, rank, tp) for layer in self.layers)
        return ModelParams(tuple(shares)).to(device)

    def _tensors(self) -> dict[str, Tensor]:
        # Clones, because safetensors refuses tensors that share memory, like RoPE's frequencies.
        return {
            f"layers.{index}.{key}.{name}": tensor.clone(memory_format=torch.contiguous_format)
            for index, layer in enumerate(self.layers)
            for key, params in (("k", layer.k), ("v", layer.v))
            for name, tensor in params.items()
        }

    def _check(
        self, metadata: Mapping[str, str], fmt: KVFormat, facts: ModelFacts, sink_pages: int
    ) -> None:
        if self.kv_format != fmt.name:
            raise _MismatchError(f"is for the format {self.kv_format}, not for {fmt.name}")
        if self.model_revision != facts.revision:
            raise _MismatchError(
                f"is for the model {self.model}, revision {self.model_revision},"
                f" not for {facts.name}, revision {facts.revision}"
            )
        if self.head_dim != facts.head_dim:
            raise _MismatchError(f"is for head_dim {self.head_dim}, not for {facts.head_dim}")
        if sink_pages < self.sink_pages:
            raise _MismatchError(
                f"left out the tokens of the first {self.sink_pages} pages,"
                f" but sink_pages {sink_pages} does not keep them exact"
            )
        if len(self.layers) != facts.num_kv_layers:
            raise _MismatchError(
                f"has {len(self.layers)} layers, but the model has {facts.num_kv_layers}"
            )
        for index, layer in enumerate(self.layers):
            for key, side, params in (("k", fmt.k, layer.k), ("v", fmt.v, layer.v)):
                _check_shapes(f"layers.{index}.{key}", side, params, facts)
        if metadata.get("sha256") != _digest(self._tensors()):
            raise _MismatchError("is corrupt: its tensors do not match its SHA-256")


class _MismatchError(Exception):
    """What is wrong with a file, as a predicate: "is for ...", "has ..."."""


def _number(metadata: Mapping[str, str], name: str) -> int:
    try:
        return int(metadata[name])
    except ValueError:
        raise _MismatchError(f"is damaged: its {name} is {metadata[name]!r:.60}") from None


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), tensors
    except FileNotFoundError as error:
        raise _MismatchError("is missing") from error
    except (SafetensorError, OSError) as error:
        raise _MismatchError(f"cannot be read: {error}") from error


def _layers(tensors: Mapping[str, Tensor]) -> tuple[LayerParams, ...]:
    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    for full_name, tensor in tensors.items():
        parts = full_name.split(".")
        if len(parts) != 4 or parts[0] != "layers" or not parts[1].isdigit():
            raise _MismatchError(f"has a tensor {full_name}, which belongs to no layer")
        if parts[2] not in ("k", "v"):
            raise _MismatchError(f"has a tensor {full_name}, which belongs to neither k nor v")
        sides = found.setdefault(int(parts[1]), {"k": {}, "v": {}})
        sides[parts[2]][parts[3]] = tensor
    if sorted(found) != list(range(len(found))):
        raise _MismatchError(f"has only the layers {sorted(found)}")
    return tuple(LayerParams(found[i]["k"], found[i]["v"]) for i in range(len(found)))


def _check_shapes(where: str, side: Side, params: Mapping[str, Tensor], facts: ModelFacts) -> None:
    if params.keys() != side.calibrated.keys():
        raise _MismatchError(
            f"has {', '.join(sorted(params)) or 'nothing'} for {where},"
            f" expected {', '.join(sorted(side.calibrated)) or 'nothing'}"
        )
    sizes: dict[Any, int] = {"heads": facts.num_kv_heads, "channels": facts.head_dim}
    for name, dims in side.calibrated.items():
        wanted = tuple(sizes.get(dim, dim) for dim in dims)
        got = tuple(params[name].shape)
        if len(got) != len(wanted) or any(
            isinstance(want, int) and want != size for want, size in zip(wanted, got, strict=True)
        ):
            raise _MismatchError(
                f"has {where}.{name} of shape {list(got)}, expected {list(wanted)}"
            )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
