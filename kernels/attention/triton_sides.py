"""What the integer loop needs to know about a side, and the numbers stored with its codes."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.base import Side
from kvmesh.kernels.formats.codebook.side import UNIFORM_STEP, Codebook
from kvmesh.kernels.formats.tiles_triton import from_e5m3

TOKENS = 64  # per tile


@triton.constexpr_function
def grid_of(side: Side) -> str:
    """Grids "channel" and "token" have scales and offsets, "level" one scale per token."""
    return getattr(side, "along", "level")


@triton.constexpr_function
def scale_bytes(side: Side) -> int:
    return 2 if side.scale == "bf16" else 1


@triton.constexpr_function
def step_of(side: Side) -> float:
    """The factor of scales."""
    return UNIFORM_STEP[side.width] if isinstance(side, Codebook) else 1.0


@triton.constexpr_function
def middle_of(side: Side) -> float:
    """The code for 0, or for the offset; 128 is subtracted from 8-bit codes."""
    return (2.0**side.width - 1.0) / 2.0 if isinstance(side, Codebook) else 0.0


@triton.constexpr_function
def top_offset(side: Side) -> float:
    """What has to be added to the last plane's numbers; with 8 bits, token grids include it in
    their offsets."""
    if side.width == 8:
        return 128.0 if grid_of(side) == "channel" else 0.0
    return 2.0 ** (side.width - 1)


@triton.jit
def load_words(ptr, COUNT: tl.constexpr, SCALE: tl.constexpr):
    """COUNT stored numbers in order, as int32 words of two or four."""
    words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(words_ptr + tl.arange(0, COUNT // (2 if SCALE == "bf16" else 4)))


@triton.jit
def numbers(words, SCALE: tl.constexpr):
    """Words from `load_words` -> fp32, in order"""
    if SCALE == "e5m3":
        codes = (words[:, None] >> (tl.arange(0, 4) * 8)[None, :]).to(tl.int8)
        return from_e5m3(codes.reshape(4 * words.shape[0]))
    else:
        both = tl.join(words << 16, words & -65536).reshape(2 * words.shape[0])
        return both.to(tl.float32, bitcast=True)


@triton.jit
def power_above(words, SCALE: tl.constexpr):
    """The power of two above all scales, limited so that MAGIC times it is a normal number."""
    if SCALE == "e5m3":
        codes = (words[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 255
        exponent = (tl.max(codes.reshape(4 * words.shape[0]), 0) >> 3) + 108
    else:
        exponent = (tl.max(tl.maximum(words & 0x7FFF, words >> 16), 0) >> 7) + 1
    return (exponent << 23).to(tl.float32, bitcast=True)
