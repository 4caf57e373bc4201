"""The tensors of a checkpoint, read from the headers of its safetensors files.

A header is checked before anything is loaded: it must be JSON of a plausible size, and
every tensor must lie within its file, so that an incomplete download or a crafted file
is refused by name. Torch-free.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvmesh.workers.errors import ConfigError, UnsupportedModelError

_MAX_HEADER_BYTES = 100 << 20
PLAIN_DTYPES = frozenset({"F32", "F16", "BF16"})
# The others are those of quantised weights.
_DTYPE_BYTES = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
}
_ADAPTER = "adapter_model.safetensors"
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its file, its dtype as named in safetensors (F32, BF16, ...) and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return _DTYPE_BYTES[self.dtype] * math.prod(self.shape)


def read_tensors(path: Path) -> Mapping[str, TensorInfo]:
    """Tensors of the checkpoint in directory `path`, by name.

    Raises ConfigError naming the file that is missing, truncated or malformed,
    and UnsupportedModelError for weights of other dtypes, or that are not safetensors.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(path):
        for name, info in _read_header(file).items():
            if name in tensors:
                raise ConfigError("model", f"tensor {name} is in two files of {path}")
            tensors[name] = info
    return tensors


def _weight_files(path: Path) -> list[Path]:
    """The files that transformers reads."""
    if (path / _ADAPTER).exists():
        raise UnsupportedModelError(
            "model", f"{path / _ADAPTER} is an adapter, which is not applied; merge it"
        )
    # Others next to it are copies for other programs, such as consolidated.safetensors, or left
    # over, such as an index.
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        return _listed_files(index)
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(f.name for f in path.iterdir() if f.suffix in _PICKLED_SUFFIXES)
    if pickled:
        raise UnsupportedModelError(
            "model",
            f"{path / pickled[0]} is a pickle, which can run code when it is loaded;"
            " convert the weights to safetensors",
        )
    raise ConfigError("model", f"{path} contains no *.safetensors weights")


def _listed_files(index: Path) -> list[Path]:
    names = sorted(set(_read_index(index)))
    files = [index.parent / name for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name:
            raise ConfigError("model", f"{index} points outside its directory: {name}")
        if not file.is_file():
            raise ConfigError("model", f"{file} is missing, but {index.name} lists it")
    return files


def _read_index(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError("model", f"{index} is not a weights index: {error!r}") from error
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ConfigError("model", f"{index} is not a weights index: weight_map is malformed")
    return list(weight_map.values())


def _read_header(file: Path) -> dict[str, TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ConfigError("model", f"{file} is not a safetensors file, or is truncated")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        return {
            name: _tensor_info(file, name, entry, size - 8 - length)
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("model", f"{file} has a malformed header: {error!r}") from error


def _tensor_info(file: Path, name: str, entry: Mapping[str, object], data_bytes: int) -> TensorInfo:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _DTYPE_BYTES:
        raise UnsupportedModelError(
            "model",
            f"{file}: tensor {name} has dtype {dtype}; expected one of {', '.join(_DTYPE_BYTES)}",
        )
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise TypeError(f"tensor {name}")
    info = TensorInfo(file, str(dtype), tuple(int(n) for n in shape))
    begin, end = (int(offset) for offset in offsets)
    if begin < 0 or end > data_bytes or end - begin != info.num_bytes:
        raise ConfigError("model", f"{file} is truncated or malformed at tensor {name}")
    return info
