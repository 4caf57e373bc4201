"""Triton functions of `Exact`."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.exact.side import Exact
from kvmesh.kernels.formats.tiles_triton import SideKernels, load, padded

SEAL_ROWS = tl.constexpr(16)


@triton.jit
def load_tile(part_ptr, first_slot, SIDE: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr):
    offs_n = first_slot + tl.arange(0, FORM.block_n)
    offs_d = tl.arange(0, FORM.block_d)
    mask = None if FORM.block_d == FORM.head_dim else (offs_d < FORM.head_dim)[None, :]
    row_ptr = part_ptr.to(tl.pointer_type(DTYPE), bitcast=True)
    return load(row_ptr + offs_n[:, None] * FORM.head_dim + offs_d[None, :], mask), 1.0, 0.0


@triton.jit
def seal(hot_ptr, part_ptr, SIDE: tl.constexpr, FORM: tl.constexpr):
    PAGE_SIZE: tl.constexpr = FORM.page_size
    HEAD_DIM: tl.constexpr = FORM.head_dim
    to_ptr = part_ptr.to(hot_ptr.dtype, bitcast=True)
    offs_d = tl.arange(0, padded(HEAD_DIM))
    for first in range(0, PAGE_SIZE, SEAL_ROWS):
        offs_n = first + tl.arange(0, SEAL_ROWS)
        at = offs_n[:, None] * HEAD_DIM + offs_d[None, :]
        mask = (offs_n < PAGE_SIZE)[:, None] & (offs_d < HEAD_DIM)[None, :]
        tl.store(to_ptr + at, tl.load(hot_ptr + at, mask=mask), mask=mask)


def kernels(side: Exact) -> SideKernels:
    return SideKernels(load_tile, folded=False, seal=seal)
