"""The size of a format's pages per element and per token, including exact windows.

In the windows keys and values are in the compute dtype. They count as 16 bits, a
GPU's bfloat16, even where a CPU computes in 32. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.workers.sizes import PageGeometry, page_bytes_of

HOT_BITS = 16


@dataclass(frozen=True, slots=True)
class Footprint:
    """The size of a sequence's KV in one format.

    elements_per_token: keys and values over all layers and KV heads
    """

    sealed_bits: float
    geometry: PageGeometry
    elements_per_token: int

    @staticmethod
    def of(
        fmt: KVFormat,
        *,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        sink_pages: int | None = None,
        recent_pages: int | None = None,
    ) -> Footprint:
        """sink_pages, recent_pages: the format's defaults if not given"""
        hot_bytes, sealed_bytes = page_bytes_of(
            fmt,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            head_dim=head_dim,
            dtype_bytes=HOT_BITS // 8,
        )
        geometry = PageGeometry(
            page_size=page_size,
            sink_pages=fmt.sink_pages if sink_pages is None else sink_pages,
            recent_pages=fmt.recent_pages if recent_pages is None else recent_pages,
            hot_page_bytes=hot_bytes,
            sealed_page_bytes=sealed_bytes,
        )
        bits = fmt.bits_per_element(page_size, head_dim, HOT_BITS // 8)
        elements = num_layers * num_kv_heads * fmt.stored_sides * head_dim
        return Footprint(bits, geometry, elements)

    def bits_at(self, context: int) -> float:
        """Mean bits per element of the keys and values of a sequence of `context` tokens."""
        sealed = len(self.geometry.sealed_range(context)) * self.geometry.page_size
        return (sealed * self.sealed_bits + (context - sealed) * HOT_BITS) / context

    def bytes_per_token_at(self, context: int) -> float:
        """Mean bytes per token of a sequence of `context` tokens, over all layers and heads."""
        return self.bits_at(context) * self.elements_per_token / 8
