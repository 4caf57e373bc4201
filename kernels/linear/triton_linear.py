"""Products with weights in 4 and 8 bits (`GroupedWeight`), and decoding them.

Few rows are bound by the bytes of the weight: tiles are narrow, and where outputs are too few to
fill the GPU, inputs are split, and the parts' sums are added in order. Thousands of rows are bound
by arithmetic: then slices of the weight are decoded once, for a library's product.

Where a row's bits may depend on no other row, every product takes tiles of the same shape, goes
through its inputs in one order and is not split over them, as in Thinking Machines' batch-invariant
operators (2025); so also products with plain weights. With few rows most of a tile is padding, and
a GPU is not filled where a library would split the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvmesh.kernels import workspace
from kvmesh.kernels.gpu import gpu_of
from kvmesh.kernels.linear.grouped import GroupedWeight
from kvmesh.kernels.linear.triton_tiles import (
    WeightForm,
    block_rows,
    decode,
    inputs_of,
    load_codes,
    options,
    pointers,
    product,
    weight_form,
)

# From so many rows on, decoding costs less than what a library's product saves.
DECODED_ROWS = 1024
MAX_SPLITS = 16
# Steps of a part, below which adding it costs more than it saves.
_MIN_STEPS = 4
# Rows and outputs, where a row's bits depend on no other row.
FIXED_TILE = (64, 64)
_MERGED = 1024


@triton.jit(do_not_specialize=["num_rows", "steps"])
def linear_kernel(
    x_ptr,
    weight,
    bias_ptr,
    out_ptr,
    num_rows,
    stride_x,
    steps,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    FORM: tl.constexpr,
):
    """Program (block of outputs, block of rows, part of the inputs): x [num_rows, inputs] ->
    out [parts, num_rows, outputs], each part of `steps` steps.
    """
    BLOCK_M: tl.constexpr = FORM.block_m
    BLOCK_N: tl.constexpr = FORM.block_n
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < num_rows, offs_n < FORM.outputs
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x
    part = tl.program_id(2)
    begin = part * steps * FORM.block_k
    end = tl.minimum(begin + steps * FORM.block_k, FORM.inputs)
    sums = product(x_rows, mask_m, weight, offs_n, mask_n, begin, end, PRECISION, FORM)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    rows = part.to(tl.int64) * num_rows + offs_m
    tl.store(
        out_ptr + rows[:, None] * FORM.outputs + offs_n[None, :],
        sums.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


@triton.jit(do_not_specialize=["count"])
def add_parts_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    count,
    OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parts [PARTS, rows, OUTPUTS] fp32, added in order -> out [rows, OUTPUTS] of count numbers"""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(PARTS):
        sums += tl.load(parts_ptr + part * count + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + offs % OUTPUTS, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def decode_kernel(weight, out_ptr, first_output, num_outputs, FORM: tl.constexpr):
    """Program (block of outputs, block of inputs): outputs [first_output, + num_outputs) ->
    out [num_outputs, inputs]"""
    BLOCK_N: tl.constexpr = FORM.block_n
    HALVES: tl.constexpr = FORM.halves
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < num_outputs
    offs_n = first_output + rows
    first = tl.program_id(1) * FORM.block_k
    codes = load_codes(weight, first, offs_n, mask_n, FORM)
    for half in tl.static_range(HALVES):
        offs_k = inputs_of(first, half, FORM)
        w = decode(
            weight, codes, half, first, offs_k, offs_n, mask_n, out_ptr.dtype.element_ty, FORM
        )
        at = rows.to(tl.int64)[None, :] * FORM.inputs + offs_k[:, None]
        tl.store(out_ptr + at, w, mask=(offs_k < FORM.inputs)[:, None] & mask_n[None, :])


def linear(
    x: torch.Tensor,
    weight: GroupedWeight | torch.Tensor,
    bias: torch.Tensor | None,
    *,
    deterministic: bool,
) -> torch.Tensor:
    """x: [T, in] with adjacent inputs -> [T, out]; see `kernels.linear.grouped_linear`, or with a
    contiguous tensor `fixed_linear`, which is deterministic"""
    num_rows, num_outputs = x.shape[0], weight.shape[0]
    fixed = deterministic or isinstance(weight, torch.Tensor)
    if num_rows >= DECODED_ROWS and not fixed:
        return _decoded_linear(x, weight, bias)
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    form = weight_form(weight, *FIXED_TILE) if fixed else form_for(weight, num_rows)
    blocks = (-(-num_outputs // form.block_n), -(-num_rows // form.block_m))
    all_steps = -(-form.inputs // form.block_k)
    parts = 1 if fixed else _parts(blocks, all_steps, gpu_of(x).processors)
    steps = -(-all_steps // parts)
    parts = -(-all_steps // steps)  # none is empty
    sums = out
    if parts > 1:
        sums = torch.empty((parts, *out.shape), dtype=torch.float32, device=x.device)
    has_bias = bias is not None
    linear_kernel[(*blocks, parts)](
        x,
        pointers(weight),
        bias if has_bias else x,
        sums,
        num_rows,
        x.stride(0),
        steps,
        HAS_BIAS=has_bias and parts == 1,
        FORM=form,
        **options(form, x.dtype),
    )
    if parts > 1:
        add_parts_kernel[(-(-out.numel() // _MERGED),)](
            sums,
            bias if has_bias else x,
            out,
            out.numel(),
            OUTPUTS=num_outputs,
            PARTS=parts,
            HAS_BIAS=has_bias,
            BLOCK=_MERGED,
            num_warps=4,
        )
    return out


def form_for(weight: GroupedWeight, num_rows: int) -> WeightForm:
    """The tiles for so many rows."""
    block_m = block_rows(num_rows)
    return weight_form(weight, block_m, 64 if block_m < 128 else 128)


def _parts(blocks: tuple[int, int], steps: int, processors: int) -> int:
    """So many that there are two programs for each multiprocessor."""
    wanted = 2 * processors // (blocks[0] * blocks[1])
    return max(1, min(wanted, MAX_SPLITS, steps // _MIN_STEPS))


def _decoded_linear(
    x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """With slices of the weight, decoded."""
    num_outputs, size = weight.shape
    out = torch.empty((x.shape[0], num_outputs), dtype=x.dtype, device=x.device)
    rows = min(num_outputs, max(1, workspace.DECODED_WEIGHT_BYTES // (size * x.element_size())))
    form = weight_form(weight, 16, 64)
    slice_ = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    for first in range(0, num_outputs, rows):
        count = min(rows, num_outputs - first)
        grid = (-(-count // form.block_n), -(-size // form.block_k))
        decode_kernel[grid](pointers(weight), slice_, first, count, form, num_warps=4)
        torch.mm(x, slice_[:count].T, out=out[:, first : first + count])
    if bias is not None:
        out += bias
    return out
