"""How a layer attends, in every step."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Each as in the public operator `paged_attention`, which has checked them."""

    fmt: KVFormat
    scale: float
    params: LayerParams = NO_PARAMS
    softcap: float | None = None
    sliding_window: int | None = None
