"""A linear whose rows' results do not depend on how many rows there are (`fixed_linear`).

Every product takes tiles of the same shape, goes through its inputs in one order and is not split
over them, as in Thinking Machines' batch-invariant operators (2025). With few rows most of a tile
is padding, and a GPU is not filled where a library would split the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Rows, outputs and inputs of a tile.
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
OPTIONS = {"num_warps": 4, "num_stages": 3}


@triton.jit(do_not_specialize=["num_rows"])
def fixed_linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    stride_x,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (block of outputs, block of rows): x [num_rows, IN], weight [OUT, IN] -> out
    [num_rows, OUT]"""
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < num_rows, offs_n < OUT
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x
    weight_rows = weight_ptr + offs_n.to(tl.int64)[None, :] * IN
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, IN, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < IN
        x = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(
            weight_rows + offs_k[:, None], mask=mask_k[:, None] & mask_n[None, :], other=0.0
        )
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
    tl.store(
        out_ptr + offs_m.to(tl.int64)[:, None] * OUT + offs_n[None, :],
        sums.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


def fixed_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x: [T, in] with adjacent inputs; weight: [out, in], contiguous, of the same dtype"""
    (num_rows, size), num_outputs = x.shape, weight.shape[0]
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (-(-num_outputs // TILE["BLOCK_N"]), -(-num_rows // TILE["BLOCK_M"]))
        fixed_linear_kernel[grid](
            x,
            weight,
            out,
            num_rows,
            x.stride(0),
            IN=size,
            OUT=num_outputs,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            **TILE,
            **OPTIONS,
        )
    return out
