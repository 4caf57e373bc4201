"""A KV format: a frozen value with one side for keys and one side for values.

    page of one layer and KV head   | keys, k.num_bytes | values, v.num_bytes |

A side knows its sizes and its codec. This module and the sides' own modules do not
import torch, so that the router and the planner can compute page sizes without it.
Everything that touches a tensor is in the side's `reference` module or, for GPUs, in
its `triton` module, both imported on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

if TYPE_CHECKING:
    import torch

Params = Mapping[str, "torch.Tensor"]

# Sizes of a parameter's dimensions: "heads" and "channels" mean the KV heads and head_dim,
# a number means itself, any other word means any size.
Dims = tuple[str | int, ...]


class PageShape(NamedTuple):
    """Of one head's keys or values in a page. dtype: the compute dtype"""

    page_size: int
    head_dim: int
    dtype: torch.dtype


class SideCodec(Protocol):
    """What a side's `reference` module supplies; `side` is the side itself.

    params: this layer's calibrated parameters of the side, each [num_kv_heads, ...]
        or without heads; empty if the side needs none
    """

    def encode(
        self, side: Side, x: torch.Tensor, params: Params, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """x [n, num_kv_heads, page_size, head_dim] fp32 -> [n, num_kv_heads, num_bytes] uint8.

        positions: [n] int64, of each page's first token; given if the side needs it
        """

    def decode(
        self, side: Side, pages: torch.Tensor, shape: PageShape, params: Params
    ) -> torch.Tensor:
        """pages [n, num_kv_heads, num_bytes] -> [n, num_kv_heads, page_size, head_dim] fp32,
        finite for any input of `encode`. Without parameters of heads there may be any number."""


@dataclass(frozen=True, slots=True)
class Side:
    """How a sealed page stores its keys, or its values.

    width: bits of one code, without metadata; 0 for the compute dtype
    rotated: the numbers are in the basis of `rotation.py`; the caller of the operators
        rotates queries, keys and values into it, and the output back
    values: whether this is the side of values, whose codes packing.py lays out differently
    """

    width: int
    rotated: bool = field(default=False, kw_only=True)
    values: bool = field(default=False, kw_only=True)

    package: ClassVar[str] = ""

    @property
    def calibrated(self) -> Mapping[str, Dims]:
        """The parameters that calibration has to supply, each with its dimensions; those whose
        first dimension is "heads" are split over ranks."""
        return {}

    @property
    def wants_positions(self) -> bool:
        """Whether encoding needs to know a page's position in the sequence."""
        return False

    def num_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        """Bytes of this side of one page of one layer and one KV head.

        dtype_bytes: size of the compute dtype; only `exact` depends on it
        """
        raise TypeError(f"{type(self).__name__} must define num_bytes")

    def bits_per_element(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> float:
        """Stored bits per number, including metadata."""
        return 8 * self.num_bytes(page_size, head_dim, dtype_bytes) / (page_size * head_dim)

    def codec(self) -> SideCodec:
        """The plain-torch functions of this side."""
        return cast(SideCodec, _module(f"{self.package}.reference"))

    def kernels(self) -> Any:
        """The Triton functions of this side, a `SideKernels` of `formats/tiles_triton.py`; sides
        for comparison have none."""
        return _module(f"{self.package}.triton").kernels(self)

    def numba_load(self, page_size: int, head_dim: int, dtype: str) -> Any | None:
        """How decode attention on CPUs reads this side, a `SideLoad` of `formats/tiles_numba.py`.

        dtype: the compute dtype, "float32" or "bfloat16"
        Returns None if only plain torch can read it.
        """
        name = f"{self.package}.numba"
        if importlib.util.find_spec(name) is None:
            return None
        return _module(name).side_load(self, page_size, head_dim, dtype)


@dataclass(frozen=True, slots=True)
class InKeys(Side):
    """Values that are the first `channels` channels of the keys, and take no bytes of their own:
    those of latent attention."""

    width: int = 0
    channels: int = field(default=0, kw_only=True)

    def num_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        if not 0 < self.channels <= head_dim:
            raise ValueError(
                f"channels: values are from 1 to {head_dim} channels of a key, got {self.channels}"
            )
        return 0


@dataclass(frozen=True, slots=True)
class LayerParams:
    """The calibrated parameters of one layer, by the sides' parameter names."""

    k: Params
    v: Params

    def to(self, device: torch.device | str) -> LayerParams:
        k, v = (
            {name: tensor.to(device) for name, tensor in side.items()} for side in (self.k, self.v)
        )
        return LayerParams(k, v)

    def share(self, fmt: KVFormat, index: int, count: int) -> LayerParams:
        """The parameters of one of `count` equal shares of the KV heads."""

        def own(side: Side, params: Params) -> Params:
            return {
                name: tensor.chunk(count)[index] if _has_heads(side, name) else tensor
                for name, tensor in params.items()
            }

        return LayerParams(own(fmt.k, self.k), own(fmt.v, self.v))


def _has_heads(side: Side, name: str) -> bool:
    return side.calibrated[name][0] == "heads"


NO_PARAMS = LayerParams({}, {})


@dataclass(frozen=True, slots=True)
class ModelParams:
    """The calibrated parameters of every layer."""

    layers: tuple[LayerParams, ...]

    def to(self, device: torch.device | str) -> ModelParams:
        return ModelParams(tuple(layer.to(device) for layer in self.layers))


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How a sealed page stores keys and values.

    name: the registry's name, e.g. ``int4``
    sink_pages, recent_pages: default windows of pages that are read exactly:
        key j is read from its hot page if its page is among the first
        `sink_pages` or at most `recent_pages` before the query's page
    aliases: other names that users know (LMDeploy's ``quant_policy``, ...)
    comparison: kept to compare with: plain torch seals and reads its pages, so serving it is slow
    """

    name: str
    k: Side
    v: Side
    summary: str
    sink_pages: int = 0
    recent_pages: int = 0
    aliases: tuple[str, ...] = ()
    comparison: bool = False

    def __post_init__(self) -> None:
        if self.k.values or not self.v.values:
            raise ValueError(f"{self.name}: set values=True on the side of values, and only there")

    @property
    def k_bits(self) -> int:
        return self.k.width

    @property
    def needs_calibration(self) -> bool:
        return bool(self.k.calibrated or self.v.calibrated)

    @property
    def wants_positions(self) -> bool:
        return self.k.wants_positions or self.v.wants_positions

    @property
    def values_in_keys(self) -> int:
        """How many channels of a key are its value; 0 if values are stored for themselves."""
        return self.v.channels if isinstance(self.v, InKeys) else 0

    @property
    def stored_sides(self) -> int:
        """How many numbers a page stores for each channel, in whatever form it is."""
        return 1 if self.values_in_keys else 2

    @property
    def has_kernels(self) -> bool:
        """Whether Triton kernels seal its pages, and read them so that a CUDA graph can hold it."""
        return not (self.comparison or self.values_in_keys)

    @property
    def treats_sides_alike(self) -> bool:
        """Whether keys and values are stored by one encoding, in the model's own basis."""
        rotated = self.k.rotated or self.v.rotated
        return self.k.width == self.v.width and not (rotated or self.comparison)

    def check_params(self, params: LayerParams) -> None:
        """Raises ValueError naming the calibrated parameters that are missing."""
        for side, found in ((self.k, params.k), (self.v, params.v)):
            if missing := [name for name in side.calibrated if name not in found]:
                raise ValueError(
                    f"params: {self.name} needs calibrated parameters; "
                    f"missing: {', '.join(missing)}"
                )

    def page_bytes(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> int:
        """Bytes of one sealed page of one layer and one KV head, keys and values.

        Raises ValueError naming head_dim if a side does not support it.
        """
        return self.k.num_bytes(page_size, head_dim, dtype_bytes) + self.v.num_bytes(
            page_size, head_dim, dtype_bytes
        )

    def bits_per_element(self, page_size: int, head_dim: int, dtype_bytes: int = 2) -> float:
        """Stored bits per number of a page, including metadata."""
        elements = self.stored_sides * page_size * head_dim
        return 8 * self.page_bytes(page_size, head_dim, dtype_bytes) / elements

    def encode(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        params: LayerParams = NO_PARAMS,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Seal whole pages.

        k, v: [n, num_kv_heads, page_size, head_dim] of the compute dtype, in the
            sides' bases; v is not looked at if values are in keys
        positions: [n] int64, of each page's first token, if `wants_positions`
        Returns [n, num_kv_heads, page_bytes] uint8. Each page is encoded from its
        own numbers only: the same page gives the same bytes in any batch.
        """
        if k.dim() != 4 or (k.shape != v.shape and not self.values_in_keys):
            raise ValueError(
                "k, v: expected equal shapes [n, num_kv_heads, page_size, head_dim], "
                f"got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        self.check_params(params)
        if self.wants_positions and (positions is None or positions.shape != k.shape[:1]):
            raise ValueError(
                f"positions: {self.name} needs the first positions of {k.shape[0]} pages"
            )
        encoded = self.k.codec().encode(self.k, k, params.k, positions)
        if self.values_in_keys:
            return encoded
        return _join(encoded, self.v.codec().encode(self.v, v, params.v, positions))

    def decode(
        self,
        pages: torch.Tensor,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        params: LayerParams = NO_PARAMS,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of sealed pages, as attention reads them.

        pages: [n, num_kv_heads, page_bytes] uint8
        dtype: of the result; for `exact` also the compute dtype that was stored
        Returns k, v: [n, num_kv_heads, page_size, head_dim] of `dtype`; values that are in keys
        have that many channels and are a view
        """
        expected = self.page_bytes(page_size, head_dim, dtype.itemsize)
        if pages.dim() != 3 or pages.shape[-1] != expected:
            raise ValueError(
                f"pages: expected [n, num_kv_heads, {expected}] for format {self.name}, "
                f"got {tuple(pages.shape)}"
            )
        at = self.k.num_bytes(page_size, head_dim, dtype.itemsize)
        shape = PageShape(page_size, head_dim, dtype)
        k = self.k.codec().decode(self.k, pages[..., :at].contiguous(), shape, params.k)
        if self.values_in_keys:
            k = k.to(dtype).contiguous()
            return k, k[..., : self.values_in_keys]
        v = self.v.codec().decode(self.v, pages[..., at:].contiguous(), shape, params.v)
        return k.to(dtype).contiguous(), v.to(dtype).contiguous()


def _join(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat((k, v), dim=-1)


@cache
def _module(name: str) -> Any:
    return importlib.import_module(name)
