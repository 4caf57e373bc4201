"""Tiles of weights for Triton kernels: of a `GroupedWeight`, decoded in registers, or of a tensor.

A step of a kernel's loop (`product`) takes `block_k` inputs. Codes of 8 bits are one tile of all of
them. Those of 4 bits are two, of which each byte has one number; so nothing is interleaved.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from kvmesh.kernels.formats.fp8.triton import from_e4m3
from kvmesh.kernels.formats.tiles_triton import KernelConstants
from kvmesh.kernels.linear.grouped import MIDDLES, GroupedWeight


def _uint4_ptx(half: int, last: str) -> str:
    """Four bytes in $2 become two registers of two bf16 numbers each: 4 bits of a byte, as the
    mantissa of 128, are 128 + code. All instructions take two numbers.

    last: how x and y, that and -128 - zero or an offset ($3, $4), and scales ($5, $6) are computed
    """
    return f"""{{
        .reg .b32 x, y, high, one, none, less;
        mov.b32 high, 0x43434343;
        mov.b32 one, 0x3f803f80;
        mov.b32 none, 0x80008000;
        mov.b32 less, 0xc300c300;
        shr.b32 x, $2, {4 * half};
        and.b32 y, x, 0x0f0f0f0f;
        prmt.b32 x, y, high, 0x4140;
        prmt.b32 y, y, high, 0x4342;
        {last}
    }}"""


# (code - zero) * scale, and code * scale + offset, each rounded once.
_ZEROS = """
        fma.rn.bf16x2 x, x, one, $3;
        fma.rn.bf16x2 y, y, one, $4;
        fma.rn.bf16x2 $0, x, $5, none;
        fma.rn.bf16x2 $1, y, $6, none;"""
_OFFSETS = """
        fma.rn.bf16x2 x, x, one, less;
        fma.rn.bf16x2 y, y, one, less;
        fma.rn.bf16x2 $0, x, $5, $3;
        fma.rn.bf16x2 $1, y, $6, $4;"""
LOW_ZEROS, HIGH_ZEROS = (tl.constexpr(_uint4_ptx(half, _ZEROS)) for half in (0, 1))
LOW_OFFSETS, HIGH_OFFSETS = (tl.constexpr(_uint4_ptx(half, _OFFSETS)) for half in (0, 1))


class WeightPointers(NamedTuple):
    """Of one weight's tensors; those that it does not have get a placeholder."""

    codes: Any
    scales: Any
    zeros: Any
    index: Any


@dataclass(frozen=True, eq=False)
class WeightForm(KernelConstants):
    """What kernels know about a weight when they are compiled; `weight_form` caches them.

    kind: as in `GroupedWeight`, or "plain" for a tensor [outputs, inputs]
    inputs, outputs: of the weight, or of each expert's
    groups: that share a scale; group: inputs of one
    ptx: bf16 numbers may be made by inline PTX
    """

    kind: str
    inputs: int
    outputs: int
    groups: int
    group: int
    middle: int
    has_zeros: bool
    has_offsets: bool
    has_index: bool
    block_m: int
    block_n: int
    block_k: int
    ptx: bool

    @property
    def halves(self) -> int:
        """Numbers of a byte."""
        return 2 if self.kind in ("uint4", "e2m1") else 1

    @property
    def code_tile(self) -> int:
        """Rows of codes in a step."""
        return self.block_k // self.halves

    @property
    def code_rows(self) -> int:
        """Of `GroupedWeight.codes`."""
        return -(-self.inputs // 32) * 16 if self.halves == 2 else self.inputs


@cache
def _form(*fields: Any) -> WeightForm:
    return WeightForm(*fields, ptx=not isinstance(load_codes, InterpretedFunction))


def weight_form(weight: GroupedWeight | torch.Tensor, block_m: int, block_n: int) -> WeightForm:
    """With as many inputs a step as keep a group's scales one row, up to 64."""
    if isinstance(weight, torch.Tensor):
        outputs, inputs = weight.shape[-2:]
        block_k = 32 if weight.dtype == torch.float32 else 64
        flags = (False, False, False)
        return _form("plain", inputs, outputs, 1, 0, 0, *flags, block_m, block_n, block_k)
    one_group = weight.index is None and weight.scales.shape[-2] == 1
    block_k = 64
    if weight.index is None and not one_group and weight.group % 64:
        block_k = 32
    return _form(
        weight.kind,
        weight.in_features,
        weight.shape[-2],
        weight.scales.shape[-2],
        weight.group,
        MIDDLES[weight.kind],
        weight.zeros is not None,
        weight.has_offsets,
        weight.index is not None,
        block_m,
        block_n,
        block_k,
    )


def block_rows(num_rows: int) -> int:
    """Rows of a tile where there are about so many."""
    return min(128, max(16, 1 << (num_rows - 1).bit_length()))


def options(form: WeightForm, dtype: torch.dtype) -> dict[str, object]:
    """How kernels with `product` are compiled for inputs of the dtype."""
    return {
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": 4 if form.block_m < 128 else 8,
        "num_stages": 3 if form.block_m < 128 else 2,
    }


def pointers(weight: GroupedWeight | torch.Tensor) -> WeightPointers:
    if isinstance(weight, torch.Tensor):
        return WeightPointers(weight, weight, weight, weight)
    codes = weight.codes
    return WeightPointers(
        codes,
        weight.scales,
        codes if weight.zeros is None else weight.zeros,
        codes if weight.index is None else weight.index,
    )


@triton.jit
def product(
    x_rows, mask_m, weight, offs_n, mask_n, begin, end, PRECISION: tl.constexpr, FORM: tl.constexpr
):
    """x · wᵀ over the inputs [begin, end), [block_m, block_n] fp32; x_rows: pointers [block_m, 1]

    mask_m, mask_n: which rows, and which outputs offs_n, exist
    """
    BLOCK_M: tl.constexpr = FORM.block_m
    BLOCK_N: tl.constexpr = FORM.block_n
    HALVES: tl.constexpr = FORM.halves
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(begin, end, FORM.block_k):
        codes = load_codes(weight, first, offs_n, mask_n, FORM)
        for half in tl.static_range(HALVES):
            offs_k = inputs_of(first, half, FORM)
            mask_x = mask_m[:, None] & (offs_k < FORM.inputs)[None, :]
            x = tl.load(x_rows + offs_k[None, :], mask=mask_x, other=0.0)
            w = decode(weight, codes, half, first, offs_k, offs_n, mask_n, x.dtype, FORM)
            sums = tl.dot(x, w, sums, input_precision=PRECISION)
    return sums


@triton.jit
def expert_of(weight, expert, FORM: tl.constexpr):
    """The pointers of one expert's weight."""
    at = expert.to(tl.int64)
    scales = at * (FORM.groups * FORM.outputs)
    return (
        weight.codes + at * (FORM.code_rows * FORM.outputs),
        weight.scales + scales,
        weight.zeros + scales,
        weight.index + at * FORM.inputs,
    )


@triton.jit
def load_codes(weight, first, offs_n, mask_n, FORM: tl.constexpr):
    """[block_k / halves, block_n], of the inputs from `first` on"""
    ROWS: tl.constexpr = FORM.code_tile
    rows = first // FORM.halves + tl.arange(0, ROWS)
    if FORM.kind == "plain":
        at = offs_n.to(tl.int64)[None, :] * FORM.inputs + rows[:, None]
    else:
        at = rows.to(tl.int64)[:, None] * FORM.outputs + offs_n[None, :]
    mask = (rows < FORM.code_rows)[:, None] & mask_n[None, :]
    return tl.load(weight[0] + at, mask=mask, other=0)


@triton.jit
def inputs_of(first, half, FORM: tl.constexpr):
    """The inputs of a tile, [block_k / halves]"""
    ROWS: tl.constexpr = FORM.code_tile
    rows = tl.arange(0, ROWS)
    if FORM.halves == 2:
        rows = rows // 16 * 32 + rows % 16 + 16 * half
    return first + rows


@triton.jit
def decode(
    weight, codes, half, first, offs_k, offs_n, mask_n, DTYPE: tl.constexpr, FORM: tl.constexpr
):
    """[block_k / halves, block_n] in DTYPE; finite for inputs beyond the last"""
    TWO_BYTES: tl.constexpr = tl.bfloat16 == DTYPE and weight[1].dtype.element_ty == tl.bfloat16
    if FORM.kind == "plain":
        return codes
    elif FORM.ptx and FORM.kind == "uint4" and TWO_BYTES:
        return _decode_uint4(weight, codes, half, first, offs_k, offs_n, mask_n, FORM)
    else:
        return _decode(weight, codes, half, first, offs_k, offs_n, mask_n, DTYPE, FORM)


@triton.jit
def _scales_of(weight, first, offs_k, offs_n, mask_n, FORM: tl.constexpr):
    """Where the scales of a tile are, [1 or block_k / halves, block_n], and which exist"""
    if FORM.has_index:
        mask_k = offs_k < FORM.inputs
        group = tl.load(weight[3] + offs_k, mask=mask_k, other=0)[:, None]
        mask = mask_k[:, None] & mask_n[None, :]
    else:
        group = first * 0
        if FORM.groups > 1:
            group = first // FORM.group
        mask = mask_n[None, :]
    return group * FORM.outputs + offs_n[None, :], mask


@triton.jit
def _decode_uint4(weight, codes, half, first, offs_k, offs_n, mask_n, FORM: tl.constexpr):
    """With two bf16 numbers an instruction: products of two of them are rounded as in fp32."""
    at, mask = _scales_of(weight, first, offs_k, offs_n, mask_n, FORM)
    scales = tl.load(weight[1] + at, mask=mask, other=0.0)
    if FORM.has_offsets:
        zeros = tl.load(weight[2] + at, mask=mask, other=0.0)
        PTX: tl.constexpr = HIGH_OFFSETS if half else LOW_OFFSETS
    elif FORM.has_zeros:
        zeros = -128.0 - tl.load(weight[2] + at, mask=mask, other=0).to(tl.float32)
        PTX: tl.constexpr = HIGH_ZEROS if half else LOW_ZEROS
    else:
        zeros = tl.zeros_like(scales).to(tl.float32) - (128.0 + FORM.middle)
        PTX: tl.constexpr = HIGH_ZEROS if half else LOW_ZEROS
    return tl.inline_asm_elementwise(
        PTX,
        "=&r,=&r,r,r,r,r,r",
        [codes, zeros.to(tl.bfloat16), scales],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _decode(
    weight, codes, half, first, offs_k, offs_n, mask_n, DTYPE: tl.constexpr, FORM: tl.constexpr
):
    at, mask = _scales_of(weight, first, offs_k, offs_n, mask_n, FORM)
    scales = tl.load(weight[1] + at, mask=mask, other=0)
    if FORM.kind == "e2m1":
        scales = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    scales = scales.to(tl.float32)
    if FORM.halves == 2:
        codes = codes >> (4 * half) & 15
    if FORM.kind == "e4m3":
        EXACT: tl.constexpr = tl.bfloat16 if FORM.ptx and tl.bfloat16 == DTYPE else tl.float32
        values = from_e4m3(codes, EXACT).to(tl.float32)
    elif FORM.kind == "e2m1":
        # The bits of an fp16 that is 2^14 times too small.
        bits = (codes & 7).to(tl.int16) << 9 | (codes & 8).to(tl.int16) << 12
        values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    else:
        # 2^23 + code, as fp32: an or instead of a conversion, which takes four times as long.
        values = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        if FORM.has_zeros:
            zeros = tl.load(weight[2] + at, mask=mask, other=0).to(tl.float32)
        if FORM.has_offsets:
            values -= 8388608.0
        elif FORM.has_zeros:
            values -= zeros + 8388608.0
        else:
            values -= FORM.middle + 8388608.0
    values *= scales
    if FORM.has_offsets:
        values += zeros
    return values.to(DTYPE)
