"""Triton functions of `Exact`."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.exact.side import Exact
from kvmesh.kernels.formats.tiles_triton import SideKernels, padded

SEAL_ROWS = tl.constexpr(16)


@triton.jit
def load_tile(
    part_ptr,
    table_ptr,
    head,
    first_slot,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    offs_n = first_slot + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    row_ptr = part_ptr.to(tl.pointer_type(DTYPE), bitcast=True)
    row_ptr += offs_n[:, None] * HEAD_DIM + offs_d[None, :]
    if BLOCK_D == HEAD_DIM:
        return tl.load(row_ptr), 1.0, 0.0
    else:
        return tl.load(row_ptr, mask=(offs_d < HEAD_DIM)[None, :], other=0.0), 1.0, 0.0


@triton.jit
def seal(
    hot_ptr,
    part_ptr,
    table_ptr,
    head,
    position,
    SIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    to_ptr = part_ptr.to(hot_ptr.dtype, bitcast=True)
    offs_d = tl.arange(0, padded(HEAD_DIM))
    for first in range(0, PAGE_SIZE, SEAL_ROWS):
        offs_n = first + tl.arange(0, SEAL_ROWS)
        at = offs_n[:, None] * HEAD_DIM + offs_d[None, :]
        mask = (offs_n < PAGE_SIZE)[:, None] & (offs_d < HEAD_DIM)[None, :]
        tl.store(to_ptr + at, tl.load(hot_ptr + at, mask=mask), mask=mask)


def kernels(side: Exact) -> SideKernels:
    return SideKernels(load_tile, folded=False, seal=seal)
