"""How the Triton attention kernels are compiled for a format, a geometry and a GPU.

The choices rest on instruction counts of the machine code (`benchmarks/sass.py`), not on timings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from kvmesh.kernels.attention.triton_loop import attention_kernel
from kvmesh.kernels.attention.triton_prefix import prefix_kernel
from kvmesh.kernels.attention.triton_sealed import HEADS, sealed_kernel
from kvmesh.kernels.attention.triton_sides import TOKENS, token_run
from kvmesh.kernels.formats.affine.side import Affine
from kvmesh.kernels.formats.base import KVFormat, Side
from kvmesh.kernels.formats.codebook.side import Codebook
from kvmesh.kernels.formats.static8.side import Static8
from kvmesh.kernels.formats.tiles_triton import format_kernels

MAX_BLOCK_N = 64
MIN_TILES_PER_SPLIT = 4
# Programs that a multiprocessor holds at a time. With four warps its shared memory is the limit;
# with one warp the limit is its 65536 registers, of which a thread takes 170 to 250.
PLAIN_PROGRAMS, INTEGER_PROGRAMS = 4, 9
# Maximum registers per thread. Without a limit the compiler picks 168 for some formats and
# spills; with a higher limit it rarely uses them all. Two runs of tokens need the maximum.
INTEGER_REGISTERS, INTEGER_REGISTERS_OF_TOKEN_RUNS = 208, 255
NUM_STAGES = 3
# Features that few layers or batches have; the launcher sets those that one has.
FLAGS = {"HAS_WINDOW": False, "HAS_PREFIXES": False}
INTEGER_HEAD_DIMS = (64, 128)
INTEGER_CAPABILITY = (8, 0)
# With this many query rows, the integer loop (eight rows at a time) costs as much as the plain
# loop over one tile of them all.
MIN_SHARED_ROWS = 64

Capability = tuple[int, int]  # of a GPU; None for the interpreter, which supports everything


def takes_integer_path(
    fmt: KVFormat,
    head_dim: int,
    page_size: int,
    *,
    dtype: torch.dtype,
    sliding_window: int | None = None,
    capability: Capability | None = None,
) -> bool:
    """Whether decode multiplies this format's codes on integer tensor cores.

    capability: of the GPU; None for the interpreter, which supports everything
    """
    return (
        head_dim in INTEGER_HEAD_DIMS
        and page_size % TOKENS == 0
        and sliding_window is None
        and (capability is None or (capability >= INTEGER_CAPABILITY and dtype.itemsize == 2))
        and all(_has_integer_codes(side, page_size, head_dim) for side in (fmt.k, fmt.v))
    )


def _has_integer_codes(side: Side, page_size: int, head_dim: int) -> bool:
    """Whether codes lie on a uniform grid and a product of codes can be cut at its scales: one
    scale per 32 or more channels of a token or, for keys, per 32 or more tokens of a channel."""
    if isinstance(side, Affine):
        run = side.run_length(page_size, head_dim)
        if side.along == "token":
            return run == head_dim or (run % 32 == 0 and (side.values or side.width != 3))
        return not side.values and (run == 32 or run % TOKENS == 0)
    if isinstance(side, Static8):
        return True
    return isinstance(side, Codebook) and side.levels == "uniform" and not side.residual


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is compiled: constants other than the layer's flags, warps and stages.

    tokens: per tile; programs: how many a multiprocessor holds at a time
    """

    kernel: Any
    constants: dict[str, Any]
    tokens: int
    programs: int
    options: dict[str, Any]


@cache
def decode_launch(
    fmt: KVFormat,
    head_dim: int,
    group: int,
    page_size: int,
    dtype_bytes: int = 2,
    hot_only: bool = False,
    capability: Capability | None = None,
) -> Launch:
    """The plain loop; group: query heads per KV head."""
    shape = _decode_shape(group) | {"HOT_ONLY": hot_only, "SEALED_ONLY": False}
    geometry = (fmt, head_dim, group, page_size, dtype_bytes)
    launch = _plain_launch(attention_kernel, *geometry, shape, capability)
    if head_dim > 128 and shared_kib(capability) < 160:
        return replace(launch, options={**launch.options, "num_stages": 1})
    return launch


@cache
def one_warp_launch(
    fmt: KVFormat, head_dim: int, group: int, page_size: int, dtype_bytes: int = 2
) -> Launch | None:
    """The plain loop over sealed pages only, with one warp per program; None if the format does
    not suit it. Hot pages would need more registers than one warp has."""
    k, v = format_kernels(fmt)
    if not (k.one_warp and v.one_warp and head_dim <= max(INTEGER_HEAD_DIMS)):
        return None
    shape = _decode_shape(group) | {"HOT_ONLY": False, "SEALED_ONLY": True}
    geometry = (fmt, head_dim, group, page_size, dtype_bytes)
    launch = _plain_launch(attention_kernel, *geometry, shape, None)
    options = {**launch.options, "num_warps": 1}
    return replace(launch, programs=INTEGER_PROGRAMS, options=options)


def _decode_shape(group: int) -> dict[str, Any]:
    block_m = max(16, triton.next_power_of_2(group))
    return {"DECODE": True, "BLOCK_Q": 1, "BLOCK_M": block_m, **FLAGS}


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
    head_dim: int,
    group: int,
    page_size: int,
    dtype_bytes: int = 2,
    capability: Capability | None = None,
) -> Launch:
    """group: query heads per KV head"""
    block = row_block(head_dim, capability)
    block_q = max(1, block.rows // group)
    block_m = max(16, triton.next_power_of_2(block_q * group))
    shape = {"DECODE": False, "BLOCK_Q": block_q, "BLOCK_M": block_m, **FLAGS}
    shape |= {"HOT_ONLY": False, "SEALED_ONLY": False}
    geometry = (fmt, head_dim, group, page_size, dtype_bytes)
    launch = _plain_launch(attention_kernel, *geometry, shape, capability)
    return _with_rows(launch, block, fmt)


@cache
def prefix_launch(
    fmt: KVFormat,
    head_dim: int,
    group: int,
    page_size: int,
    dtype_bytes: int = 2,
    capability: Capability | None = None,
) -> Launch:
    """Shared prefixes; group: query heads per KV head"""
    max_members = _max_sharers(head_dim, group, capability)
    shape = {"BLOCK_M": max(16, triton.next_power_of_2(max_members * group))}
    geometry = (fmt, head_dim, group, page_size, dtype_bytes)
    launch = _plain_launch(prefix_kernel, *geometry, shape, capability)
    return _with_rows(launch, row_block(head_dim, capability), fmt)


def _with_rows(launch: Launch, block: RowBlock, fmt: KVFormat) -> Launch:
    """For many rows, for which folding scales does not pay."""
    dense: dict[str, Any] = {}
    for side, kernels in zip("KV", format_kernels(fmt), strict=True):
        if kernels.load_dense is not None:
            dense |= {f"LOAD_{side}": kernels.load_dense, f"{side}_FOLDED": False}
    stages = min(block.stages, launch.options["num_stages"])
    options = {"num_warps": block.warps, "num_stages": stages}
    constants = {**launch.constants, **dense}
    programs = max(1, 2 * 4 // block.warps)
    return replace(launch, constants=constants, programs=programs, options=options)


def sharers(
    fmt: KVFormat,
    head_dim: int,
    group: int,
    page_size: int,
    dtype: torch.dtype,
    capability: Capability | None,
) -> tuple[int, int]:
    """Minimum and maximum members of a set of `SharedPrefixes`; group: query heads per KV head."""
    max_members = _max_sharers(head_dim, group, capability)
    integer = takes_integer_path(fmt, head_dim, page_size, dtype=dtype, capability=capability)
    min_members = MIN_SHARED_ROWS // group if integer else 2
    return max(2, min(min_members, max_members)), max_members


def _max_sharers(head_dim: int, group: int, capability: Capability | None) -> int:
    return max(2, row_block(head_dim, capability).rows // group)


def _plain_launch(
    kernel: Any,
    fmt: KVFormat,
    head_dim: int,
    group: int,
    page_size: int,
    dtype_bytes: int,
    shape: dict[str, Any],
    capability: Capability | None,
) -> Launch:
    k, v = format_kernels(fmt)
    # A full tile of wide heads does not fit a T4.
    max_tokens = MAX_BLOCK_N if head_dim <= 128 or shared_kib(capability) > 64 else MAX_BLOCK_N // 2
    tokens = min(max_tokens, page_size & -page_size)
    constants = {
        "LOAD_K": k.load,
        "LOAD_K_CENTRE": k.load_centre,
        "LOAD_V": v.load,
        "K_FOLDED": k.folded,
        "V_FOLDED": v.folded,
        "K_SIDE": fmt.k,
        "V_SIDE": fmt.v,
        "K_BYTES": fmt.k.num_bytes(page_size, head_dim, dtype_bytes),
        "PAGE_BYTES": fmt.page_bytes(page_size, head_dim, dtype_bytes),
        "HAS_SOFTCAP": False,
        "GROUP": group,
        "PAGE_SIZE": page_size,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_N": tokens,
        "PRECISION": "ieee",
        **shape,
    }
    stages = 1 if k.looks_up or v.looks_up else NUM_STAGES
    options = {"num_warps": 4, "num_stages": stages}
    return Launch(kernel, constants, tokens, PLAIN_PROGRAMS, options)


@cache
def integer_launch(fmt: KVFormat, head_dim: int, group: int, page_size: int) -> Launch:
    """The integer loop over sealed pages; group: query heads per KV head."""
    constants = {
        "K_SIDE": fmt.k,
        "V_SIDE": fmt.v,
        "K_BYTES": fmt.k.num_bytes(page_size, head_dim),
        "PAGE_BYTES": fmt.page_bytes(page_size, head_dim),
        "HAS_PREFIXES": False,
        "HAS_SOFTCAP": False,
        "GROUP": group,
        "PAGE_SIZE": page_size,
        "HEAD_DIM": head_dim,
        "MIN_TILES": MIN_TILES_PER_SPLIT,
        "HEADS": HEADS,
        "TOKENS": TOKENS,
        "STAGES": NUM_STAGES,
        "PTX": not isinstance(sealed_kernel, InterpretedFunction),
    }
    registers = INTEGER_REGISTERS
    if token_run(fmt.k, page_size, head_dim) < TOKENS:
        registers = INTEGER_REGISTERS_OF_TOKEN_RUNS
    options = {"num_warps": 1, "num_stages": NUM_STAGES, "maxnreg": registers}
    return Launch(sealed_kernel, constants, TOKENS, INTEGER_PROGRAMS, options)
