"""What a KV format is: a frozen value that knows its sizes and its codec.

This module is free of torch, so that the router and the planner can do the
arithmetic of pages without it; everything that touches a tensor stands in the
format's `reference` module, imported on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

if TYPE_CHECKING:
    import torch


class SealedTile(Protocol):
    """Sealed pages picked for the reference attention, one row of pages per (sequence, KV head).

    The tile may keep codes as they are and fold scale and minimum into the
    scores and the weights, so that nothing is dequantised for a single query.
    """

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """q [rows, queries, head_dim] fp32 -> q·k, [rows, queries, pages * page_size] fp32."""

    def weighted_values(self, weights: torch.Tensor) -> torch.Tensor:
        """weights [rows, queries, pages * page_size] fp32 -> [rows, queries, head_dim] fp32."""

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [rows, pages * page_size, head_dim] fp32."""


class Codec(Protocol):
    """What a format's `reference` module supplies; `fmt` is the format itself."""

    def encode(self, fmt: KVFormat, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...

    def decode(
        self,
        fmt: KVFormat,
        pages: torch.Tensor,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def tile_index(self, index: torch.Tensor) -> torch.Tensor:
        """What `load_tile` takes for the pages index [rows, pages], page * num_kv_heads + head.

        Made once a step, used by every layer.
        """

    def load_tile(
        self,
        fmt: KVFormat,
        sealed: torch.Tensor,
        tile_index: torch.Tensor,
        rows: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> SealedTile: ...


@dataclass(frozen=True, slots=True)
class TileKernels:
    """A format on GPUs: functions of its `triton` module, for the kernels to call.

    views: the sealed arena [num_sealed_pages, num_kv_heads, page_bytes] uint8 and
        the compute dtype -> the two tensors the tile functions read
    load_tile, store_tile: `triton.jit` functions
    affine: keys and values are tile * scale + offset, to be folded by the caller
    """

    views: Callable[[torch.Tensor, torch.dtype], tuple[torch.Tensor, torch.Tensor]]
    load_tile: Any
    store_tile: Any
    affine: bool


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How a sealed page stores keys and values.

    name: the registry's name, e.g. ``int4``
    k_bits, v_bits: width of one code, without metadata; 0 for the compute dtype's own
    sink_pages, recent_pages: default windows whose pages are read exactly:
        key j is read from its hot page if its page is among the first
        `sink_pages` or at most `recent_pages` before the query's page
    aliases: other names users know it by (LMDeploy's ``quant_policy``, ...)
    """

    name: str
    k_bits: int
    v_bits: int
    sink_pages: int = 0
    recent_pages: int = 0
    needs_calibration: bool = False
    aliases: tuple[str, ...] = ()

    package: ClassVar[str] = ""

    def page_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        """Bytes of one sealed page of one layer and one KV head, keys and values.

        dtype_bytes: size of the compute dtype; only a format that stores it
        (``exact``) depends on it.
        """
        raise TypeError(f"{type(self).__name__} must define page_bytes")

    def bits_per_element(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> float:
        """Stored bits per key or value element, metadata included."""
        elements = 2 * page_size * head_dim
        return 8 * self.page_bytes(page_size, head_dim, dtype_bytes) / elements

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Seal whole pages.

        k, v: [..., page_size, head_dim] of the compute dtype
        Returns [..., page_bytes] uint8. Each page is encoded from its own
        numbers alone: the same page gives the same bytes in any batch.
        """
        if k.shape != v.shape or k.dim() < 2:
            raise ValueError(
                "k, v: expected equal shapes [..., page_size, head_dim], "
                f"got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        return self.codec().encode(self, k, v)

    def decode(
        self, pages: torch.Tensor, page_size: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of sealed pages, as attention reads them.

        pages: [..., page_bytes] uint8
        Returns k, v: [..., page_size, head_dim] of `dtype`
        """
        expected = self.page_bytes(page_size, head_dim, dtype.itemsize)
        if pages.shape[-1] != expected:
            raise ValueError(
                f"pages: expected {expected} bytes a page of format {self.name}, "
                f"got {pages.shape[-1]}"
            )
        return self.codec().decode(self, pages, page_size, head_dim, dtype)

    def codec(self) -> Codec:
        """The plain-torch functions of this format."""
        return _codec(self.package)

    def tile_kernels(self) -> TileKernels:
        """The Triton functions of this format."""
        return cast(TileKernels, importlib.import_module(f"{self.package}.triton").kernels(self))


@cache
def _codec(package: str) -> Codec:
    return cast(Codec, importlib.import_module(f"{package}.reference"))
