"""What the integer loop needs to know about a side, and the numbers stored with its codes."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.base import Side
from kvmesh.kernels.formats.codebook.side import UNIFORM_STEP, Codebook
from kvmesh.kernels.formats.static8.side import Static8
from kvmesh.kernels.formats.tiles_triton import from_e5m3

TOKENS = 64  # per tile


@triton.constexpr_function
def grid_of(side: Side) -> str:
    """Grids "channel" and "token" have scales and offsets, a grid "level" has one scale per token,
    and a grid "constant" stores none in the page."""
    return getattr(side, "along", "constant" if isinstance(side, Static8) else "level")


@triton.constexpr_function
def scale_bytes(side: Side) -> int:
    return 2 if getattr(side, "scale", None) == "bf16" else 1


@triton.constexpr_function
def planes_of(side: Side) -> int:
    return {8: 1, 4: 2, 3: 4, 2: 4}[side.width]


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
    their offsets, and constant grids are centred."""
    if side.width == 8:
        return 128.0 if grid_of(side) == "channel" else 0.0
    return 2.0 ** (side.width - 1)


@triton.constexpr_function
def channel_runs(side: Side, head_dim: int) -> int:
    """Runs of channels with their own scale, per token."""
    return head_dim // side.run_length(TOKENS, head_dim) if grid_of(side) == "token" else 1


@triton.constexpr_function
def token_run(side: Side, page_size: int, head_dim: int) -> int:
    """Tokens that share a channel's scale."""
    return side.run_length(page_size, head_dim) if grid_of(side) == "channel" else page_size


@triton.jit
def load_words(ptr, COUNT: tl.constexpr, SCALE: tl.constexpr):
    """COUNT stored numbers in order, as int32 words of two or four."""
    words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(words_ptr + tl.arange(0, COUNT // (2 if SCALE == "bf16" else 4)))


@triton.jit
def every(x, R: tl.constexpr, STEP: tl.constexpr):
    """[X] -> [X / STEP], the elements R, R + STEP, ...; STEP is a power of two"""
    if STEP == 1:
        return x
    else:
        even, odd = tl.split(x.reshape(x.shape[0] // 2, 2))
        if R % 2 == 0:
            return every(even, R // 2, STEP // 2)
        else:
            return every(odd, R // 2, STEP // 2)


@triton.jit
def numbers(words, R: tl.constexpr, RUNS: tl.constexpr, SCALE: tl.constexpr):
    """Every RUNS-th number starting at R, fp32, in order."""
    if SCALE == "e5m3":
        codes = (words[:, None] >> (tl.arange(0, 4) * 8)[None, :]).to(tl.int8)
        return from_e5m3(every(codes.reshape(4 * words.shape[0]), R, RUNS))
    elif RUNS == 1:
        both = tl.join(words << 16, words & -65536).reshape(2 * words.shape[0])
        return both.to(tl.float32, bitcast=True)
    else:
        word = every(words, R // 2, RUNS // 2)
        word = word << 16 if R % 2 == 0 else word & -65536
        return word.to(tl.float32, bitcast=True)


@triton.jit
def power_above(words, R: tl.constexpr, RUNS: tl.constexpr, SCALE: tl.constexpr):
    """The power of two above every RUNS-th scale starting at R, limited so that MAGIC times it is
    a normal number."""
    if SCALE == "e5m3":
        codes = (words[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 255
        largest = tl.max(every(codes.reshape(4 * words.shape[0]), R, RUNS), 0)
        exponent = (largest >> 3) + 108
    else:
        if RUNS == 1:
            largest = tl.max(tl.maximum(words & 0x7FFF, words >> 16), 0)
        else:
            word = every(words, R // 2, RUNS // 2)
            largest = tl.max(word & 0x7FFF if R % 2 == 0 else word >> 16, 0)
        exponent = (largest >> 7) + 1
    return (exponent << 23).to(tl.float32, bitcast=True)
