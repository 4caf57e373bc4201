"""One rank's pages: two arenas per layer, and the block tables that point into them."""

from __future__ import annotations

import math
import mmap

import torch

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.workers.executor import Allocation


class KVPool:
    """Hot and sealed pages of every layer.

    all_hot, all_sealed: the pages of all layers, [num_layers, ...] of
    hot: per layer [hot_pages, 2, num_kv_heads, page_size, head_dim] of the compute dtype; 1
        instead of 2 if the format's values are in keys
    sealed: per layer [sealed_pages, num_kv_heads, page_bytes] uint8
    hot_tables, sealed_tables: [max_rows, max_pages_per_row] int32, logical page -> page id,
        −1 if the row's page never existed in that form
    """

    def __init__(
        self,
        allocation: Allocation,
        fmt: KVFormat,
        *,
        num_layers: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        page_bytes = fmt.page_bytes(page_size, head_dim, dtype.itemsize)
        sides = fmt.stored_sides
        hot_shape = (allocation.hot_pages, sides, num_kv_heads, page_size, head_dim)
        sealed_shape = (allocation.sealed_pages, num_kv_heads, page_bytes)
        tables = (allocation.max_rows, allocation.max_pages_per_row)
        self.all_hot = _zeros((num_layers, *hot_shape), dtype, device)
        self.all_sealed = _zeros((num_layers, *sealed_shape), torch.uint8, device)
        self.hot = self.all_hot.unbind(0)
        self.sealed = self.all_sealed.unbind(0)
        self.hot_tables = torch.full(tables, -1, dtype=torch.int32, device=device)
        self.sealed_tables = torch.full(tables, -1, dtype=torch.int32, device=device)

    def commit(self) -> None:
        """Write to every page, so that the system gives the memory now and not at first use."""
        self.all_hot.zero_()
        self.all_sealed.zero_()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. A GPU allocates them now; a CPU allocates each page of memory at its first write."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not num_bytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would write all of it, which takes up to a second for 1 GiB.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
