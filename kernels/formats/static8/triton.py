"""Triton functions of `Static8`; sealing gives the same bytes as the reference."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.packing_triton import (
    block_channels,
    block_slots,
    block_tokens,
    load_codes,
    store_codes,
)
from kvmesh.kernels.formats.static8.side import Static8
from kvmesh.kernels.formats.tiles_triton import SideKernels, load


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
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = None if BLOCK_D == HEAD_DIM else offs_d < HEAD_DIM
    scale_ptr = table_ptr + head * (2 * HEAD_DIM)
    scale = load(scale_ptr + offs_d, mask_d)
    zero = load(scale_ptr + HEAD_DIM + offs_d, mask_d)
    codes = load_codes(part_ptr, first_slot, SIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D)
    codes = codes.to(tl.float32)
    if SIDE.values:
        x = (codes * scale[:, None] + zero[:, None]).to(DTYPE)
        return tl.trans(x), 1.0, 0.0
    else:
        return (codes * scale[None, :] + zero[None, :]).to(DTYPE), 1.0, 0.0


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
    slots, mask_n = block_slots(PAGE_SIZE)
    channels, mask_d = block_channels(SIDE, HEAD_DIM)
    mask = mask_n[:, None] & mask_d[None, :]
    scale_ptr = table_ptr + head * (2 * HEAD_DIM)
    scale = tl.load(scale_ptr + channels, mask=mask_d, other=1.0)
    zero = tl.load(scale_ptr + HEAD_DIM + channels, mask=mask_d, other=0.0)
    BLOCK: tl.constexpr = block_tokens(PAGE_SIZE)
    for block in range(PAGE_SIZE // BLOCK):
        at = (block * BLOCK + slots)[:, None] * HEAD_DIM + channels[None, :]
        x = tl.load(hot_ptr + at, mask=mask, other=0.0).to(tl.float32)
        t = tl.math.div_rn(x - zero[None, :], tl.broadcast_to(scale[None, :], x.shape))
        codes = tl.minimum(tl.maximum(tl.floor(t + 128.5), 0.0), 255.0).to(tl.int32)
        store_codes(codes, part_ptr, block, SIDE, PAGE_SIZE, HEAD_DIM)


def kernels(side: Static8) -> SideKernels:
    return SideKernels(load_tile, folded=False, seal=seal)
