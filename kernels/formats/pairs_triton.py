"""Channels in the pairs that RoPE rotates: attention takes such keys as two tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def padded_half(head_dim: int) -> int:
    """Pairs of a head, padded for a matrix product."""
    return max(16, triton.next_power_of_2(head_dim // 2))


@triton.jit
def pair_channels(PART: tl.constexpr, ROPE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The first (PART 0) or second (PART 1) channel of every pair: [padded_half] int32, of which
    HEAD_DIM // 2 exist. ROPE: the number of rotated pairs, and whether they are interleaved."""
    PLANES: tl.constexpr = ROPE[0]
    i = tl.arange(0, padded_half(HEAD_DIM))
    if ROPE[1]:
        channels = 2 * i + PART
    elif 2 * PLANES == HEAD_DIM:
        channels = i + PART * PLANES
    else:  # channels that are not rotated form pairs of neighbours
        channels = tl.where(i < PLANES, i + PART * PLANES, 2 * i + PART)
    return channels
