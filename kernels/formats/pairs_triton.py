"""Channels in the pairs that RoPE turns: attention takes such keys as two tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def padded_half(head_dim: int) -> int:
    """Planes of a head, as a matrix product wants them."""
    return max(16, triton.next_power_of_2(head_dim // 2))


@triton.jit
def pair_channels(PART: tl.constexpr, TURNED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The channels that come first in their planes (PART 0) or second (1): [padded_half] int32, of
    which HEAD_DIM // 2 are there. TURNED: planes that are turned, and whether interleaved."""
    PLANES: tl.constexpr = TURNED[0]
    i = tl.arange(0, padded_half(HEAD_DIM))
    if TURNED[1]:
        channels = 2 * i + PART
    elif 2 * PLANES == HEAD_DIM:
        channels = i + PART * PLANES
    else:  # channels that stand still are planes that lie together
        channels = tl.where(i < PLANES, i + PART * PLANES, 2 * i + PART)
    return channels
