"""How the Triton attention kernels are compiled for a format, a geometry and a GPU.

The choices rest on instruction counts of the machine code (`benchmarks/sass.py`), not on timings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
from triton.runtime.interpreter import InterpretedFunction

from kvmesh.kernels import workspace
from kvmesh.kernels.attention.triton_decode import decode_kernel
from kvmesh.kernels.attention.triton_form import Form, Geometry, form_of
from kvmesh.kernels.attention.triton_prefill import prefill_kernel
from kvmesh.kernels.attention.triton_prefix import prefix_kernel
from kvmesh.kernels.attention.triton_sealed import HEADS
from kvmesh.kernels.attention.triton_sides import TOKENS
from kvmesh.kernels.formats.affine.side import Affine
from kvmesh.kernels.formats.base import KVFormat, Side
from kvmesh.kernels.formats.codebook.side import Codebook
from kvmesh.kernels.formats.tiles_triton import format_kernels
from kvmesh.kernels.gpu import Capability

MAX_BLOCK_N = 64
# Hot keys of a tile that one warp reads: 16 rows, keys and sums fit in its registers.
ONE_WARP_HOT_N = 16
# Maximum registers per thread. Without a limit the compiler picks 168 for some formats and
# spills; with a higher limit it rarely uses them all.
INTEGER_REGISTERS = 208
NUM_STAGES = 3
INTEGER_HEAD_DIMS = (64, 128)
INTEGER_CAPABILITY = (8, 0)
# With this many query rows, the integer loop (eight rows at a time) costs as much as the plain
# loop over one tile of them all.
MIN_SHARED_ROWS = 64
# Of kernels that read a tile of sealed keys for many rows, on a multiprocessor.
MANY_ROWS_WARPS = 8


def takes_integer_path(
    fmt: KVFormat,
    geometry: Geometry,
    capability: Capability | None,
    sliding_window: int | None = None,
) -> bool:
    """Whether decode multiplies this format's codes on integer tensor cores.

    capability: of the GPU; None for the interpreter, which supports everything
    """
    return (
        geometry.head_dim in INTEGER_HEAD_DIMS
        and geometry.page_size % TOKENS == 0
        and sliding_window is None
        and (capability is None or (capability >= INTEGER_CAPABILITY and geometry.dtype_bytes == 2))
        and all(map(_has_integer_codes, (fmt.k, fmt.v)))
    )


def _has_integer_codes(side: Side) -> bool:
    """Whether codes lie on a uniform grid."""
    return isinstance(side, Affine) or (side.values and isinstance(side, Codebook))


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is compiled."""

    kernel: Any
    form: Form
    options: dict[str, Any]


@cache
def decode_launch(
    fmt: KVFormat,
    geometry: Geometry,
    capability: Capability | None,
    *,
    integer: bool,
    softcap: bool = False,
    window: bool = False,
    prefixes: bool = False,
) -> Launch:
    """integer: sealed pages are read by the integer loop (`takes_integer_path`)"""
    head_dim, group = geometry.head_dim, geometry.group
    shape: dict[str, Any] = {
        "has_softcap": softcap,
        "has_window": window,
        "has_prefixes": prefixes,
        "chunk_pages": _chunk_pages(workspace.DECODE_CHUNK_TOKENS, geometry),
    }
    if integer:
        form = form_of(
            fmt,
            geometry,
            **shape,
            integer=True,
            ptx=not isinstance(decode_kernel, InterpretedFunction),
            heads=HEADS,
            block_m=16,
            block_n=TOKENS,
            hot_n=ONE_WARP_HOT_N,
            stages=NUM_STAGES,
        )
        options = {"num_warps": 1, "num_stages": NUM_STAGES, "maxnreg": INTEGER_REGISTERS}
        return Launch(decode_kernel, form, options)
    one_warp = all(side.one_warp for side in format_kernels(fmt))
    one_warp &= head_dim <= max(INTEGER_HEAD_DIMS)
    tokens = _tile_tokens(geometry, capability)
    stages = 1 if head_dim > 128 and shared_kib(capability) < 160 else NUM_STAGES
    form = form_of(
        fmt,
        geometry,
        **shape,
        heads=group,
        block_m=max(16, triton.next_power_of_2(group)),
        block_n=tokens,
        hot_n=ONE_WARP_HOT_N if one_warp else tokens,
        hot_stages=1 if one_warp else stages,
    )
    return Launch(decode_kernel, form, {"num_warps": 1 if one_warp else 4, "num_stages": stages})


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Query rows, i.e. (token, query head) pairs, for which a tile is unpacked once."""

    rows: int
    warps: int
    stages: int


def row_block(head_dim: int, capability: Capability | None) -> RowBlock:
    """The largest block that fits in shared memory and spills no registers."""
    large_shared = shared_kib(capability) >= 160
    if head_dim <= 128:
        return RowBlock(128, 8, 2) if large_shared else RowBlock(64, 4, 1)
    return RowBlock(64, 8, 2) if shared_kib(capability) >= 200 else RowBlock(32, 4, 1)


def shared_kib(capability: Capability | None) -> int:
    """Maximum shared memory per program (CUDA C++ programming guide, compute capabilities)."""
    if capability is None:
        return 227
    table = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227}
    return table.get(capability, 99)


@cache
def prefill_launch(
    fmt: KVFormat,
    geometry: Geometry,
    capability: Capability | None,
    *,
    softcap: bool = False,
    window: bool = False,
) -> Launch:
    block_q = max(1, row_block(geometry.head_dim, capability).rows // geometry.group)
    shape = {
        "block_q": block_q,
        "chunk_pages": _chunk_pages(workspace.PREFILL_CHUNK_TOKENS, geometry),
        "has_softcap": softcap,
        "has_window": window,
    }
    return _many_rows(prefill_kernel, fmt, geometry, capability, block_q, shape)


@cache
def prefix_launch(
    fmt: KVFormat, geometry: Geometry, capability: Capability | None, *, softcap: bool = False
) -> Launch:
    """Shared prefixes; its form's chunks are those of decode."""
    members = _max_sharers(geometry, capability)
    chunk_pages = _chunk_pages(workspace.DECODE_CHUNK_TOKENS, geometry)
    shape = {"chunk_pages": chunk_pages, "has_softcap": softcap}
    return _many_rows(prefix_kernel, fmt, geometry, capability, members, shape)


def prefix_programs(launch: Launch, processors: int) -> int:
    """Of `prefix_launch` for each KV head: so many that they fill the device once."""
    at_once: int = MANY_ROWS_WARPS // launch.options["num_warps"] * processors
    return max(1, at_once // launch.form.num_kv_heads)


def _many_rows(
    kernel: Any,
    fmt: KVFormat,
    geometry: Geometry,
    capability: Capability | None,
    queries: int,
    shape: dict[str, Any],
) -> Launch:
    """queries: of a tile of rows, for each of a KV head's query heads"""
    block = row_block(geometry.head_dim, capability)
    tokens = _tile_tokens(geometry, capability)
    form = form_of(
        fmt,
        geometry,
        dense=True,
        **shape,
        block_m=max(16, triton.next_power_of_2(queries * geometry.group)),
        block_n=tokens,
        hot_n=tokens,
        hot_stages=block.stages,
    )
    return Launch(kernel, form, {"num_warps": block.warps, "num_stages": block.stages})


def sharers(fmt: KVFormat, geometry: Geometry, capability: Capability | None) -> tuple[int, int]:
    """Minimum and maximum members of a set of `SharedPrefixes`."""
    max_members = _max_sharers(geometry, capability)
    integer = takes_integer_path(fmt, geometry, capability)
    min_members = MIN_SHARED_ROWS // geometry.group if integer else 2
    return max(2, min(min_members, max_members)), max_members


def _max_sharers(geometry: Geometry, capability: Capability | None) -> int:
    return max(2, row_block(geometry.head_dim, capability).rows // geometry.group)


def _chunk_pages(tokens: int, geometry: Geometry) -> int:
    return max(1, tokens // geometry.page_size)


def _tile_tokens(geometry: Geometry, capability: Capability | None) -> int:
    """A power of two that divides the page; a full tile of wide heads does not fit a T4."""
    wide = geometry.head_dim > 128 and shared_kib(capability) <= 64
    return min(MAX_BLOCK_N // 2 if wide else MAX_BLOCK_N, geometry.page_size & -geometry.page_size)
