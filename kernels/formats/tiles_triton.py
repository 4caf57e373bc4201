"""What a side supplies to the Triton kernels, and the numbers that all sides store.

A kernel receives a side as a compile-time value, so `SIDE.width` and the other fields
are constants in it. Pages are bytes; a part's numbers are read by casting its pointer to
another type.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import triton
import triton.language as tl
from triton.runtime.jit import JITCallable

from kvmesh.kernels.formats import scales
from kvmesh.kernels.formats.base import KVFormat

SCALE_FLOOR = tl.constexpr(scales.SCALE_FLOOR)
BF16_MAX = tl.constexpr(scales.BF16_MAX)


@dataclass(frozen=True, eq=False)
class KernelConstants:
    """What a kernel knows when it is compiled, as one argument. Equal arguments must be the same
    object: a launch looks the compiled variant up by identity."""

    @cached_property
    def cache_key(self) -> str:
        """Names the value in Triton's cache on disk: with the sources of the sides' functions."""
        parts = []
        for item in fields(self):
            value = getattr(self, item.name)
            parts.append(value.cache_key if isinstance(value, JITCallable) else repr(value))
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class SideKernels:
    """The Triton functions of a side.

    load: (part_ptr, first_slot, SIDE, DTYPE, FORM) -> tile, scale, offset: block_n tokens of one
        page of one head from first_slot on, tile [block_n, block_d] in DTYPE, finite for channels
        from head_dim on; the numbers are tile * scale[:, None] + offset[:, None]
    folded: whether scale and offset, [block_n] fp32, are returned; otherwise the tile is
        the numbers. An offset may be None, for 0
    load_dense: the same for many queries, for which folding costs more: the tile is the numbers;
        None if there is only `load`
    seal: (hot_ptr, part_ptr, SIDE, FORM): encode one page of one head, [page_size, head_dim] of
        the compute dtype, into this side's part
    load_centre: (part_ptr, FORM) -> a vector to add to all keys of a page, [block_d] fp32; None
        for sides without one
    one_warp: whether decode over sealed pages needs the fewest instructions with one warp per
        program

    FORM: `attention/triton_form.py`, or for `seal` any value with page_size and head_dim
    """

    load: Any
    folded: bool
    seal: Any
    load_dense: Any = None
    load_centre: Any = None
    one_warp: bool = False


def format_kernels(fmt: KVFormat) -> tuple[SideKernels, SideKernels]:
    """For keys and for values. Raises ValueError for formats without kernels."""
    if not fmt.has_kernels:
        why = "its values are in keys" if fmt.values_in_keys else "it is for comparison"
        raise ValueError(f"fmt: {fmt.name} has no kernels, because {why}")
    return fmt.k.kernels(), fmt.v.kernels()


@triton.constexpr_function
def padded(n: int) -> int:
    """The next power of two."""
    return triton.next_power_of_2(n)


@triton.jit
def from_bf16(bits):
    """int16 bits -> fp32"""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def from_e5m3(code):
    """int8 -> fp32, see scales.py"""
    return (((code.to(tl.int32) & 255) << 20) + (107 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def to_bf16(x):
    """fp32 -> int16 bits, rounded to nearest even; the interpreter's own conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def to_e5m3(x):
    """Positive fp32 -> int8 code of the nearest number"""
    x = tl.minimum(tl.maximum(x, 2.0**-20), 3840.0)
    code = ((x.to(tl.int32, bitcast=True) + (1 << 19)) >> 20) - (107 << 3)
    return tl.minimum(tl.maximum(code, 0), 255).to(tl.int8)


@triton.jit
def load(ptr, mask):
    """0 where the mask is false; mask None loads everything"""
    if mask is None:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=mask, other=0)


@triton.jit
def as_int16(ptr):
    return ptr.to(tl.pointer_type(tl.int16), bitcast=True)


@triton.jit
def load_bf16(ptr, index, mask=None):
    """ptr: to bytes; index: in numbers"""
    return from_bf16(load(as_int16(ptr) + index, mask))


@triton.jit
def load_scale(ptr, index, mask, SCALE: tl.constexpr):
    """SCALE: "bf16" or "e5m3\""""
    if SCALE == "bf16":
        return load_bf16(ptr, index, mask)
    else:
        return from_e5m3(load(ptr + index, mask))


@triton.jit
def store_bf16(ptr, index, x, mask):
    tl.store(as_int16(ptr) + index, to_bf16(x), mask=mask)


@triton.jit
def store_scale(ptr, index, x, mask, SCALE: tl.constexpr):
    if SCALE == "bf16":
        store_bf16(ptr, index, x, mask)
    else:
        tl.store(ptr + index, to_e5m3(x), mask=mask)


@triton.jit
def rounded_scale(x, SCALE: tl.constexpr):
    """The scale after storing and loading."""
    if SCALE == "bf16":
        return from_bf16(to_bf16(x))
    else:
        return from_e5m3(to_e5m3(x))
