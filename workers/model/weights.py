"""Reads a rank's share of a checkpoint's weights."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvmesh.kernels.linear import GroupedWeight
from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.tensors import PLAIN_DTYPES, read_tensors
from kvmesh.workers.model.text_part import text_tensors

# In old checkpoints: recomputed from the configuration, never loaded.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
# In quantised checkpoints: scales of activations, and of KV caches in other engines' formats.
_ACTIVATION_SUFFIXES = tuple(
    f".{what}_{kind}"
    for what in ("input", "output", "q", "k", "v")
    for kind in ("scale", "zero_point", "global_scale")
)


class Weights(Protocol):
    """A source of a model's tensors, whole or in part; see WeightReader."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def keeps_bits(self) -> bool: ...

    def __contains__(self, name: str) -> bool: ...

    def whole(self, name: str, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor: ...

    def rows(self, name: str, shape: torch.Size, first: int, end: int) -> Tensor: ...

    def columns(self, name: str, shape: torch.Size, first: int, end: int) -> Tensor: ...

    def part(self, name: str, shape: torch.Size, *index: slice) -> Tensor: ...

    def kept(self, name: str, shape: torch.Size) -> GroupedWeight | None: ...

    def leave(self, name: str, shape: torch.Size) -> None: ...

    def check_all_read(self) -> None: ...


class WeightReader:
    """Tensors of the text model of the checkpoint in `path`, by the names that it has on its own,
    converted to `dtype` on `device`, whole or in part.

    A context manager: the files are open inside it. `check_all_read` checks that the
    model has used every tensor.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        device: torch.device,
        unused: tuple[str, ...] = (),
        *,
        keeps_bits: bool = False,
    ) -> None:
        """unused: beginnings of names of tensors that the model does not need
        keeps_bits: quantised weights of linears and experts are not decoded, where that is possible
        """
        found = text_tensors(read_tensors(path), unused)
        self._tensors = {name: info for name, (_, info) in found.items()}
        self._stored = {name: stored for name, (stored, _) in found.items()}
        self.dtype = dtype
        self.keeps_bits = keeps_bits
        self._device = device
        self._files: dict[Path, Any] = {}
        self._open = ExitStack()
        self._read: set[str] = set()

    def __enter__(self) -> WeightReader:
        for file in {tensor.file for tensor in self._tensors.values()}:
            try:
                self._files[file] = self._open.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._open.close()
                raise ConfigError("model", f"{file} cannot be read: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def whole(self, name: str, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor `name`, which must have `shape`; of another dtype if one is given."""
        return self._to_place(self._slice(name, shape)[:], dtype)

    def rows(self, name: str, shape: torch.Size, first: int, end: int) -> Tensor:
        """Rows [first, end) of the tensor."""
        return self._to_place(self._slice(name, shape)[first:end])

    def columns(self, name: str, shape: torch.Size, first: int, end: int) -> Tensor:
        """Columns [first, end) of the tensor."""
        return self._to_place(self._slice(name, shape)[:, first:end])

    def part(self, name: str, shape: torch.Size, *index: slice) -> Tensor:
        """A part of the tensor, by a slice of each of its first dimensions; of MXFP4 as stored."""
        return self._to_place(self._slice(name, shape, ("U8",))[index])

    def kept(self, name: str, shape: torch.Size) -> GroupedWeight | None:
        """The tensor in the bits that it is stored with, if it is quantised and `keeps_bits`."""
        return None

    def leave(self, name: str, shape: torch.Size) -> None:
        """Check the tensor `name`, which other ranks read."""
        self._slice(name, shape, ("U8",))

    def raw(self, name: str) -> Tensor:
        """The tensor as it is stored, of any dtype."""
        info = self._tensors[name]
        self._read.add(name)
        tensor: Tensor = self._files[info.file].get_tensor(self._stored[name])
        return tensor.to(self._device)

    def check_all_read(self) -> None:
        """Raises UnsupportedModelError naming a tensor that the model does not use."""
        rest = sorted(
            name
            for name in self._tensors.keys() - self._read
            if not name.endswith(_DERIVED_SUFFIXES + _ACTIVATION_SUFFIXES)
        )
        if rest:
            raise UnsupportedModelError(
                "model",
                f"{self._tensors[rest[0]].file}: the configuration has no place for tensor"
                f" {rest[0]}" + (f" and {len(rest) - 1} more" if len(rest) > 1 else ""),
            )

    def _slice(self, name: str, shape: torch.Size, others: tuple[str, ...] = ()) -> Any:
        info = self._tensors.get(name)
        if info is None:
            raise ConfigError("model", f"the checkpoint has no tensor {name}")
        if info.shape != tuple(shape):
            raise ConfigError(
                "model",
                f"{info.file}: tensor {name} has shape {list(info.shape)}, expected {list(shape)}",
            )
        if info.dtype not in PLAIN_DTYPES and info.dtype not in others:
            raise UnsupportedModelError(
                "model",
                f"{info.file}: tensor {name} is {info.dtype}, but config.json does not say how it "
                "is quantised; expected F32, F16 or BF16",
            )
        self._read.add(name)
        return self._files[info.file].get_slice(self._stored[name])

    def _to_place(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        wanted = dtype or self.dtype
        wanted = wanted if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=self._device, dtype=wanted).contiguous()
