"""What the kernel of attention over latents knows when it is compiled, and how it is launched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from kvmesh.kernels.attention.triton_form import Geometry
from kvmesh.kernels.attention.triton_launch import shared_kib
from kvmesh.kernels.formats.base import KVFormat, Side
from kvmesh.kernels.formats.exact.side import Exact
from kvmesh.kernels.formats.fp8.side import Fp8
from kvmesh.kernels.formats.tiles_triton import KernelConstants
from kvmesh.kernels.gpu import Capability

# By counts of machine code: 32 heads spill 400 bytes and more of a thread's registers, and a second
# stage takes an eighth more instructions and the shared memory of a second program.
HEADS, OPTIONS = 16, {"num_warps": 4, "num_stages": 1}


@dataclass(frozen=True, eq=False)
class LatentForm(KernelConstants):
    """See the module.

    code: how sealed pages store numbers: "dense", "grid" (per token, of `width` bits) or "e4m3"
    heads: of a program, `num_heads` of a query; block_v, block_r: channels, padded
    block_n: tokens of a tile, which lies in one page
    """

    code: str
    width: int
    num_heads: int
    heads: int
    head_dim: int
    values: int
    block_v: int
    block_r: int
    block_n: int
    page_size: int
    page_bytes: int
    sink_pages: int
    recent_pages: int
    stride: int


@cache
def form_of(
    fmt: KVFormat, geometry: Geometry, windows: tuple[int, int], capability: Capability | None
) -> LatentForm:
    """windows: sink pages and recent pages"""
    values, head_dim, page_size = fmt.values_in_keys, geometry.head_dim, geometry.page_size
    code, width = _code_of(fmt.k)
    sink_pages, recent_pages = windows
    return LatentForm(
        code=code,
        width=width,
        num_heads=geometry.group,
        heads=HEADS,
        head_dim=head_dim,
        values=values,
        block_v=_block(values),
        block_r=_block(head_dim - values),
        # Two tiles of 32 keys of 576 channels, for two uses, take 106 KiB.
        block_n=math.gcd(page_size, 32 if shared_kib(capability) > 106 else 16),
        page_size=page_size,
        page_bytes=fmt.page_bytes(page_size, head_dim, geometry.dtype_bytes),
        sink_pages=sink_pages,
        recent_pages=recent_pages,
        stride=geometry.stride,
    )


def _block(channels: int) -> int:
    """Channels of a tile: a power of two, and enough for tensor cores."""
    return max(16, 1 << max(0, channels - 1).bit_length())


def _code_of(side: Side) -> tuple[str, int]:
    """`code` and `width` of a side of keys that `treats_sides_alike` allows."""
    if isinstance(side, Exact):
        return "dense", 0
    return ("e4m3" if isinstance(side, Fp8) else "grid", side.width)
